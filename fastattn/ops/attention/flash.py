"""Tiles of rows through torch's fused CPU kernel, forward and backward, beyond what its public function has words for.

``F.scaled_dot_product_attention`` takes one mask for the whole call, computes the scores that the mask hides too, and
keeps its log-sum-exp to itself. The kernel behind it takes more: here it is called for each tile of rows over the keys
that some row of the tile may see, gives back its LSE, and its backward is handed an LSE that knows of more than the
keys. So windows, documents, padding, ALiBi and sinks, and whoever asks for the LSE, run and train at the kernel's
speed, in memory linear in the length.

What depends on key and query by their difference alone (causality, windows, ALiBi) needs no mask in memory: all tiles
see it as views of one vector, in which a step to the next key and a step to the row above are the same step. A step may
not be negative, so that the rows of such a tile are turned over.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops.attention import cutting
from fastattn.ops.attention.contract import Inputs, Options, statistics_shape
from fastattn.ops.attention.cutting import cut, keys_of_band, keys_of_masks, visible_pairs
from fastattn.ops.common.blocks import Block, empty_in_order_of, statistics_dtype
from fastattn.reference import distances
from fastattn.reference.attention import NEGATIVE_INFINITY

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# torch's kernel scales the products of query and key. Below this scale a product may overflow whose score matters.
LEAST_SCALE = 1e-6
# Up to this LSE, the log of 160 thousand equal weights, the kernel's backward has weights right to 7e-7.
_LARGEST_LSE = 12.0
# Lengths at which causality alone is faster in tiles: torch's kernel leaves out keys past the diagonal by 512, and from
# 768 rows on works on more rows at once.
_FEWEST_CAUSAL, _MOST_CAUSAL = 192, 767
# Elements of the float32 copies of 16-bit tensors that there are at once, for each thread.
_MOST_WIDE = 1 << 17
# Scores, for each thread, from which on 16 bits are evaluated in float32: below, looking for the way takes as long as
# the work.
_FEWEST_WIDE = {torch.bfloat16: 1 << 18, torch.float16: 1 << 15}
# Scores up to which bfloat16 trains in float32 where the processor multiplies vectors of bfloat16: a step of 2^15 takes
# 0.37 ms so, and 0.95 by the kernel's own backward, of 2^17 1.4 and 2.6, and of 2^21 22.4 and 18.6.
_MOST_WIDE_BFLOAT16 = 1 << 18
# Rows of a tile: an eighth of the keys that a row may see, within these bounds. With fewer rows more keys are left out,
# but a tile costs some 30 microseconds, and the kernel is faster over 256 rows than over 64.
_FEWEST_ROWS, _MOST_ROWS = 64, 256
# Under ALiBi, keys whose weight is less than e^-40 of their row's largest (e^-80 in float64) are left out: together
# they are less than the last digit. From e^-87 on weights are denormal numbers, with which products take five times as
# long.
_FARTHEST = {torch.float32: 40.0, torch.float64: 80.0}


def is_worth_tiles(length: int) -> bool:
    """Is causality alone faster in tiles, for so many rows and as many keys? Threads share a whole call better."""
    return _FEWEST_CAUSAL <= length <= _MOST_CAUSAL and torch.get_num_threads() == 1


def takes(inputs: Inputs, options: Options) -> bool:
    """Can tiles of the kernel make the output and the LSE of a call?"""
    query, key, value, bias = inputs.query, inputs.key, inputs.value, inputs.bias
    return (
        query.device.type == "cpu"
        and options.weights == "none"
        and options.softcap is None
        and not options.score_mod
        and inputs.dropout_state is None
        and options.scale >= LEAST_SCALE
        and query.numel() > 0
        and key.numel() > 0
        and query.shape[3] == value.shape[3]
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and all(
            t is None or torch.promote_types(t.dtype, torch.float32) == _mask_dtype(query)
            for t in (bias, inputs.alibi_slopes, inputs.sinks)
        )
    )


def takes_backward(inputs: Inputs, options: Options, lse: Tensor) -> bool:
    """Can they make the gradients of query, key, value and sinks, if the LSE has none?

    The kernel's backward makes the weights again from the LSE, whose rounding is their relative error: so it has to be
    small.
    """
    if not takes(inputs, options):
        return False
    low, high = lse.masked_fill(lse == NEGATIVE_INFINITY, 0.0).aminmax()
    return max(-low.item(), high.item()) <= _LARGEST_LSE


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Output and LSE of a call that :func:`takes`. Where hidden pairs hold NaN or inf the output is not finite."""
    query, sinks = inputs.query, inputs.sinks
    if widens(query.dtype, False, scores_of(query, inputs.key)):
        output, lse = _empty(query)
        for part in _parts(inputs, options):
            found = forward(_wide(part, inputs), part.of_options(options))
            part.of(output, _OF_HEADS).copy_(found[0]), part.of(lse, _OF_HEADS).copy_(found[1])
        return output, lse
    output = lse = None
    for tile in _tiles(inputs, options):
        is_whole = tile.rows.stop - tile.rows.start == query.shape[2]
        for group in _groups(inputs) if tile.keys is not None else ():
            of_query, key, value, mask = tile.operands(inputs, group)
            found = _forward(of_query, key, value, 0.0, tile.is_causal, attn_mask=mask, scale=options.scale)
            found, found_lse = tile.turned(found[0]), tile.turned(found[1])
            if is_whole and group.step == 1 and query.stride(1) <= query.stride(2):  # then it lies as the query does
                output, lse = found, found_lse.contiguous()
                continue
            if output is None or lse is None:
                output, lse = _empty(query)
            tile.rows_of(output, group).copy_(found), tile.rows_of(lse, group).copy_(found_lse)
        if output is None or lse is None:
            output, lse = _empty(query)
        if tile.keys is None:
            output[:, :, tile.rows].zero_(), lse[:, :, tile.rows].fill_(NEGATIVE_INFINITY)
        elif tile.blind is not None:  # the kernel has an LSE of 0 for them
            lse[:, :, tile.rows].masked_fill_(tile.blind, NEGATIVE_INFINITY)
    assert output is not None and lse is not None
    if sinks is not None:
        of_keys, lse = lse, torch.logaddexp(lse, sinks[..., None].to(lse.dtype))
        share = torch.sub(of_keys, lse).exp_().nan_to_num_(nan=0.0)  # NaN: neither keys nor a sink
        output.copy_(output * share[..., None])
    return output, lse


