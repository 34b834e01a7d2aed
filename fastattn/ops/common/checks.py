"""Checks of arguments that several operators share, and autocast: which dtype a call's tensors are to have."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from fastattn.ops.common.tracing import are_sizes

# The dtypes that calls are computed in; a narrower one is for storage.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape as a plain tuple, which reads better in a message than ``torch.Size([...])``."""
    return tuple(tensor.shape)


def shapes_of(query: Tensor, key: Tensor, value: Tensor, of: str = "") -> str:
    """The three shapes, for a message. To put them into words takes as long as all checks of a small call together, so
    that it is done where an error is raised. ``of`` follows the names of key and value."""
    return f"query {shape_of(query)}, key{of} {shape_of(key)}, value{of} {shape_of(value)}"


# ------------------------------------------------------------------------------------------------------------- autocast


def is_autocast_enabled(device: torch.device) -> bool:
    """Is autocast on for this device? torch raises for a kind it has no autocast for, such as ``meta`` or ``lazy``."""
    kind = device.type
    return (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on: all but float64, as torch's own operators take them.

    An argument that is no tensor, or has another dtype, is returned as it is: the checks that follow name it.
    """
    devices = {t.device for t in tensors if isinstance(t, Tensor)}  # one, as a rule, that is asked once
    if not any(is_autocast_enabled(device) for device in devices):
        return tensors
    return tuple(_under_autocast(t) if isinstance(t, Tensor) and t.dtype in DTYPES else t for t in tensors)


def _under_autocast(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float64 or not is_autocast_enabled(tensor.device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which products of float32 stay float32: the inputs already have the dtype that autocast asks for."""
    on = is_autocast_enabled(device)
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()


# -------------------------------------------------------------------------------------------------------------- layouts


def check_dense(name: str, tensor: Tensor, accepted: str = "a dense tensor") -> None:
    """Raise TypeError for a nested tensor of layout ``torch.strided``, or a sparse one.

    Nested tensors of the layout ``torch.jagged`` pass: they are a dense tensor inside and overload what is done to it.
    """
    if tensor.is_nested and tensor.layout is not torch.jagged:
        raise TypeError(
            f"{name} is a nested tensor: expected {accepted}; {name}.to_padded_tensor(0.0), with the padding in a "
            "mask, is one"
        )
    if tensor.layout not in (torch.strided, torch.jagged):
        raise TypeError(f"{name} has the layout {tensor.layout}: expected {accepted}; {name}.to_dense() is one")


# ---------------------------------------------------------------------------------------------------------------- masks


def check_attn_mask_tensor(attn_mask: Tensor, query: Tensor) -> None:
    """Raise unless ``attn_mask`` is a dense boolean or floating tensor on the query's device, of whatever shape."""
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask: expected a torch.Tensor or None, got {type(attn_mask).__name__}")
    check_dense("attn_mask", attn_mask)
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask is {attn_mask.dtype}: expected bool (True = may attend) or floating (added)")
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask is on {attn_mask.device} but query is on {query.device}: expected one device")


def check_attn_mask(attn_mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return ``attn_mask`` as a 4-D view, or raise unless it is boolean or floating and broadcasts to the scores."""
    check_attn_mask_tensor(attn_mask, query)
    scores = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if attn_mask.dim() > 4 or not are_sizes(attn_mask.shape[::-1], scores[::-1], or_one=True):
        raise ValueError(f"attn_mask has shape {shape_of(attn_mask)}: expected one that broadcasts to {scores}")
    return attn_mask[(None,) * (4 - attn_mask.dim())]


def check_key_padding_mask(key_padding_mask: Tensor, key: Tensor) -> None:
    """Raise unless ``key_padding_mask`` is boolean ``[B, S]``."""
    if not isinstance(key_padding_mask, Tensor):
        raise TypeError(f"key_padding_mask: expected a torch.Tensor or None, got {type(key_padding_mask).__name__}")
    check_dense("key_padding_mask", key_padding_mask)
    if key_padding_mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask is {key_padding_mask.dtype}: expected bool (True = padding)")
    if key_padding_mask.device != key.device:
        raise ValueError(f"key_padding_mask is on {key_padding_mask.device} but key is on {key.device}")
    expected = (key.shape[0], key.shape[2])
    if key_padding_mask.dim() != 2 or not are_sizes(key_padding_mask.shape, expected):
        raise ValueError(
            f"key_padding_mask has shape {shape_of(key_padding_mask)}: expected [batch, keys] = {expected}"
        )


# ----------------------------------------------------------------------------------------------- other tensors, numbers


def check_tensor(name: str, tensor: Tensor, query: Tensor, axes: list[tuple[str, int]], accepted: str = "") -> None:
    """Raise unless ``tensor`` is a tensor with these named axes on the query's device. A batch of 1 broadcasts."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(tensor).__name__}")
    check_dense(name, tensor)
    fits = tensor.dim() == len(axes) and all(
        have == want or (axis == "batch" and have == 1) for have, (axis, want) in zip(tensor.shape, axes)
    )
    if not fits:
        names, sizes = ", ".join(axis for axis, _ in axes), tuple(size for _, size in axes)
        raise ValueError(f"{name} has shape {shape_of(tensor)}: expected {accepted or f'[{names}]'}, here {sizes}")
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device} but query is on {query.device}: expected one device")


def check_integers(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` holds integers."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} is {tensor.dtype}: expected an integer dtype")


def is_integer(value: object) -> bool:
    """Is ``value`` a Python integer, or torch.compile's symbol for one?"""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_number(name: str, value: object) -> None:
    """Raise unless ``value`` is a Python number, or torch.compile's symbol for one."""
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}={value!r}: expected a number, got {type(value).__name__}")


def check_flags(**flags: object) -> None:
    """Raise unless each is a Python boolean; else ``"no"`` would count as True."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}={flag!r}: expected True or False")
