"""``torch.nn.attention.flex_attention.flex_attention``, argument for argument, on this package's backends."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.attention.api import attention
from fastattn.ops.attention.contract import ScoreMod
from fastattn.ops.common.checks import shapes_of

_LARGEST_BLOCK = 1 << 30  # the block size of a mask that torch makes where none is given
_ELEMENTS = 1 << 22  # of the weights that are made at once for the largest scores
# The kinds of the blocks of a mask: 0 not seen, 1 seen as mask_mod says, 2 seen whole.
# They are remembered with the lists that they were made of, and with how often these had been written to.
_kinds: weakref.WeakKeyDictionary[Any, tuple[list[tuple[Tensor | None, int]], Tensor]] = weakref.WeakKeyDictionary()
_LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: Any = None,
) -> Tensor | tuple[Any, ...]:
    """FlexAttention's call (arXiv:2412.05496) with gradients of all that ``score_mod`` captures, in a fixed order.

    Args:
        query: ``[B, H, L, D]``.
        key: ``[B, Hk, S, D]``; a batch of 1 is shared where ``block_mask`` has the query's batch.
        value: ``[B, Hk, S, Dv]``.
        score_mod: a function of ``(score, batch, head, query_index, key_index)``; see :func:`fastattn.attention`.
        block_mask: a ``BlockMask``: the pairs of its full blocks are seen, and those of its other blocks where its
            ``mask_mod`` says so. No such mask is needed: :func:`fastattn.attention` takes a ``mask_mod``.
        scale: multiplies the scores before softmax; default ``1/sqrt(D)``.
        enable_gqa: allow fewer key heads than query heads.
        return_lse: return ``(output, LSE)``.
        kernel_options: hints for torch's kernels; ours have no use for them.
        return_aux: an ``AuxRequest``: return ``(output, AuxOutput)`` with the LSE and the largest score of each row,
            which has no gradient.

    Returns:
        ``[B, H, L, Dv]``, or a tuple as asked for. A row that may see no key is zero, and its LSE ``-inf``.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`fastattn.attention`; or ``block_mask`` is for other
            lengths.
    """
    if return_lse and return_aux is not None:
        raise ValueError("return_lse=True with return_aux: expected one of them (return_aux=AuxRequest(lse=True))")
    if kernel_options is not None and not isinstance(kernel_options, dict):
        raise TypeError(f"kernel_options: expected a dict or None, got {type(kernel_options).__name__}")
    four_dimensional = all(isinstance(t, Tensor) and t.dim() == 4 for t in (query, key, value))
    if four_dimensional and not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"{shapes_of(query, key, value)}: expected as many key heads as query heads (enable_gqa=True allows fewer)"
        )
    mask_mod = None
    if block_mask is not None:
        mask_mod = _mask_mod(block_mask, query, key)
        if four_dimensional and key.shape[0] == value.shape[0] == 1 != query.shape[0]:
            key, value = (t.expand(query.shape[0], *t.shape[1:]) for t in (key, value))
    wants_lse = return_lse or (return_aux is not None and return_aux.lse)
    found = attention(
        query, key, value, score_mod=score_mod, mask_mod=mask_mod, scale=scale, return_lse=bool(wants_lse)
    )
    output, lse = found if isinstance(found, tuple) else (found, None)
    if return_aux is None:
        return output if lse is None else (output, lse)
    from torch.nn.attention.flex_attention import AuxOutput

    largest = _largest_scores(query, key, value, score_mod, mask_mod, scale) if return_aux.max_scores else None
    return output, AuxOutput(lse=lse, max_scores=largest)


def _mask_mod(block_mask: Any, query: Tensor, key: Tensor) -> Callable[..., Tensor] | None:
    """What a block mask says of a pair, as a function; None where it hides nothing."""
    for name in ("kv_num_blocks", "kv_indices", "BLOCK_SIZE", "mask_mod", "seq_lengths"):
        if not hasattr(block_mask, name):
            raise TypeError(f"block_mask: expected a BlockMask, got {type(block_mask).__name__}, which has no {name}")
    rows, keys = block_mask.BLOCK_SIZE
    if rows >= _LARGEST_BLOCK and keys >= _LARGEST_BLOCK:
        return None
    lengths = query.shape[2], key.shape[2]
    if tuple(block_mask.seq_lengths) != lengths:
        raise ValueError(
            f"block_mask is for {block_mask.seq_lengths[0]} queries and {block_mask.seq_lengths[1]} keys: expected one "
            f"for the {lengths[0]} queries and {lengths[1]} keys of the call"
        )
    kinds, of_pairs = _kinds_of(block_mask), block_mask.mask_mod
    if any(1 < size < wanted for size, wanted in zip(kinds.shape, query.shape[:2])):
        raise ValueError(
            f"block_mask is for {kinds.shape[0]} batch entries and {kinds.shape[1]} heads: expected one for the "
            f"{query.shape[0]} batch entries and {query.shape[1]} heads of query, or 1 of them for all"
        )
    by_batch, by_head = kinds.shape[0] > 1, kinds.shape[1] > 1

    def mask_mod(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        kind = kinds[batch if by_batch else 0, head if by_head else 0, query_index // rows, key_index // keys]
        return (kind == 2) | ((kind == 1) & of_pairs(batch, head, query_index, key_index))

    return mask_mod


def _kinds_of(block_mask: Any) -> Tensor:
    """``[B, H, blocks of rows, blocks of keys]``, uint8: the kinds of a mask's blocks, made once for each mask."""
    lists = [getattr(block_mask, name) for name in _LISTS]
    if torch.compiler.is_dynamo_compiling() or any(t is not None and t.is_inference() for t in lists):
        return _kinds_anew(block_mask)  # of tensors of inference mode nobody knows whether they were written to
    state = [(t, 0 if t is None else t._version) for t in lists]
    known = _kinds.get(block_mask)
    if known is None or any(was is not now or version != then for (was, then), (now, version) in zip(known[0], state)):
        _kinds[block_mask] = known = state, _kinds_anew(block_mask)
    return known[1]


