"""Context parallelism by a ring: keys go from rank to rank, and each rank computes on those it has (arXiv:2310.01889).

While a rank computes on one shard of keys, the next one is on its way to it. A shard goes only as far round the ring as
some rank still needs it, which bounds and documents tell every rank alike: under causality half of the way on average,
and within a window a few steps. In the backward the gradients of a shard travel with it, one step behind; the last rank
that adds to them sends them home.

A rank meets the shards in the order of its own number, then downward: outputs are merged, and gradients added, in that
order in every run, whenever messages arrive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.distributed import exchange
from fastattn.distributed.parts import Done, Run, Shard, Sums, backward_part, forward_part, reaches, seen_pairs
from fastattn.ops.attention import partial
from fastattn.ops.attention.contract import InputGradients, Inputs, Kept, Needs, OutputGradients
from fastattn.ops.common.blocks import statistics_dtype

# Keys and gradients travel between the same ranks, and may overtake one another.
_OF_KEYS, _OF_GRADIENTS = 0, 1


class _Ring:
    """The shards of keys, as they come by.

    Args:
        run: the call.
        inputs: of this rank.
    """

    def __init__(self, run: Run, inputs: Inputs) -> None:
        self.run, self.rank, self.world = run, run.place.rank, run.place.world
        self.next, self.previous = (self.rank + 1) % self.world, (self.rank - 1) % self.world
        self._like = [inputs.key[None], inputs.value[None]]
        self._message = exchange.packed(self._like)
        # Masks of keys are small, and all ranks get them at once.
        present = [t for t in (inputs.key_padding_mask, inputs.key_documents) if t is not None]
        gathered = iter(exchange.all_gather(present, run.place) if present else ())
        self._padding = None if inputs.key_padding_mask is None else next(gathered)
        self._documents = None if inputs.key_documents is None else next(gathered)
        self._reach = reaches(run)
        self._pending: exchange.Pending | None = None
        self._coming: Tensor | None = None

    def owner(self, step: int) -> int:
        """Whose keys are here in a step."""
        return (self.rank - step) % self.world

    def is_here(self, step: int) -> bool:
        """Do these keys come as far as here?"""
        return step < self.world and step <= self._reach[self.owner(step)]

    def is_last(self, step: int) -> bool:
        """Is this the last rank that they come to?"""
        return step == self._reach[self.owner(step)]

    def reach(self) -> int:
        """How many steps this rank's own keys go."""
        return self._reach[self.rank]

    def keys_of(self, step: int) -> Shard | None:
        """The keys that are here in a step, of which the steps follow one another; None: they do not come so far.

        The next ones are on their way when this returns.
        """
        if step:
            if self._pending is not None:
                self._pending.wait()
            if self._coming is not None:
                self._message = self._coming
        sent, received, self._coming = [], [], None
        if self.is_here(step) and not self.is_last(step):
            sent = [(self._message, self.next)]
        if self.is_here(step + 1):
            self._coming = torch.empty_like(self._message)
            received = [(self._coming, self.previous)]
        what = f"step {step + 1} of the ring"
        self._pending = exchange.start(sent, received, self.run.place, what, tag=_OF_KEYS)
        if not self.is_here(step):
            return None
        key, value = (t[0] for t in exchange.unpacked(self._message, self._like))
        owner = self.owner(step)
        masks = (t if t is None else t[owner] for t in (self._padding, self._documents))
        return Shard(key, value, *masks)


def forward(run: Run, inputs: Inputs) -> Done:
    """This rank's rows."""
    ring, merge = _Ring(run, inputs), partial.Merge(inputs.query, inputs.value.shape[3])
    for step in range(run.place.world):
        shard = ring.keys_of(step)
        for of_rows, of_keys in seen_pairs(run, ring.owner(step)):
            assert shard is not None
            forward_part(merge, run, inputs, shard, of_rows, of_keys)
    output, lse = merge.finish(inputs.sinks)
    output = output.to(inputs.query.dtype)
    return Done(output, lse, inputs, Kept(output, lse))


def backward(run: Run, gradients: OutputGradients, kept: Kept, needs: Needs, inputs: Inputs) -> InputGradients:
    """The gradients of the inputs; of those that all ranks have alike this rank's share."""
    row = partial.row_of(gradients, kept)
    sums, ring, place = Sums(inputs, needs), _Ring(run, inputs), run.place
    dtype = statistics_dtype(inputs.query.dtype)
    sizes = inputs.key.numel(), inputs.value.numel()
    # the gradients of keys and values, one behind the other: of the shard that is here, and of this rank's own
    coming: Tensor | None = None
    home: Tensor | None = None
    pending: exchange.Pending | None = None
    going: list[exchange.Pending] = []
    for step in range(place.world):
        shard = ring.keys_of(step)
        total = inputs.query.new_zeros(sum(sizes), dtype=dtype)
        d_key, d_value = (t.view(like.shape) for t, like in zip(total.split(sizes), (inputs.key, inputs.value)))
        for of_rows, of_keys in seen_pairs(run, ring.owner(step)):
            assert shard is not None
            found = backward_part(sums, row, needs, run, inputs, shard, of_rows, of_keys)
            for into, share in zip((d_key, d_value), found):
                into[:, :, of_keys.local] += share
        if pending is not None:
            pending.wait()
        if coming is not None:
            total += coming  # what the ranks before have added, in the order of the ring
        sent, received, coming = [], [], None
        if ring.is_here(step):
            if not ring.is_last(step):
                sent = [(total, ring.next)]
            elif step:
                sent = [(total, ring.owner(step))]
            else:
                home = total
        if ring.is_here(step + 1):
            coming = torch.empty_like(total)
            received.append((coming, ring.previous))
        if step and step == ring.reach():
            home = torch.empty_like(total)
            received.append((home, (ring.rank + step) % place.world))
        what = f"step {step + 1} of the ring's gradients"
        pending = exchange.start(sent, received, place, what, tag=_OF_GRADIENTS)
        going.append(pending)
    for each in going:
        each.wait()
    assert home is not None
    d_key, d_value = (t.view(like.shape) for t, like in zip(home.split(sizes), (inputs.key, inputs.value)))
    return sums.finish(row, d_key, d_value)