class _Part(NamedTuple):
    """Some heads of some batch entries, which are a call by themselves."""

    batch: slice
    heads: slice
    kv_heads: slice

    def of(self, tensor: Tensor, axes: Sequence[str]) -> Tensor:
        """Of a tensor with these first axes; those of size 1 broadcast and stay whole."""
        for axis, name in enumerate(axes):
            part = getattr(self, name)
            if part.stop - part.start != tensor.shape[axis] != 1:
                tensor = tensor.narrow(axis, part.start, part.stop - part.start)
        return tensor

    def of_options(self, options: Options) -> Options:
        """The options, by which a mask_mod is told the numbers of the batch entries."""
        return options._replace(first_batch=options.first_batch + self.batch.start)


_OF_HEADS = ("batch", "heads")
_OF_KEYS = ("batch", "kv_heads")
_AXES: dict[str, Sequence[str]] = {
    "query": _OF_HEADS,
    "key": _OF_KEYS,
    "value": _OF_KEYS,
    "bias": _OF_HEADS,
    "alibi_slopes": _OF_HEADS,
    "sinks": _OF_HEADS,
    "mask": _OF_HEADS,
    **dict.fromkeys(("key_padding_mask", "query_documents", "key_documents", "prefix"), ("batch",)),
}


def widens(dtype: torch.dtype, trains: bool, scores: float) -> bool:
    """Is the kernel faster over float32 than over this dtype, conversions included, for so many scores? It is over 16
    bits, by a fifth to a half forward and by 1.2 to 10 times backward, but where the processor has instructions that
    multiply them."""
    fewest, most = _widened(dtype, trains)
    return fewest * torch.get_num_threads() <= scores <= most


