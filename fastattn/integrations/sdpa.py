"""Let code that calls ``F.scaled_dot_product_attention`` run on this package, for as long as a context is open.

timm, torchvision, open_clip, torchtune, diffusers and transformers ("sdpa") look the function up in
``torch.nn.functional`` at every call. While a context is open a function of ours stands there. It asks in which thread
it is called: only in those that opened a context does it call ours, and in all others it calls torch's.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.integrations._routing import Routing, are_plain, constant_in_graphs
from fastattn.ops import scaled_dot_product_attention

_torch_sdpa = F.scaled_dot_product_attention


class SdpaPatch(Routing, contextlib.ContextDecorator):
    """What :func:`patch_sdpa` returns: a context manager, a decorator, and what has happened inside.

    Attributes:
        routed: calls that ran on this package.
        traced: calls that ``torch.compile`` traced into a graph, which calls ours from then on, uncounted.
        refused: calls that went to torch, by the reason why.
    """

    def __init__(self) -> None:
        super().__init__()
        self._entered: list[list[SdpaPatch]] = []  # the lists of the threads that are inside

    def __enter__(self) -> SdpaPatch:
        with _lock:
            self._entered.append(_of_thread.patches)
            for patches in (_of_thread.patches, _of_all):
                patches.append(self)
            _put(_routed)
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            for patches in (self._entered.pop(), _of_all):
                patches.reverse()
                patches.remove(self)  # of several entries the last
                patches.reverse()
            if not _of_all:
                _put(_torch_sdpa)


def patch_sdpa() -> SdpaPatch:
    """Route ``F.scaled_dot_product_attention`` to :func:`fastattn.scaled_dot_product_attention` in a ``with`` block.

    It is undone on leaving, by an exception too. Blocks may be nested, and the innermost counts. Only the thread that
    is inside is affected. What ours refuses runs on torch's function and is counted by reason. As a decorator it does
    the same for each call of a function. Nothing is patched when this package is imported. :func:`fastattn.use_backend`
    chooses the backend.

    A reference to torch's function that was taken before (``from torch.nn.functional import ...``) is not affected, and
    neither is what goes past the function in C++, such as the fused inference of ``nn.TransformerEncoderLayer``, which
    :func:`fastattn.fuse` replaces. ``torch.compile`` traces what it finds, inside a block ours and outside torch's, and
    compiles again where that has changed.

    Returns:
        An :class:`SdpaPatch`. Print it to see what was called.
    """
    return SdpaPatch()


# ----------------------------------------------------------------------------------------------------- in torch's place


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.patches: list[SdpaPatch] = []


_lock = threading.Lock()
_of_thread = _OfThread()
_of_all: list[SdpaPatch] = []


def _put(function: Any) -> None:
    setattr(F, "scaled_dot_product_attention", function)  # noqa: B010, type checkers know the function's own type


def _routed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` while a block is open."""
    arguments = query, key, value, attn_mask, dropout_p, is_causal
    words: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if torch.compiler.is_compiling():  # which has no threads, and sees what is open while it traces
        if _of_all and are_plain(query, key, value):
            _count_traced()
            return scaled_dot_product_attention(*arguments, **words)
        return _torch_sdpa(*arguments, **words)
    if not _of_thread.patches:
        return _torch_sdpa(*arguments, **words)
    output = _of_thread.patches[-1].attend(*arguments, **words)
    return _torch_sdpa(*arguments, **words) if output is None else output


@constant_in_graphs
def _count_traced() -> int:
    """Called once for each call that is traced, and never by the graph."""
    _of_all[-1].traced += 1
    return 0
