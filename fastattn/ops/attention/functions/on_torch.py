"""Programs on a block of scores in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops.attention.contract import Options
from fastattn.ops.attention.functions.contract import slots
from fastattn.ops.attention.functions.program import Program, View
from fastattn.ops.attention.functions.writing import INDICES
from fastattn.ops.common.blocks import Block


class Places(NamedTuple):
    """Where the pairs of a block stand: batch entries, heads, rows and keys, int32, shaped to broadcast to ``[b, H, n,
    s]``; and the first of each."""

    batch: Tensor
    head: Tensor
    query_index: Tensor
    key_index: Tensor
    starts: tuple[int, int, int, int]

    @property
    def indices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What programs take."""
        return self.batch, self.head, self.query_index, self.key_index

    def of_heads(self, heads: slice) -> Places:
        """Of some of the heads."""
        batch, head, row, key = self.starts
        return self._replace(head=self.head[:, heads], starts=(batch, head + heads.start, row, key))


def places_of(block: Block, heads: int, options: Options, device: torch.device) -> Places:
    """The places of a block."""
    parts = (block.batch, options.first_batch), (slice(0, heads), 0), (block.rows, options.first_row)
    parts = *parts, (block.keys, options.first_key)
    batch, head, rows, keys = (_numbers(part, first, device) for part, first in parts)
    starts = tuple(part.start + first for part, first in parts)
    return Places(
        batch[:, None, None, None], head[None, :, None, None], rows[None, None, :, None], keys[None, None, None, :],
        (starts[0], starts[1], starts[2], starts[3]),
    )  # fmt: skip


def _numbers(part: slice, first: int, device: torch.device) -> Tensor:
    return torch.arange(part.start + first, part.stop + first, dtype=torch.int32, device=device)


def read_by_score_mod(inputs: Any, options: Options) -> list[Tensor]:
    """The tensors that a call's score_mod reads, of the operators' inputs."""
    return [getattr(inputs, name) for name in slots(options.score_mod, options.mask_mod).score_mod]


def read_by_mask_mod(inputs: Any, options: Options) -> list[Tensor]:
    """The tensors that a call's mask_mod reads, of the operators' inputs."""
    return [getattr(inputs, name) for name in slots(options.score_mod, options.mask_mod).mask_mod]


def modified(scores: Tensor, places: Places, text: str, read: Sequence[Tensor]) -> Tensor:
    """The scores of a block behind a score_mod, in their dtype; a tensor of its own, which may be written to."""
    found = evaluated(Program.of(text), (scores,), places, read).to(scores.dtype)
    is_own = found.shape == scores.shape and found is not scores
    return found if is_own else found.expand(scores.shape).clone()


def narrowed(places: Places, names: Sequence[str]) -> Places:
    """The places of the indices that are named, and a single place of each of the others, on which nothing depends."""
    found = [
        p if name in names else p.narrow(axis, 0, min(1, p.shape[axis]))
        for axis, (name, p) in enumerate(zip(INDICES, places.indices))
    ]
    return Places(found[0], found[1], found[2], found[3], places.starts)


def evaluated(program: Program, leading: Sequence[Tensor], places: Places, read: Sequence[Tensor]) -> Any:
    """What a program makes of the ``leading`` arguments, of places, and of what it reads.

    A tensor that is read at plain indices (``bias[head, query_index, key_index]``) is a view here: an index would copy
    its elements one by one.
    """
    views = [view_of(read[view.captured], view, places) for view in program.views]
    function = program.on_views.function if views else program.function
    return function(*leading, *places.indices, *read, *views)


def view_of(tensor: Tensor, view: View, places: Places) -> Tensor:
    """The elements of a tensor at plain indices, shaped to broadcast to the block.

    Raises:
        IndexError: the block passes the end of an axis.
    """
    order: list[int] = []
    for axis, name in enumerate(view.indices):
        number = INDICES.index(name)
        start, length = places.starts[number], places.indices[number].shape[number]
        if start + length > tensor.shape[axis]:
            raise IndexError(
                f"index {start + length - 1} is out of bounds for dimension {axis} with size {tensor.shape[axis]}: "
                f"a function reads a tensor of shape {list(tensor.shape)} at [{', '.join(view.indices)}]"
            )
        tensor = tensor.narrow(axis, start, length)
        order.append(number)
    tensor = tensor.permute(sorted(range(len(order)), key=order.__getitem__))
    return tensor[tuple(slice(None) if number in order else None for number in range(len(INDICES)))]


def visible(places: Places, text: str, read: Sequence[Tensor]) -> Tensor:
    """Boolean ``[b | 1, H | 1, n, s]``: which pairs of a block a mask_mod lets see each other."""
    program = Program.of(text)
    own = narrowed(places, [name for name in INDICES if program.depends_on(name)])
    found = evaluated(program, (), own, read)
    rows, keys = places.query_index.shape[2], places.key_index.shape[3]
    return found.expand(*found.shape[:2], rows, keys)


def pulled_back(
    ds: Tensor, scores: Tensor, places: Places, text: str, read: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of the scores of a block before a score_mod, from that of the scores behind it; and the gradients of
    the numbers that it reads, one for each access of the program, which broadcast to the block."""
    d_scores, *d_reads = evaluated(Program.of(text).gradient, (ds, scores), places, read)
    d_scores = d_scores.to(ds.dtype)
    return d_scores if d_scores.shape == ds.shape else d_scores.expand(ds.shape).clone(), d_reads


def bound(read: Sequence[Tensor], options: Options, block: Block) -> Callable[..., Tensor]:
    """A call's score_mod for the reference, of a block whose places the reference counts from 0."""
    function = Program.of(options.score_mod).function
    starts = (
        block.batch.start + options.first_batch,
        0,
        block.rows.start + options.first_row,
        block.keys.start + options.first_key,
    )

    def score_mod(score: Tensor, *places: Tensor) -> Tensor:
        return function(score, *(place + start for place, start in zip(places, starts)), *read)

    return score_mod