@functools.cache
def _widened(dtype: torch.dtype, trains: bool) -> tuple[float, float]:
    """How many scores a call has that runs in float32."""
    never, always = (1.0, 0.0), (0.0 if trains else _FEWEST_WIDE.get(dtype, 0.0), math.inf)
    if dtype == torch.float16:
        return never if _has("_is_amx_fp16_supported") or (not trains and _has_float16()) else always
    if dtype != torch.bfloat16 or _has("_is_amx_tile_supported"):
        return never
    if _has("_is_avx512_bf16_supported"):
        return (0.0, _MOST_WIDE_BFLOAT16) if trains else never
    return always


def scores_of(query: Tensor, key: Tensor) -> int:
    """How many scores a call of this query and key has, ``[B, H, L, D]`` and ``[B, Hk, S, D]``."""
    return query.shape[:3].numel() * key.shape[2]


def _has(question: str) -> bool:
    return bool(getattr(torch.cpu, question, lambda: False)())


def _has_float16() -> bool:
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except (AttributeError, RuntimeError):  # torch was built without that library
        return False


def _parts(inputs: Inputs, options: Options) -> Iterator[_Part]:
    """As much at a time as float32 copies are to hold: all of it, some batch entries, or some heads of one; but all
    heads of a call with a mask_mod, which is told their numbers."""
    (batch, heads, length, size), (kv_heads, keys) = inputs.query.shape, inputs.key.shape[1:3]
    of_head = size * (2 * keys + 2 * length * (heads // kv_heads))
    at_once = max(kv_heads if options.mask_mod else 1, _MOST_WIDE * torch.get_num_threads() // of_head)
    entries = max(1, at_once // kv_heads)
    at_once, group = min(at_once, kv_heads), heads // kv_heads
    for entry in range(0, batch, entries):
        for head in range(0, kv_heads, at_once):
            stop = min(head + at_once, kv_heads)
            of_entries = slice(entry, min(entry + entries, batch))
            yield _Part(of_entries, slice(head * group, stop * group), slice(head, stop))


def _wide(part: _Part, inputs: Inputs) -> Inputs:
    """A part as a call in float32."""
    found: Any = {
        name: part.of(tensor, axes) for name, axes in _AXES.items() if (tensor := getattr(inputs, name)) is not None
    }
    wide: Any = {name: found[name].float() for name in ("query", "key", "value")}
    return inputs._replace(**{**found, **wide})


class Gradients(NamedTuple):
    """What :func:`backward` makes."""

    d_query: Tensor
    d_key: Tensor
    d_value: Tensor
    d_sinks: Tensor | None  # None: there are no sinks


def backward(d_output: Tensor, output: Tensor, lse: Tensor, inputs: Inputs, options: Options) -> Gradients:
    """The gradients of a call that :func:`takes_backward`.

    Args:
        d_output: the gradient of the output.
        output: what :func:`forward` gave.
        lse: what :func:`forward` gave, the sinks' share included. With it the kernel makes the keys' weights beside a
            sink, and of the whole output it makes the right mean of their gradients: so it knows nothing of sinks.
        inputs: of the call.
        options: of the call.
    """
    query, key, value, sinks = inputs.query, inputs.key, inputs.value, inputs.sinks
    d_query = empty_in_order_of(query, tuple(query.shape))
    if widens(query.dtype, True, scores_of(query, key)):
        d_key, d_value = (empty_in_order_of(t, tuple(t.shape)) for t in (key, value))
        d_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=torch.float32)
        for part in _parts(inputs, options):
            d_rows, rows = (part.of(t, _OF_HEADS).float() for t in (d_output, output))
            made = backward(d_rows, rows, part.of(lse, _OF_HEADS), _wide(part, inputs), part.of_options(options))
            part.of(d_query, _OF_HEADS).copy_(made.d_query)
            part.of(d_key, _OF_KEYS).copy_(made.d_key), part.of(d_value, _OF_KEYS).copy_(made.d_value)
            if d_sinks is not None and made.d_sinks is not None:
                part.of(d_sinks, _OF_HEADS).add_(made.d_sinks)
        return Gradients(d_query, d_key, d_value, None if sinks is None or d_sinks is None else d_sinks.to(sinks.dtype))
    dtype = statistics_dtype(query.dtype)
    d_key, d_value = (empty_in_order_of(t, tuple(t.shape), dtype).zero_() for t in (key, value))
    # torch's kernel reads both as if the elements of a row lay side by side
    d_output, output = (t if t.stride(3) == 1 else t.contiguous() for t in (d_output, output))
    finite = lse.masked_fill(lse == NEGATIVE_INFINITY, 0.0)
    for tile in _tiles(inputs, options):
        if tile.keys is None:
            d_query[:, :, tile.rows].zero_()
            continue
        for group in _groups(inputs):
            of_query, of_key, of_value, mask = tile.operands(inputs, group)
            of_rows = (tile.turned(tile.rows_of(t, group)) for t in (d_output, output, finite))
            d_rows, output_rows, lse_rows = of_rows
            found = _backward(
                d_rows, of_query, of_key, of_value, output_rows, lse_rows, 0.0, tile.is_causal, attn_mask=mask,
                scale=options.scale,
            )  # fmt: skip
            tile.rows_of(d_query, group).copy_(tile.turned(found[0]))
            d_key[:, :, tile.keys].add_(found[1]), d_value[:, :, tile.keys].add_(found[2])
    d_sinks = None
    if sinks is not None:
        means = torch.linalg.vecdot(d_output.to(dtype), output.to(dtype))
        weight = torch.exp(sinks[..., None].to(dtype) - finite)
        d_sinks = -(weight * means).sum(dim=-1).sum_to_size(sinks.shape).to(sinks.dtype)
    return Gradients(d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_sinks)


def _empty(query: Tensor) -> tuple[Tensor, Tensor]:
    """Output and LSE, to be written."""
    lse = query.new_empty(statistics_shape(query, "torch"), dtype=statistics_dtype(query.dtype))
    return empty_in_order_of(query, tuple(query.shape)), lse


# ------------------------------------------------------------------------------------------------------------ the tiles


class _Tile(NamedTuple):
    """Some rows, the range of keys outside which they see nothing, and what is added to their scores."""

    rows: slice
    keys: slice | None  # None: they see no key
    mask: Tensor | None = None  # [B | 1, H | 1, n, s], floating
    is_turned: bool = False  # are the mask's rows in the opposite order?
    blind: Tensor | None = None  # [B | 1, H | 1, n], boolean: rows that see no key; None: there are none
    is_causal: bool = False  # in the place of a mask

    def operands(self, inputs: Inputs, group: slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query, key, value and mask of the heads of a group."""
        assert self.keys is not None
        mask = self.mask if self.mask is None or self.mask.shape[1] == 1 else self.mask[:, group]
        query = self.turned(self.rows_of(inputs.query, group))
        return query, inputs.key[:, :, self.keys], inputs.value[:, :, self.keys], mask

    def rows_of(self, tensor: Tensor, group: slice) -> Tensor:
        """The rows of the heads of a group, of a tensor ``[B, H, L, ...]``."""
        return tensor[:, group, self.rows]

    def turned(self, tensor: Tensor) -> Tensor:
        """A tensor of this tile's rows in the order of the mask's rows, or back."""
        return tensor.flip(2) if self.is_turned else tensor


def _groups(inputs: Inputs) -> Iterator[slice]:
    """Heads that have a key head each: as many groups as query heads share a key head."""
    size = inputs.query.shape[1] // inputs.key.shape[1]
    yield from (slice(start, None, size) for start in range(size))


def _tiles(inputs: Inputs, options: Options) -> Iterator[_Tile]:
    rules = (inputs.mask, inputs.key_padding_mask, inputs.query_documents, inputs.prefix, inputs.bias)
    by_values = any(rule is not None for rule in rules) or bool(options.mask_mod)
    length, keys = inputs.query.shape[2], inputs.key.shape[2]
    if options.lower is not None and options.upper is not None:
        keys = min(keys, max(1, options.upper - options.lower + 1))
    step = min(_MOST_ROWS, max(_FEWEST_ROWS, keys // 8 // _FEWEST_ROWS * _FEWEST_ROWS))
    if by_values:
        step = min(step, max(1, cutting.BLOCK_ELEMENTS // _elements_of_row(inputs)))
    is_causal = options.lower is None and options.upper == 0 and inputs.alibi_slopes is None
    if is_causal and not by_values and length == inputs.key.shape[2] and not is_worth_tiles(length):
        yield _Tile(slice(0, length), slice(0, length), is_causal=True)
        return
    vector = None if by_values else by_difference(inputs, options)
    if vector is None and not by_values:
        step = length
    # the last rows first, which see most keys under causality: what they take is there for the others
    for start in reversed(range(0, length, step)):
        block = Block(slice(0, inputs.query.shape[0]), slice(start, min(start + step, length)), slice(0, 0))
        block = block._replace(keys=slice(0, inputs.key.shape[2]))
        block = block._replace(keys=keys_of_band(inputs, options, block, looks=True))
        if block.keys.start >= block.keys.stop:
            yield _Tile(block.rows, None)
        elif by_values:
            yield _by_values(block, inputs, options)
        else:
            yield _by_rule(block, vector, inputs, options)


def _elements_of_row(inputs: Inputs) -> int:
    """How many elements the mask of one row has."""
    (batch, heads), keys = inputs.query.shape[:2], inputs.key.shape[2]
    by_entry = (inputs.key_padding_mask, inputs.query_documents, inputs.prefix)
    tensors = [t for t in (inputs.mask, inputs.bias, *by_entry, inputs.alibi_slopes) if t is not None]
    by_head = [t for t in (inputs.mask, inputs.bias, inputs.alibi_slopes) if t is not None]
    of_entries = batch if any(t.shape[0] == batch for t in tensors) else 1
    return of_entries * (heads if any(t.shape[1] == heads for t in by_head) else 1) * keys


def _by_values(block: Block, inputs: Inputs, options: Options) -> _Tile:
    """A tile whose mask has to be looked at."""
    keys = keys_of_masks(inputs, options, block)
    if keys.start >= keys.stop:
        return _Tile(block.rows, None)
    block = block._replace(keys=keys)
    own, rules = cut(block, inputs, options)
    visible = visible_pairs(own, rules)
    seen = visible.view(torch.uint8)
    mask, dtype = None, _mask_dtype(inputs.query)
    if not seen.amin():
        mask = seen.to(dtype).reciprocal_().neg_().add_(1)  # 1 - 1/x maps 1 to 0 and 0 to -inf
    added = own.bias
    if own.alibi_slopes is not None:
        far = distances(visible.shape[2], visible.shape[3], rules.shift, visible.device).to(dtype)
        alibi = own.alibi_slopes[..., None, None].to(dtype) * -far
        added = alibi if added is None else added + alibi
    if added is not None:
        mask = added.to(dtype) if mask is None else torch.where(visible, added, NEGATIVE_INFINITY).to(dtype)
    blind = seen.amax(dim=3) == 0
    return _Tile(block.rows, block.keys, mask, False, blind if bool(blind.any()) else None)


def _by_rule(block: Block, vector: Tensor | None, inputs: Inputs, options: Options) -> _Tile:
    """A tile whose mask is a view of the vector of differences."""
    (start, stop), keys = (block.rows.start, block.rows.stop), block.keys
    lower, upper, rows = options.lower, options.upper, block.rows
    sees_all = (upper is None or keys.stop - 1 - start <= upper) and (lower is None or keys.start - (stop - 1) >= lower)
    if vector is None or (sees_all and inputs.alibi_slopes is None):
        return _Tile(rows, keys)
    first = keys.start - (stop - 1)  # the difference of the first key and the last row
    shape = (*vector.shape[:2], stop - start, keys.stop - keys.start)
    mask = vector.as_strided(shape, (*vector.stride()[:2], 1, 1), first + inputs.query.shape[2] - 1)
    blind, last = None, inputs.key.shape[2] - 1
    if (upper is not None and start + upper < 0) or (lower is not None and stop - 1 + lower > last):
        row = torch.arange(start, stop, device=mask.device)
        blind = torch.zeros(stop - start, dtype=torch.bool, device=mask.device)
        blind |= False if upper is None else row + upper < 0
        blind |= False if lower is None else row + lower > last
    if mask.numel() <= 2 * inputs.query[:, :, rows].numel():  # less to turn over than what goes in and comes out
        return _Tile(rows, keys, mask.flip(2), False, blind)
    return _Tile(rows, keys, mask, True, blind)


def by_difference(inputs: Inputs, options: Options) -> Tensor | None:
    """What is added to the score of a key that stands ``d`` behind its query, ``[B | 1, H | 1, L + S - 1]``, for ``d``
    from ``-(L - 1)`` on; None where nothing is."""
    length, keys, slopes = inputs.query.shape[2], inputs.key.shape[2], inputs.alibi_slopes
    dtype, lower, upper = _mask_dtype(inputs.query), options.lower, options.upper
    device = inputs.query.device
    if slopes is not None:
        far = torch.arange(1 - length - options.shift, keys - options.shift, dtype=dtype, device=device).abs_()
        found = slopes.to(dtype).neg()[..., None] * far
        steepest = slopes.amax().item()
        if steepest * (length + keys) > _FARTHEST[dtype] and _stands_at_a_key(inputs, options):
            farthest = _FARTHEST[dtype] + 2.0 * _largest_score(inputs, options)
            found.masked_fill_(found < -farthest, NEGATIVE_INFINITY)
    elif lower is None and upper is None:
        return None
    else:
        found = torch.zeros(1, 1, length + keys - 1, dtype=dtype, device=device)
    if lower is not None and lower > 1 - length:
        found[..., : lower + length - 1].fill_(NEGATIVE_INFINITY)
    if upper is not None and upper < keys - 1:
        found[..., max(0, upper + length) :].fill_(NEGATIVE_INFINITY)
    return found


def _stands_at_a_key(inputs: Inputs, options: Options) -> bool:
    """Does every row see the key at which it stands, whose ALiBi is zero, and is no slope negative?"""
    lower, upper, shift, slopes = options.lower, options.upper, options.shift, inputs.alibi_slopes
    return (
        shift >= 0
        and inputs.query.shape[2] + shift <= inputs.key.shape[2]
        and (lower is None or lower <= shift)
        and (upper is None or upper >= shift)
        and (slopes is None or slopes.amin().item() >= 0.0)
    )


def _largest_score(inputs: Inputs, options: Options) -> float:
    """No product of query and key is larger."""
    dtype = statistics_dtype(inputs.query.dtype)
    query, key = (torch.linalg.vector_norm(t, dim=3, dtype=dtype).amax().item() for t in (inputs.query, inputs.key))
    found = query * key * options.scale
    return found if math.isfinite(found) else math.inf


def _mask_dtype(query: Tensor) -> torch.dtype:
    """Of what is added to scores: torch takes float32 beside 16 bits."""
    return statistics_dtype(query.dtype)