def _kinds_anew(block_mask: Any) -> Tensor:
    blocks = -(-block_mask.seq_lengths[1] // block_mask.BLOCK_SIZE[1])  # lists may be shorter
    kinds = _listed(block_mask.kv_num_blocks, block_mask.kv_indices, blocks)
    if block_mask.full_kv_num_blocks is not None:
        kinds = torch.maximum(kinds, 2 * _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, blocks))
    return kinds[(None,) * (4 - kinds.dim())]


def _listed(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """Uint8 ``[..., blocks]``, 1 at the blocks of keys whose numbers are among the first ``counts`` of ``indices``."""
    is_listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    # numbers behind the count mean nothing: they go to one more column, which is cut off
    where = torch.where(is_listed, indices, blocks).long()
    found = torch.zeros((*indices.shape[:-1], blocks + 1), dtype=torch.uint8, device=indices.device)
    return found.scatter_(-1, where, 1)[..., :blocks]


@torch.no_grad()
def _largest_scores(
    query: Tensor, key: Tensor, value: Tensor, score_mod: Any, mask_mod: Any, scale: float | None
) -> Tensor:
    """``[B, H, L]``: the largest score of each row, from its LSE and its largest weight, some rows at a time."""
    batch, heads, length = query.shape[:3]
    step = max(1, _ELEMENTS // max(1, batch * heads * key.shape[2]))
    found = []
    for start in range(0, length, step):
        functions: dict[str, Any] = {
            name: None if function is None else _from_row(function, start, name == "score_mod")
            for name, function in (("score_mod", score_mod), ("mask_mod", mask_mod))
        }
        _, weights, lse = attention(
            query[:, :, start : start + step], key, value, scale=scale, need_weights=True, average_attn_weights=False,
            return_lse=True, **functions,
        )  # fmt: skip
        found.append(lse + weights.to(lse.dtype).amax(-1).log())
    return torch.cat(found, 2) if found else query.new_empty(batch, heads, 0)


def _from_row(function: Any, start: int, has_score: bool) -> Any:
    """A function that counts rows from ``start``, which is a tensor: a number would be a new program for each part."""
    function, *rest = function if isinstance(function, tuple) else (function,)
    first = torch.tensor(start, dtype=torch.int32, device="cpu")

    def of_all(*arguments: Any) -> Any:
        score, (batch, head, query_index, key_index, *more) = arguments[:has_score], arguments[has_score:]
        return function(*score, batch, head, query_index + first, key_index, *more)

    return (of_all, *rest)
