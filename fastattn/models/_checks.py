"""What the models ask of their arguments. Each error names the argument, what it is, and what is accepted."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.modules._common import check_number

_IGNORED = -100  # a target where nothing is asked: cross entropy's own index for it


def check_token(name: str, token: int, vocabulary: int) -> None:
    """Raise unless ``token`` is one of so many."""
    check_number(name, token, 0, vocabulary - 1, "a token")


def check_temperature(temperature: float) -> None:
    """Raise unless logits can be divided by ``temperature``, or it is 0."""
    if not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature={temperature!r}: expected a number, got {type(temperature).__name__}")
    least = torch.finfo(torch.float32).tiny  # below it what float32 logits are divided by is 0
    if not (temperature == 0.0 or least <= temperature < math.inf):
        raise ValueError(f"temperature={temperature}: expected 0 or a finite number of at least {least:.3g}")


def check_tokens(name: str, tokens: Tensor, *, least: int = 0, batch: int | None = None) -> None:
    """Raise unless ``tokens`` are integers ``[B, at least so many]``, of this batch."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tokens).__name__}")
    if tokens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} is {tokens.dtype}: expected int64 or int32")
    if tokens.dim() != 2 or tokens.shape[1] < least or batch not in (None, tokens.shape[0]):
        accepted = f"[{'batch' if batch is None else batch}, {f'at least {least}' if least else 'length'}]"
        raise ValueError(f"{name} has shape {tuple(tokens.shape)}: expected {accepted}")


def check_padding(name: str, padding: Tensor | None, shape: torch.Size) -> None:
    """Raise unless ``padding`` is None, or boolean of this shape."""
    if padding is None:
        return
    if padding.dtype != torch.bool:
        raise TypeError(f"{name} is {padding.dtype}: expected bool (True = padding)")
    if padding.shape != shape:
        raise ValueError(f"{name} has shape {tuple(padding.shape)}: expected {tuple(shape)}, one for each token")


def check_not_all_padding(name: str, padding: Tensor | None) -> None:
    """Raise where a row is nothing but padding."""
    if padding is not None and not torch.compiler.is_compiling() and bool(padding.all(dim=1).any()):
        rows = padding.all(dim=1).nonzero().flatten().tolist()
        raise ValueError(f"{name}: rows {rows} are all padding: expected at least one token in each")


def check_images(images: Tensor, channels: int, size: tuple[int, int] | None) -> None:
    """Raise unless ``images`` are ``[B, channels, *size]``, of at least 4 x 4 where their size is free."""
    accepted = f"[batch, {channels}, {'at least 4, at least 4' if size is None else f'{size[0]}, {size[1]}'}]"
    fits = images.dim() == 4 and images.shape[1] == channels
    fits = fits and (min(images.shape[2:]) >= 4 if size is None else tuple(images.shape[2:]) == tuple(size))
    if not fits:
        raise ValueError(f"images have shape {tuple(images.shape)}: expected {accepted}")


def check_image_size(size: tuple[int, int]) -> None:
    """Raise unless height and width can be halved twice."""
    if len(size) != 2 or any(pixels <= 0 or pixels % 4 for pixels in size):
        raise ValueError(f"size={size}: expected positive multiples of 4, height and width")


def check_channels(name: str, channels: int) -> None:
    """Raise unless a network can have half as many channels in front of these."""
    if channels < 2 or channels % 2:
        raise ValueError(f"{name}={channels}: expected a positive even number of channels")


def cross_entropy(logits: Tensor, tokens: Tensor, padding: Tensor | None) -> Tensor:
    """Mean, in nats, of ``tokens`` ``[B, L]`` but the first that are no padding, from ``logits`` ``[B, L - 1, V]``."""
    targets = tokens if padding is None else tokens.masked_fill(padding, _IGNORED)
    targets = targets[:, 1:].flatten().long()
    return F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=_IGNORED)


def check_targets(name: str, tokens: Tensor, padding: Tensor | None) -> None:
    """Raise unless :func:`cross_entropy` has a token to ask for: without one, its mean is NaN."""
    check_tokens(name, tokens, least=2)  # the first is given
    check_padding(f"padding of {name}", padding, tokens.shape)
    nothing = tokens.shape[0] == 0
    if padding is not None and not torch.compiler.is_compiling():
        nothing = nothing or bool(padding[:, 1:].all())
    if nothing:
        raise ValueError(f"{name}, shape {tuple(tokens.shape)}: expected one token behind the first that is no padding")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """In evaluation mode, without dropout and with batch norms that read their statistics and do not move them;
    afterwards each module is in the mode that it had."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
