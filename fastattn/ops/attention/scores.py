"""The scores of a block of attention: some heads of some rows at a time, made, capped and masked in place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops.attention import cutting
from fastattn.ops.attention.contract import Inputs, Options
from fastattn.ops.attention.cutting import masks_of, visible_pairs
from fastattn.ops.attention.functions import on_torch as functions
from fastattn.ops.common.blocks import statistics_dtype
from fastattn.reference import distances, visibility
from fastattn.reference.attention import NEGATIVE_INFINITY


def compute_dtype(inputs: Inputs, options: Options) -> torch.dtype:
    """The dtype that a block is computed in, at least float32.

    Products of 16-bit tensors would round scores to 16 bits (by up to 0.06 at 30 in bfloat16) and overflow float16 at
    65504; torch's own kernel keeps them in float32 too. On a CPU the conversion costs large blocks a tenth of their
    time, and makes small ones three times as fast, since float16 and bfloat16 have no fast path there.
    """
    dtype = statistics_dtype(inputs.query.dtype)
    read = functions.read_by_score_mod(inputs, options) if options.score_mod else []
    for added in (inputs.bias, inputs.alibi_slopes, *read):
        if added is not None and added.is_floating_point():
            dtype = torch.promote_types(dtype, added.dtype)
    return dtype


class Scratch:
    """Memory for each of several uses, as large as the largest of its blocks so far."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._like, self._dtype = like, dtype
        self._memory: dict[str, Tensor] = {}

    def empty(self, use: str, *shape: int) -> Tensor:
        """An uninitialised tensor; what the same use had before is gone."""
        size = math.prod(shape)
        memory = self._memory.get(use)
        if memory is None or memory.numel() < size:
            memory = self._memory[use] = self._like.new_empty(size, dtype=self._dtype)
        return memory[:size].view(shape)

    def product(self, use: str, left: Tensor, right: Tensor) -> Tensor:
        """``left @ right``."""
        return torch.bmm(left, right, out=self.empty(use, left.shape[0], left.shape[1], right.shape[2]))


class Added(NamedTuple):
    """What is done to the scores of all heads of a block."""

    hidden: list[tuple[slice, Tensor]]  # 0 or -inf, to be added to the scores of these keys
    distances: Tensor | None  # [n, s], for ALiBi
    visible: Tensor | None  # [b | 1, H | 1, n, s], in the careful form, where nothing is hidden by an addition
    places: functions.Places | None  # for a score_mod


class Heads(NamedTuple):
    """Some heads of a block, and their key heads. None: all of them."""

    query: slice | None
    key: slice | None

    def of(self, tensor: Tensor) -> Tensor:
        """Of a tensor whose second axis is heads."""
        return tensor if self.query is None or tensor.shape[1] == 1 else tensor[:, self.query]

    def of_inputs(self, own: Inputs) -> Inputs:
        """Of those tensors of a block that have heads."""
        if self.query is None:
            return own
        names = ("query", "bias", "alibi_slopes", "sinks", "mask", "dropout_state")
        found: Any = {name: self.of(t) for name in names if (t := getattr(own, name)) is not None}
        return own._replace(**found)

    def of_keys(self, tensor: Tensor, keys: slice) -> Tensor:
        """Of ``[b * Hk, S, D]``, these keys."""
        return tensor[:, keys] if self.key is None else tensor[self.key, keys]

    def of_added(self, added: Added) -> Added:
        """What is done to the scores of these heads."""
        if self.query is None:
            return added
        hidden = [(keys, self.of(t)) for keys, t in added.hidden]
        visible = None if added.visible is None else self.of(added.visible)
        places = None if added.places is None else added.places.of_heads(self.query)
        return Added(hidden, added.distances, visible, places)


