"""A call on shards, and its parts: some of this rank's queries against some of one rank's keys.

A part is a call of attention by itself. Where its queries and keys are equally far apart in the sequence, causality,
windows and prefixes are bounds again, counted in tokens of the part: query ``i`` of the part stands at position
``q + step * i``, key ``j`` at ``k + step * j``, so that ``j <= i + floor((q - k + upper) / step)`` says the same as the
bound ``upper`` of the whole call.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.distributed import exchange, functions
from fastattn.distributed.layout import Balance, Piece, Place, pieces
from fastattn.ops.attention import dropout, partial
from fastattn.ops.attention.contract import Inputs, Kept, Needs, Options
from fastattn.ops.common.blocks import statistics_dtype

# Pairs of ranks that are looked at at once, so that memory does not grow with the square of their number.
_MOST_PAIRS = 1 << 20


class Shard(NamedTuple):
    """What of the keys of one rank every part needs."""

    key: Tensor  # [B, Hk, n, D]
    value: Tensor  # [B, Hk, n, Dv]
    key_padding_mask: Tensor | None  # [B, n]
    key_documents: Tensor | None  # [B | 1, n]


class Done(NamedTuple):
    """What the forward of a method makes: results of this rank's rows, and what its backward is to get."""

    output: Tensor  # [B, H, n, Dv], in the query's dtype
    lse: Tensor  # [B, H, n]
    inputs: Inputs
    kept: Kept


class Span(NamedTuple):
    """The smallest and the largest number of a document in a piece of a shard; or tensors of those of many ranks."""

    least: Any
    most: Any

    def meets(self, other: Span) -> Any:
        """May both hold tokens of one document?"""
        return (self.least <= other.most) & (other.least <= self.most)


@dataclasses.dataclass(frozen=True)
class Run:
    """A call, as far as all ranks know it.

    Attributes:
        place: of this process.
        balance: which tokens each rank has.
        rows: queries on each rank.
        keys: keys on each rank.
        options: of the whole sequence: bounds and shift count its positions.
        longest_prefix: keys that every query sees, at most.
        query_spans: for each rank, the documents of the pieces of its queries; None where there are no documents.
        key_spans: the same of its keys.
        heads: of the queries.
        kv_heads: of the keys.
        first_head: which of all heads the first of ``inputs`` is, where a rank has some of them.
        heads_for: the ranks along which heads are shared out beside the sequence; None: they are not.
        mask_axes: does the additive or boolean mask have an axis of heads, and one of this rank's rows? An axis that it
            has not is of size 1, and it holds for all of them.
    """

    place: Place
    balance: Balance
    rows: int
    keys: int
    heads: int
    kv_heads: int
    mask_axes: tuple[bool, bool]
    options: Options
    longest_prefix: int
    query_spans: tuple[tuple[Span | None, ...], ...] | None
    key_spans: tuple[tuple[Span | None, ...], ...] | None
    first_head: int = 0
    heads_for: Place | None = None

    def row_pieces(self, rank: Any) -> tuple[Piece, ...]:
        """The pieces of a rank's queries; of a tensor of ranks, those of each."""
        return pieces(rank, self.place.world, self.rows, self.balance)

    def key_pieces(self, rank: Any) -> tuple[Piece, ...]:
        """The pieces of a rank's keys, likewise."""
        return pieces(rank, self.place.world, self.keys, self.balance)

    def pairs(self, rank: int, owner: int) -> Iterator[tuple[Piece, Piece, bool]]:
        """The pieces of a rank's queries, each with each of another's keys, and whether some query may see some key,
        as far as bounds and the numbers of documents tell."""
        for row_number, of_rows in enumerate(self.row_pieces(rank)):
            for key_number, of_keys in enumerate(self.key_pieces(owner)):
                seen = is_seen(of_rows, of_keys, self.options, self.longest_prefix)
                if self.query_spans is not None and self.key_spans is not None:
                    spans = self.query_spans[rank][row_number], self.key_spans[owner][key_number]
                    seen = seen and (spans[0] is not None and spans[1] is not None and spans[0].meets(spans[1]))
                yield of_rows, of_keys, seen


def reaches(run: Run) -> tuple[int, ...]:
    """For each rank, how many steps its keys go round a ring: as far as some rank needs them."""
    # without the group, which what is remembered would keep alive
    return _reaches(dataclasses.replace(run, place=Place(None, 0, run.place.world), heads_for=None))


