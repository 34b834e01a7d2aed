"""Context parallelism by all-gather: every rank gets all keys, and computes its own rows (arXiv:2407.21783, 3.3.2).

One exchange forward, two backward: keys are gathered again, which keeps memory between the passes to a shard, and each
rank sends every other the share that it has in the gradients of that one's keys.
"""

from __future__ import annotations

from typing import Any

import torch

from fastattn.distributed import exchange
from fastattn.distributed.layout import Piece, in_order, out_of_order
from fastattn.distributed.parts import Done, Run, Shard, Sums, backward_part, forward_part, is_seen, seen_pairs
from fastattn.ops.attention import partial
from fastattn.ops.attention.contract import InputGradients, Inputs, Kept, Needs, OutputGradients
from fastattn.ops.common.blocks import statistics_dtype

# The rank of some keys, or None of all together; these keys; which pieces of queries and of them are to be computed.
_Shards = tuple[int | None, Shard, list[tuple[Piece, Piece]]]


def forward(run: Run, inputs: Inputs) -> Done:
    """This rank's rows."""
    merge = partial.Merge(inputs.query, inputs.value.shape[3])
    for _, shard, pairs in _shards(run, inputs):
        for of_rows, of_keys in pairs:
            forward_part(merge, run, inputs, shard, of_rows, of_keys)
    output, lse = merge.finish(inputs.sinks)
    output = output.to(inputs.query.dtype)
    return Done(output, lse, inputs, Kept(output, lse))


def backward(run: Run, gradients: OutputGradients, kept: Kept, needs: Needs, inputs: Inputs) -> InputGradients:
    """The gradients of the inputs; of those that all ranks have alike this rank's share."""
    row = partial.row_of(gradients, kept)
    sums = Sums(inputs, needs)
    world, dtype = run.place.world, statistics_dtype(inputs.query.dtype)
    d_key, d_value = (t.new_zeros((world, *t.shape), dtype=dtype) for t in (inputs.key, inputs.value))
    for owner, shard, pairs in _shards(run, inputs):
        if owner is None:
            d_whole = [torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (shard.key, shard.value)]
        else:
            d_whole = [d_key[owner], d_value[owner]]
        for of_rows, of_keys in pairs:
            found = backward_part(sums, row, needs, run, inputs, shard, of_rows, of_keys)
            for total, share in zip(d_whole, found):
                total[:, :, of_keys.local] += share
        if owner is None:
            d_key, d_value = (out_of_order(t, 2, world, run.balance) for t in d_whole)
    return sums.finish(row, exchange.sum_over_ranks(d_key, run.place), exchange.sum_over_ranks(d_value, run.place))


def _shards(run: Run, inputs: Inputs) -> list[_Shards]:
    """The keys of all ranks, and the pieces of this rank's queries and of them that see one another: all keys at once
    in the order of the sequence, without an owner, or shard by shard where stripes leave no other bounds."""
    own = Shard(inputs.key, inputs.value, inputs.key_padding_mask, inputs.key_documents)
    present = [t for t in own if t is not None]
    gathered = iter(exchange.all_gather(present, run.place))
    everything: list[Any] = [None if t is None else next(gathered) for t in own]
    if run.balance == "stripe":
        found: list[_Shards] = []
        for rank in range(run.place.world):
            shard: Any = [t if t is None else t[rank] for t in everything]
            found.append((rank, Shard(*shard), seen_pairs(run, rank)))
        return found
    dims = (2, 2, 1, 1)
    whole: Any = [t if t is None else in_order(list(t), dim, run.balance) for t, dim in zip(everything, dims)]
    keys = run.keys * run.place.world
    of_keys = Piece(slice(0, keys), 0, 1)
    pairs = []
    for of_rows in run.row_pieces(run.place.rank):
        seen = is_seen(of_rows, of_keys, run.options, run.longest_prefix)
        exchange.count_part(seen)
        if seen:
            pairs.append((of_rows, of_keys))
    return [(None, Shard(*whole), pairs)]
