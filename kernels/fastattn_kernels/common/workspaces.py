"""The small workspaces of a recorded call, laid side by side in one allocation.

A workspace is memory that kernels of the call write and read, and that nobody sees afterwards: the LSE of a call in
evaluation, delta, lists of tiles. An allocation costs the host about 1.7 us (torch 2.13, the CPU's allocator), and
small calls wait for the host. So a plan that hands over addresses makes one allocation of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastattn_kernels.common.recording import Called, Descriptor, Launched, Made, Recording, Slot, View

_BYTES = 1 << 20  # of one workspace: larger ones are freed each behind its last use
_ALIGNMENT = 256  # bytes: as CUDA's allocator aligns what it hands out, or a multiple


def pooled(recording: Recording, results: Any) -> tuple[list[Made | Called | Launched], dict[int, View]]:
    """The steps of a recording and its views, with its small workspaces as views of one allocation.

    Args:
        recording: of a call.
        results: what it returned, with slots for tensors.
    """
    views = recording.views
    seen = set(_bases(results, views))  # by more than launches: by the caller, or by operators that are handed tensors
    launched: set[int] = set()
    for step in recording.steps:
        if isinstance(step, Launched):
            launched.update(_bases(step.arguments, views))
        elif isinstance(step, Called) and not step.is_view:
            seen.update(_bases((step.arguments, tuple(step.keywords.values())), views))
    small = [
        step
        for step in recording.steps
        if isinstance(step, Made) and step.made in launched - seen and 0 < _size(step) <= _BYTES
    ]
    if len({step.device for step in small}) != 1 or len(small) < 2:
        return recording.steps, views
    number, end, offsets = recording.numbers, 0, {}
    for step in small:
        offsets[step.made] = end
        end += -(-_size(step) // _ALIGNMENT) * _ALIGNMENT
    pool = Made(number, (end,), (1,), torch.uint8, small[0].device)
    moved = {made: View(number, offset) for made, offset in offsets.items()}
    for name, view in views.items():
        moved[name] = View(number, offsets[view.base] + view.offset) if view.base in offsets else view
    rest = [step for step in recording.steps if not (isinstance(step, Made) and step.made in offsets)]
    return [pool, *rest], moved


def _size(step: Made) -> int:
    """Bytes from the first element of a tensor to behind its last."""
    if 0 in step.shape:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(step.shape, step.stride))
    return (last + 1) * step.dtype.itemsize


def _bases(value: Any, views: dict[int, View]) -> Iterator[int]:
    """The numbers of the tensors in a value, of views those of the tensor in whose memory they lie."""
    if isinstance(value, Slot):
        yield views[value.number].base if value.number in views else value.number
    elif isinstance(value, Descriptor):
        yield from _bases(value.base, views)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _bases(each, views)