@functools.lru_cache(maxsize=64)
def _reaches(run: Run) -> tuple[int, ...]:
    world = run.place.world
    everybody, found = torch.arange(world, device="cpu"), []
    for owners in everybody.split(max(1, _MOST_PAIRS // world)):
        seen = torch.zeros(len(owners), world, dtype=torch.bool, device="cpu")
        rows, keys = run.row_pieces(everybody), run.key_pieces(owners[:, None])
        for (row_number, of_rows), (key_number, of_keys) in itertools.product(enumerate(rows), enumerate(keys)):
            of_pair = is_seen(of_rows, of_keys, run.options, run.longest_prefix)
            if run.query_spans is not None and run.key_spans is not None:
                queried = _spans_of_ranks(run.query_spans, row_number)
                kept = _spans_of_ranks(run.key_spans, key_number)
                of_pair = of_pair & queried.meets(Span(*(edges[owners, None] for edges in kept)))
            seen |= of_pair
        steps = (everybody - owners[:, None]) % world
        found += (steps * seen).amax(dim=1).tolist()
    return tuple(found)


def _spans_of_ranks(spans: tuple[tuple[Span | None, ...], ...], number: int) -> Span:
    """The spans of one piece of every rank; one that holds no token meets none."""
    nothing = Span(torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min)
    edges = torch.tensor([of_rank[number] or nothing for of_rank in spans], dtype=torch.int64, device="cpu")
    return Span(*edges.unbind(dim=1))


# ------------------------------------------------------------------------------------------------------ bounds of parts


def bounds(of_rows: Piece, of_keys: Piece, options: Options) -> tuple[Any, Any, Any]:
    """``lower``, ``upper`` and ``shift`` of a part; tensors where pieces are those of many ranks."""
    step, apart = of_rows.step, of_rows.first - of_keys.first
    assert step == of_keys.step or of_rows.tokens == 1 or of_keys.tokens == 1
    lower = None if options.lower is None else -((-options.lower - apart) // step)
    upper = None if options.upper is None else (options.upper + apart) // step
    return lower, upper, (options.shift + apart) // step


def is_seen(of_rows: Piece, of_keys: Piece, options: Options, longest_prefix: int) -> Any:
    """Do the bounds let some query of a part see some key? Of the pieces of many ranks at once a boolean tensor."""
    lower, upper, _ = bounds(of_rows, of_keys, options)
    seen: Any = True
    if upper is not None:  # the last row has a last key
        seen = seen & (-upper <= of_rows.tokens - 1)
    if lower is not None:  # the first key of the first row is there
        seen = seen & (lower <= of_keys.tokens - 1)
    if lower is not None and upper is not None:  # some row of those between has both
        seen = seen & (lower <= upper) & (-upper <= of_keys.tokens - 1 - lower)
    return seen | (longest_prefix > of_keys.first)


# ---------------------------------------------------------------------------------------------------------------- parts


def part_of(run: Run, inputs: Any, shard: Shard, of_rows: Piece, of_keys: Piece) -> tuple[Any, Options]:
    """The call that a part is by itself.

    Args:
        run: the call.
        inputs: of this rank. ``bias`` and ``mask`` have its rows, and the keys of the whole sequence in their order;
            ``dropout_state`` is that of the whole sequence.
        shard: of the keys' rank.
        of_rows: a piece of this rank's queries.
        of_keys: a piece of the shard.
    """
    lower, upper, shift = bounds(of_rows, of_keys, run.options)
    prefix = inputs.prefix
    if prefix is not None:
        prefix = ((prefix - of_keys.first + of_keys.step - 1) // of_keys.step).clamp_(min=0)
    # bounds that hide nothing are left out, for the sake of backends that know a faster way without them
    lower = None if lower is not None and lower + of_rows.tokens - 1 <= 0 else lower
    upper = None if upper is not None and upper >= of_keys.tokens - 1 else upper
    rows, keys = of_rows.local, of_keys.local
    padding, documents = shard.key_padding_mask, inputs.query_documents
    own = Inputs(
        query=inputs.query[:, :, rows],
        key=shard.key[:, :, keys],
        value=shard.value[:, :, keys],
        bias=place_in_mask(inputs.bias, of_rows, of_keys),
        alibi_slopes=inputs.alibi_slopes,
        sinks=None,
        mask=place_in_mask(inputs.mask, of_rows, of_keys),
        key_padding_mask=None if padding is None else padding[:, keys],
        query_documents=None if documents is None else documents[:, rows],
        key_documents=None if shard.key_documents is None else shard.key_documents[:, keys],
        prefix=None if lower is upper is None else prefix,
        dropout_state=kept_weights(run, inputs, of_rows, of_keys),
    )
    own = functions.at(own, inputs, run.options, run.first_head, of_rows, of_keys)
    return own, run.options._replace(lower=lower, upper=upper, shift=shift)


def place_in_mask(mask: Tensor | None, of_rows: Piece, of_keys: Piece) -> Tensor | None:
    """A part of ``[B | 1, H | 1, rows | 1, all keys | 1]``, as a view; axes of size 1 stay."""
    if mask is None:
        return None
    if mask.shape[2] != 1:
        mask = mask[:, :, of_rows.local]
    return mask if mask.shape[3] == 1 else mask[..., of_keys.positions]


def kept_weights(run: Run, inputs: Inputs, of_rows: Piece, of_keys: Piece) -> Tensor | None:
    """Boolean ``[B, H, rows, keys]``: the weights of a part that dropout keeps, as it would in one process."""
    state, rows, keys = inputs.dropout_state, of_rows.positions, of_keys.positions
    if state is None:
        return None
    batch, heads = inputs.query.shape[:2]
    own_heads = slice(run.first_head, run.first_head + heads)
    if not dropout.is_seed(state):
        return state[:, own_heads, rows, keys]
    spans = (slice(span.start, span.stop) for span in (rows, keys))
    drawn = dropout.kept(state, run.options.dropout_p, run.heads, slice(0, batch), *spans)
    return drawn[:, own_heads, :: rows.step, :: keys.step]


# ---------------------------------------------------------------------------------------------- what parts are added to


def forward_part(merge: partial.Merge, run: Run, inputs: Inputs, shard: Shard, of_rows: Piece, of_keys: Piece) -> None:
    """Compute a part, and merge it into its rows."""
    output, lse = partial.forward(*part_of(run, inputs, shard, of_rows, of_keys))
    merge.add(output, lse, of_rows.local)


class Sums:
    """The gradients of this rank's inputs but key and value, added up over parts, at least in float32.

    Args:
        inputs: of this rank.
        needs: which optional gradients there are to be.
    """

    def __init__(self, inputs: Any, needs: Any) -> None:
        self._inputs = inputs
        self.d_query = _zeros(inputs.query)
        asked = [name.removeprefix("needs_d_") for name in needs._fields if name.startswith("needs_d_")]
        self._asked = [name for name in asked if getattr(needs, f"needs_d_{name}")]
        # sinks belong to whole rows, and not to parts
        self._totals = {name: _zeros(getattr(inputs, name)) for name in self._asked if name != "sinks"}

    def add(self, found: Any, of_rows: Piece, of_keys: Piece) -> None:
        """The gradients of one part."""
        self.d_query[:, :, of_rows.local] += found.d_query
        for name, total in self._totals.items():
            own = place_in_mask(total, of_rows, of_keys) if name == "bias" else total
            assert own is not None
            own += getattr(found, f"d_{name}")

    def finish(self, row: partial.Row, d_key: Tensor, d_value: Tensor) -> Any:
        """The gradients in the inputs' dtypes; those that are not needed are empty."""
        inputs, found = self._inputs, {"query": self.d_query, "key": d_key, "value": d_value, **self._totals}
        if "sinks" in self._asked:
            found["sinks"] = partial.sink_gradients(inputs.sinks, row)
        kind, nothing = functions.gradients_of(inputs), self.d_query.new_empty(0)
        names = (field.removeprefix("d_") for field in kind._fields)
        return kind(*(found[n].to(getattr(inputs, n).dtype) if n in found else nothing for n in names))


def backward_part(
    sums: Sums,
    row: partial.Row,
    needs: Needs,
    run: Run,
    inputs: Inputs,
    shard: Shard,
    of_rows: Piece,
    of_keys: Piece,
) -> tuple[Tensor, Tensor]:
    """Add the gradients of a part; return those of its keys and values."""
    own, rules = part_of(run, inputs, shard, of_rows, of_keys)
    found = partial.backward(row.rows(of_rows.local), needs, own, rules)
    sums.add(found, of_rows, of_keys)
    return found.d_key, found.d_value


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=statistics_dtype(tensor.dtype), device=tensor.device)


def seen_pairs(run: Run, owner: int) -> list[tuple[Piece, Piece]]:
    """The pieces of this rank's queries and another's keys that are to be computed; all of them are counted."""
    found = []
    for of_rows, of_keys, seen in run.pairs(run.place.rank, owner):
        exchange.count_part(seen)
        if seen:
            found.append((of_rows, of_keys))
    return found
