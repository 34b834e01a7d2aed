"""Attention of diffusers on this package, by its own registry of attention backends.

The models of diffusers look their attention up in that registry at every call, by the members of an enumeration which
nobody can add to. But any member can be given another function, and that is what :func:`register` does.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastattn.integrations._routing import Routing, are_plain, constant_in_graphs
from fastattn.ops import scaled_dot_product_attention

_DISPATCH = "diffusers.models.attention_dispatch"
_TABLES = ("_backends", "_constraints", "_supported_arg_names")
# Of a member's function. The registry hands over those arguments alone that it finds in a function's signature.
_PARAMETERS = (
    "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "return_lse",
    "_parallel_config",
)  # fmt: skip


class Registration(Routing):
    """What :func:`register` did, and what has been called since. As a context manager it undoes that on leaving.

    Attributes:
        member: the name of the backend that is ours now.
        routed: calls that ran on this package.
        traced: calls that ``torch.compile`` traced into a graph, which calls ours from then on, uncounted.
        refused: calls that ran on the member's own function, by the reason why.
    """

    def __init__(self, registry: Any, member: Any) -> None:
        super().__init__()
        self.member: str = member.value
        self._registry, self._key = registry, member
        self._before = {table: getattr(registry, table)[member] for table in _TABLES}
        self._ours = _function(self, registry._backends[member])
        registry.register(member, constraints=registry._constraints[member])(self._ours)

    def undo(self) -> None:
        """Give the member its own function back. A second call does nothing.

        Raises:
            RuntimeError: somebody else has registered a function for the member since.
        """
        if not self._before:
            return
        if self._registry._backends[self._key] is not self._ours:
            raise RuntimeError(f"the backend {self.member!r} has another function by now: undo what gave it first")
        for table, value in self._before.items():
            getattr(self._registry, table)[self._key] = value
        self._before = {}

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def register(member: str = "native") -> Registration:
    """Put this package's attention in the place of one of diffusers' attention backends.

    ``"native"`` is what models use that were told nothing, so that from then on all of them run on ours, in every
    thread. With the name of another member, only those do that ask for it::

        with fastattn.integrations.diffusers.register("_native_math"):
            transformer.set_attention_backend("_native_math")

    What ours refuses, context parallelism, and a returned LSE run on the member's own function, and are counted by
    reason. Models whose attention calls ``F.scaled_dot_product_attention`` past the registry (the UNets, the
    autoencoders, Stable Diffusion 3) are served by :func:`fastattn.patch_sdpa` instead.

    Args:
        member: a value of diffusers' ``AttentionBackendName`` that takes masks and grouped heads as ``"native"`` does.

    Returns:
        A :class:`Registration`. Print it to see what was called, call its ``undo()``, or use it as a context manager.

    Raises:
        ImportError: diffusers is not installed, or has no registry of attention backends.
        ValueError: it has no such member.
        RuntimeError: its registry, or the member's function, is not what this package knows (diffusers 0.42).
    """
    dispatch = _dispatch()
    registry, names = dispatch._AttentionBackendRegistry, dispatch.AttentionBackendName
    if member not in [name.value for name in names]:
        raise ValueError(f"member={member!r}: expected one of {', '.join(name.value for name in names)}")
    missing = [table for table in _TABLES if names(member) not in getattr(registry, table, {})]
    if missing:
        raise RuntimeError(f"diffusers' registry has no {', '.join(missing)} of {member!r}: expected it as in 0.42")
    takes = tuple(inspect.signature(registry._backends[names(member)]).parameters)
    if takes != _PARAMETERS:
        raise RuntimeError(f"the backend {member!r} takes ({', '.join(takes)}): expected ({', '.join(_PARAMETERS)})")
    return Registration(registry, names(member))


def _dispatch() -> ModuleType:
    """The module of diffusers that holds the registry."""
    try:
        dispatch = importlib.import_module(_DISPATCH)
    except ModuleNotFoundError as error:
        what = "diffusers is not installed" if error.name == "diffusers" else f"diffusers has no {error.name}"
        raise ImportError(f"{what}: expected diffusers 0.42, pip install diffusers") from error
    for name in ("_AttentionBackendRegistry", "AttentionBackendName"):
        if not hasattr(dispatch, name):
            raise ImportError(f"{_DISPATCH} has no {name}: expected it as in diffusers 0.42")
    return dispatch


def _function(routing: Routing, own: Callable[..., Any]) -> Callable[..., Any]:
    """What takes the place of ``own``, the function of a member."""

    @constant_in_graphs
    def count_traced() -> int:
        routing.traced += 1
        return 0

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Any:
        """Queries, keys and values are ``[B, L, H, D]``, and so is the output; a mask may be ``[B, S]``."""

        def by_its_own() -> Any:
            arguments = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            return own(*arguments, return_lse=return_lse, _parallel_config=_parallel_config)

        past_us = "context parallelism" if _parallel_config is not None else "return_lse" if return_lse else None
        if torch.compiler.is_compiling():
            if past_us or not are_plain(query, key, value):
                return by_its_own()
        elif past_us:
            routing.refused[past_us] += 1
            return by_its_own()
        mask = attn_mask
        if mask is not None and mask.shape == (query.shape[0], key.shape[1]):  # as "native" reads it
            mask = mask[:, None, None]
        by_heads = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if torch.compiler.is_compiling():
            count_traced()
            output = scaled_dot_product_attention(
                *by_heads, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        else:
            output = routing.attend(*by_heads, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return by_its_own() if output is None else output.transpose(1, 2)

    return attend
