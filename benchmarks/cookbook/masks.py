"""Who sees whom, by a function: each of these makes a ``mask_mod``. Plain code to copy; docs/cookbook.md shows it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def prefix_lm(prefix_lengths: Tensor) -> Callable[..., Tensor]:
    """A prefix that every token sees, and a causal rest (arXiv:1910.10683).

    ``prefix_lengths`` are integers ``[B]``.
    """

    def mask_mod(batch, head, query_index, key_index):
        return (key_index <= query_index) | (key_index < prefix_lengths[batch])

    return mask_mod


def window_with_globals(window: int, is_global: Tensor) -> Callable[..., Tensor]:
    """A window of keys to either side, and a few global tokens that see all and that all see (arXiv:2004.05150).

    ``is_global`` is boolean ``[B, L]``.
    """

    def mask_mod(batch, head, query_index, key_index):
        is_near = torch.abs(query_index - key_index) <= window
        return is_near | is_global[batch, query_index] | is_global[batch, key_index]

    return mask_mod


def dilated_window(window: int, dilation: int) -> Callable[..., Tensor]:
    """Every ``dilation``-th key, ``window`` of them to either side (arXiv:2004.05150, section 3.1)."""

    def mask_mod(batch, head, query_index, key_index):
        distance = torch.abs(query_index - key_index)
        return (distance % dilation == 0) & (distance <= window * dilation)

    return mask_mod


def documents(document_ids: Tensor) -> Callable[..., Tensor]:
    """Documents packed into one sequence, each of which sees itself alone (arXiv:2107.02027).

    ``document_ids`` are integers ``[B, L]``.
    """

    def mask_mod(batch, head, query_index, key_index):
        return document_ids[batch, query_index] == document_ids[batch, key_index]

    return mask_mod


def tree(subtree_ends: Tensor) -> Callable[..., Tensor]:
    """Continuations that share a beginning, as one tree in depth-first order: a node sees its ancestors and itself.

    ``subtree_ends`` are integers ``[B, L]``: the position behind a node's last descendant, in place of a matrix of
    ancestors ``[B, L, L]`` (arXiv:2305.09781).
    """

    def mask_mod(batch, head, query_index, key_index):
        return (key_index <= query_index) & (query_index < subtree_ends[batch, key_index])

    return mask_mod


def speculative_decoding(parents: Tensor, context_lengths: Tensor, depth: int) -> Callable[..., Tensor]:
    """Drafted tokens behind a context: each sees that and, of the drafts, its ancestors and itself (arXiv:2401.10774).

    ``parents`` are integers ``[B, L]``, the draft before each one; the first is its own. Draft ``i`` is key
    ``context_lengths[b] + i`` and has at most ``depth`` ancestors; no query sees keys behind the drafts.
    """

    def mask_mod(batch, head, query_index, key_index):
        draft = key_index - context_lengths[batch]
        is_seen = (draft < 0) | (draft == query_index)
        ancestor = query_index
        for _ in range(depth):
            ancestor = parents[batch, ancestor]
            is_seen = is_seen | (draft == ancestor)
        return is_seen

    return mask_mod
