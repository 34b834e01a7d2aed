"""The gradients of captured tensors: what every pair gives to the number that it reads, added up in a fixed order.

A program reads a captured tensor at a place that depends on some of batch entry, head, query and key, its *footprint*.
What the pairs of a block give is first summed over the axes that the footprint lacks: so a number of every head is a
sum over rows and keys, by reductions that have one order. Where query and key matter by their difference alone, each
diagonal is summed next. Only then, and only for as many values as the footprint has places, the places are worked out,
and values that fall on one place are added up: in their order on a CPU, and behind a stable sort elsewhere. No atomics,
so that two runs agree to the last bit. The sums are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops.attention.contract import Options
from fastattn.ops.attention.functions.contract import ModifiedInputGradients, slots
from fastattn.ops.attention.functions.on_torch import Places, narrowed, read_by_score_mod, view_of
from fastattn.ops.attention.functions.program import Access, Program, View, plain_indices
from fastattn.ops.attention.functions.writing import INDICES


class CapturedGradients:
    """Adds up the gradients of what a call's score_mod reads.

    Args:
        inputs: of the operators.
        options: of the operators.
        needs: of the operators.
    """

    def __init__(self, inputs: Any, options: Options, needs: Any) -> None:
        names = slots(options.score_mod, options.mask_mod).score_mod if options.score_mod else ()
        self._names = [name if getattr(needs, f"needs_d_{name}", False) else None for name in names]
        self._read = read_by_score_mod(inputs, options) if names else []
        self._inputs = inputs
        self._totals = {
            number: self._read[number].new_zeros(self._read[number].numel(), dtype=torch.float64)
            for number, name in enumerate(self._names)
            if name is not None
        }
        self._accesses = Program.of(options.score_mod).accesses if self._totals else ()
        self._text = options.score_mod

    @property
    def accesses(self) -> list[tuple[int, Access]]:
        """The accesses whose gradients are added up, by their numbers in the program."""
        return [(n, access) for n, access in enumerate(self._accesses) if access.captured in self._totals]

    def add(self, number: int, values: Tensor, places: Places) -> None:
        """Add what pairs give to the numbers that an access reads.

        Args:
            number: of the access.
            values: broadcasts to ``[b, H, n, s]``, or is summed already over the axes that the footprint lacks.
            places: of these pairs.
        """
        access = self._accesses[number]
        if not all(place.numel() for place in places.indices):
            return  # no pairs
        values = _summed(values, access, places)
        if names := plain_indices(access.node):
            whole = self._totals[access.captured].view(self._read[access.captured].shape)
            view = view_of(whole, View(access.captured, names), places)
            view += values
            return
        if access.by_difference:
            values, places = _by_diagonal(values, places)
        tensor = self._read[access.captured]
        places = narrowed(places, access.footprint)
        found = Program.of(self._text).places.function(*places.indices, *self._read)
        ahead = sum(self._read[a.captured].dim() for a in self._accesses[:number])
        index, inside = _flat(tensor, found[ahead : ahead + tensor.dim()], values)
        _add_in_order(self._totals[access.captured], index, torch.where(inside, values, 0).flatten())

    def found(self, plain: Any) -> Any:
        """All gradients, those of the plain inputs among them; empty where not needed."""
        nothing = self._inputs.query.new_empty
        by_name = {
            f"d_{name}": self._totals[number].view(self._read[number].shape).to(self._read[number].dtype)
            for number, name in enumerate(self._names)
            if name is not None
        }
        fields = ModifiedInputGradients._fields[len(plain) :]
        return ModifiedInputGradients(
            *plain, *(by_name.get(field) if field in by_name else nothing(0) for field in fields)
        )


def _summed(values: Tensor, access: Access, places: Places) -> Tensor:
    """Float64, of size 1 along the axes that the footprint of an access lacks."""
    shape = [place.shape[axis] for axis, place in enumerate(places.indices)]
    wanted = [size if name in access.footprint else 1 for name, size in zip(INDICES, shape)]
    if list(values.shape) == wanted:
        return values.double()
    axes = [axis for axis, name in enumerate(INDICES) if name not in access.footprint]
    values = values.expand(shape)
    return values.sum(axes, keepdim=True, dtype=torch.float64) if axes else values.double()


def _by_diagonal(values: Tensor, places: Places) -> tuple[Tensor, Places]:
    """Sums over the diagonals of ``[b, H, n, s]``, ``[b, H, n + s - 1, 1]``, and their places: a row for each
    difference of query and key, and the key 0."""
    rows, keys = values.shape[2:]
    width = rows + keys
    # In a row of as many zeros more as there are rows, and read with one element less to the row, every row begins one
    # further to the right than the row above it: what lies on a diagonal comes to lie in a column.
    skewed = F.pad(values.flip(3), (0, rows)).flatten(2)[..., : rows * (width - 1)]
    sums = skewed.unflatten(2, (rows, width - 1)).sum(2)[..., None]
    batch, head, query, key = places.indices
    first = query[:, :, :1] - key[..., -1:]
    differences = first + torch.arange(width - 1, dtype=query.dtype, device=query.device)[None, None, :, None]
    return sums, Places(batch, head, differences, torch.zeros_like(key[..., :1]), places.starts)


def _flat(tensor: Tensor, indices: Sequence[Tensor], values: Tensor) -> tuple[Tensor, Tensor]:
    """Where in a tensor, counted as if it were contiguous, each of the values belongs, and whether that is inside."""
    flat = torch.zeros((), dtype=torch.int64, device=values.device)
    inside = torch.ones((), dtype=torch.bool, device=values.device)
    for size, index in zip(tensor.shape, indices):
        index = torch.where(index < 0, index + size, index).long()
        inside = inside & (index >= 0) & (index < size)
        flat = flat * size + index
    flat = torch.where(inside, flat, 0).expand(values.shape).flatten()
    return flat, inside


def _add_in_order(total: Tensor, index: Tensor, values: Tensor) -> None:
    """``total[index] += values``, values of one index in their order."""
    if total.numel() == 0 or values.numel() == 0:
        return
    if total.device.type == "cpu":
        total.index_add_(0, index, values)  # one after the other, on one thread
        return
    index, order = torch.sort(index, stable=True)
    ends = torch.searchsorted(index, torch.arange(total.numel() + 1, device=index.device))
    total += torch.segment_reduce(values[order], "sum", offsets=ends, axis=0, unsafe=True, initial=0)