def turns(own: Inputs, kv_heads: int) -> Iterator[Heads]:
    """The heads of a block, as many at a time as may be at work."""
    batch, heads, rows = own.query.shape[:3]
    group = heads // kv_heads
    at_once = max(1, cutting.at_work() // max(1, group * rows * own.key.shape[2]))
    if batch > 1 or at_once >= kv_heads or own.query.device.type != "cpu":
        yield Heads(None, None)
        return
    for start in range(0, kv_heads, at_once):
        stop = min(start + at_once, kv_heads)
        yield Heads(slice(start * group, stop * group), slice(start, stop))


def heads_as_rows(tensor: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """``[B, H, n, D]`` as ``[B * Hk, H / Hk * n, D]``: the query heads of one key head under one another."""
    batch, heads, rows, size = tensor.shape
    return tensor.reshape(batch * kv_heads, heads // kv_heads * rows, size).to(dtype)


def added_to(own: Inputs, rules: Options, dtype: torch.dtype, places: functions.Places | None, careful: bool) -> Added:
    """What is done to the scores of a block."""
    rows, keys, device = own.query.shape[2], own.key.shape[2], own.query.device
    far = None
    if own.alibi_slopes is not None:
        far = distances(rows, keys, rules.shift, device).to(dtype)
    if careful:
        return Added([], far, visible_pairs(own, rules), places)
    hidden = []
    if rules.upper is not None:
        start = max(0, rules.upper + 1)  # the first key that the first row may not see
        if start < keys:
            prefix = None if own.prefix is None else own.prefix - start
            seen = visibility(rows, keys - start, upper=rules.upper - start, prefix=prefix, device=device)
            hidden.append((slice(start, keys), _hiding(seen, dtype)))
    if rules.lower is not None:
        stop = min(keys, rows - 1 + rules.lower)  # one past the last key that the last row may not see
        if stop > 0:
            seen = visibility(rows, stop, lower=rules.lower, prefix=own.prefix, device=device)
            hidden.append((slice(0, stop), _hiding(seen, dtype)))
    hidden += [(slice(0, keys), _hiding(seen, dtype)) for seen in masks_of(own)]
    return Added(hidden, far, None, places)


def _hiding(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What makes ``-inf`` of finite scores that are not visible, added to them."""
    # 1 - 1/x maps 1 to 0 and 0 to -inf
    return visible.view(torch.uint8).to(dtype).reciprocal_().neg_().add_(1)


class Scores(NamedTuple):
    """The scores of a block, and what its backward needs of their making."""

    scores: Tensor  # [b, h, n, s]
    bent: Tensor | None  # the hyperbolic tangent that capped them: from the product the slope has one rounding more
    unmodified: Tensor  # before a score_mod
    visible: Tensor | None  # in the careful form


def scores_of(
    queries: Tensor, keys: Tensor, own: Inputs, rules: Options, added: Added, scratch: Scratch, *, keeps: bool
) -> Scores:
    """The scores of queries that are scaled already, with everything that is added to them; hidden ones are ``-inf``.

    The careful form fills in ``-inf`` by what is visible; otherwise it is added, which is right while all scores are
    finite. If it ``keeps`` what a backward needs, that is not overwritten.
    """
    scores = scratch.product("scores", queries, keys.mT).view(*own.query.shape[:3], keys.shape[1])
    bent, visible = None, added.visible
    if rules.softcap is not None:
        bent = scores.div_(rules.softcap).tanh_()
        into = scratch.empty("capped", *bent.shape) if keeps else bent
        scores = torch.mul(bent, rules.softcap, out=into)
    unmodified = scores
    if added.places is not None:
        read = functions.read_by_score_mod(own, rules)
        scores = functions.modified(scores, added.places, rules.score_mod, read)
        visible = None if visible is None else visible & (scores != NEGATIVE_INFINITY)
    if own.bias is not None:
        scores.add_(own.bias if visible is None else own.bias.where(visible, 0))
    if own.alibi_slopes is not None and added.distances is not None:
        scores.addcmul_(own.alibi_slopes[..., None, None].to(scores.dtype), added.distances, value=-1.0)
    if visible is not None:
        scores.masked_fill_(~visible, NEGATIVE_INFINITY)
    for of_keys, hiding in added.hidden:
        scores[..., of_keys].add_(hiding)
    return Scores(scores, bent, unmodified, visible)
