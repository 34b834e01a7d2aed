"""Classes of others that compute what one of torch's does: what a caller says of them, checked by names and numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_NORMS = (nn.LayerNorm, nn.RMSNorm)
_EPSILONS = ("eps", "variance_epsilon", "epsilon")  # as the norms of other packages call it
# Attributes of ours that would be read off a module of another class in another meaning.
_TAKEN: dict[type[nn.Module], tuple[str, ...]] = dict.fromkeys(_NORMS, ("backend", "dropout"))


def checked(also: Mapping[type[nn.Module], type[nn.Module]] | None, replaced: Collection[type]) -> dict[type, type]:
    """``also`` as a dict; raise TypeError, naming the item, unless each maps a new class to one of ``replaced``."""
    if also is None:
        return {}
    if not isinstance(also, Mapping):
        raise TypeError(f"also: expected a dict of classes, got {type(also).__name__}")
    names = ", ".join(f"nn.{kind.__name__}" for kind in replaced)
    for theirs, kind in also.items():
        if not (isinstance(theirs, type) and issubclass(theirs, nn.Module)):
            raise TypeError(f"also: {theirs!r}: expected a subclass of nn.Module to replace")
        if theirs in replaced:
            raise TypeError(f"also: {shown(theirs)} is replaced anyway: expected a class that fuse leaves alone")
        if kind not in replaced:
            raise TypeError(f"also: {shown(theirs)}: expected it to map to one of {names}, got {kind!r}")
        if kind not in _NORMS and not issubclass(theirs, kind):
            raise TypeError(f"also: {shown(theirs)} is no subclass of nn.{kind.__name__}: only norms need not be one")
    return dict(also)


def shown(kind: type) -> str:
    """The full name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def missing_state(name: str, module: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    """The attributes that ``module`` needs to be a ``kind``, made of those it has under other names.

    Raises:
        TypeError: it has none to make them of, or has one of its own that means something else in this package.
    """
    label = f"also: {name or 'the model'}, a {shown(type(module))},"
    for attribute in _TAKEN.get(kind, ("backend",)):
        if attribute in vars(module) or attribute in module._modules or attribute in module._parameters:
            raise TypeError(f"{label} has an attribute {attribute}, which means something else in fastattn's modules")
    state: dict[str, Any] = {}
    if kind in _NORMS:
        weight = getattr(module, "weight", None)
        epsilon = next((getattr(module, alias) for alias in _EPSILONS if hasattr(module, alias)), None)
        made = {
            "normalized_shape": tuple(weight.shape) if isinstance(weight, Tensor) else None,
            "eps": epsilon if isinstance(epsilon, float) else None,
            "elementwise_affine": weight is not None,
        }
        state = {key: value for key, value in made.items() if not hasattr(module, key) and value is not None}
    needed = ("normalized_shape", "eps", "weight", *["bias"] * (kind is nn.LayerNorm)) if kind in _NORMS else ()
    for attribute in needed:
        if attribute not in state and not hasattr(module, attribute):
            raise TypeError(f"{label} has no attribute {attribute}, which nn.{kind.__name__} has")
    return state


def check_by_numbers(name: str, module: nn.Module, kind: type[nn.Module], state: dict[str, Any]) -> None:
    """Raise ValueError unless ``module`` computes what it would as a ``kind``, on a few random numbers.

    Rounding passes, another formula does not: not one that permutes axes, leaves the mean or adds 1 to the weight, nor
    another epsilon, since some of the numbers are small. Hooks are not called, and the module stays as it was.
    """
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    if any(t.is_meta for t in tensors):
        return  # nothing to compute with: only the names are checked
    like = tensors[0] if tensors else torch.empty(0)
    label = f"also: {name or 'the model'}, a {shown(type(module))}, is no nn.{kind.__name__}:"
    with torch.no_grad(), _evaluating(module):
        theirs = type(module)
        with _as_a(module, kind, state):
            inputs = _inputs(module, kind, like)
            expected = _tensors(kind.forward(module, *inputs))
        try:
            found = _tensors(theirs.forward(module, *inputs))
        except Exception as error:
            shapes = [tuple(x.shape) for x in inputs]
            raise ValueError(f"{label} its forward refuses inputs of shape {shapes}: {error}") from error
    for have, want in zip(found, expected):
        if have.shape != want.shape or have.dtype != want.dtype:
            raise ValueError(f"{label} its forward gives {_kind_of(have)} where that gives {_kind_of(want)}")
        tolerance = torch.finfo(want.dtype).eps ** 0.5
        if not torch.allclose(have, want, rtol=tolerance, atol=tolerance, equal_nan=True):
            far = (have - want).abs().max().item()
            raise ValueError(f"{label} on random numbers its forward gives results that are {far:.2g} away")


def _kind_of(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _tensors(result: Any) -> list[Tensor]:
    return [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor)]


def _inputs(module: Any, kind: type[nn.Module], like: Tensor) -> tuple[Tensor, ...]:
    """A few numbers that a ``kind`` takes, large and small ones, drawn from a generator of their own."""
    if kind in _NORMS:
        sizes = [tuple(module.normalized_shape)]
    elif kind is nn.MultiheadAttention:
        sizes = [(module.embed_dim,), (module.kdim,), (module.vdim,)]
    else:
        size = (module.linear1.in_features,)
        sizes = [size] if kind is nn.TransformerEncoderLayer else [size, size]
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, 3, *size, generator=generator) for size in sizes]
    if kind in _NORMS:
        drawn[0][1] *= 1e-3
    return tuple(x.to(like.device, like.dtype) for x in drawn)


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Generator[None]:
    """``module.eval()`` for a while, and without torch's fused inference path, which calls no method of a layer."""
    modes, fused = [(part, part.training) for part in module.modules()], torch.backends.mha.get_fastpath_enabled()
    module.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for part, training in modes:
            part.training = training


@contextlib.contextmanager
def _as_a(module: nn.Module, kind: type[nn.Module], state: dict[str, Any]) -> Generator[None]:
    """``module`` with the class ``kind`` for a while, and attributes that it has not."""
    theirs = type(module)
    module.__class__ = kind
    module.__dict__.update(state)
    try:
        yield
    finally:
        module.__class__ = theirs
        for key in state:
            del module.__dict__[key]
