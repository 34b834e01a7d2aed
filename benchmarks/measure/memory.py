"""Memory of a step: what it needs at most, and what its forward keeps for its backward.

On CUDA the peak is what the allocator handed out at most. On a CPU it is how far the resident set grows: that counts
what a profiler of tensors would miss (scratch of the matrix products), and pages that were reserved but never touched
do not count.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Callable, Generator
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from benchmarks.measure.timing import without_collection

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_mib(step: Callable[[], object], device: str) -> float | None:
    """MiB that ``step`` needs at most beside what is there before it; None where there is no answer.

    On a CPU the smaller of two measurements: what else the process does can only add to it.
    """
    if torch.device(device).type == "cuda":
        return _peak_on_cuda(step)
    peaks = [_peak_on_cpu(step), _peak_on_cpu(step)]
    return min((peak for peak in peaks if peak is not None), default=None)


def _peak_on_cuda(step: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _peak_on_cpu(step: Callable[[], object]) -> float | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    # Pages that were freed, but kept, are resident already: the step would take them without being seen
    ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR_REFS.write_text("5")  # the high mark starts again from here
        before = _resident("VmRSS")
    except OSError:
        return None
    with without_collection():  # freeing others' garbage would make room
        kept = step()
        peak = _resident("VmHWM") - before
    del kept
    return max(peak, 0.0)


def _resident(field: str) -> float:
    """MiB of a field of ``/proc/self/status``: ``VmRSS`` now, ``VmHWM`` at most so far."""
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


class Saved:
    """What autograd keeps for the backward, as :func:`saved_tensors` finds it."""

    def __init__(self) -> None:
        # A weak reference keeps a storage's identity, though not its memory: no later storage is mistaken for it
        self._bytes: dict[StorageWeakRef, int] = {}
        self._leaves: set[StorageWeakRef] = set()
        self._most, self._is_counted = 0, True

    @property
    def mib(self) -> float:
        """Of all that was kept at once, at the beginning of a backward or, without one, now."""
        self._count()
        return self._most / 2**20

    def _pack(self, tensor: Tensor) -> Tensor:
        # What a backward saves meanwhile is for its own derivatives
        if torch._C._current_graph_task_id() == -1:
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            self._bytes[reference], self._is_counted = storage.nbytes(), False
            owners = (tensor,) if tensor._base is None else (tensor, tensor._base)
            if any(owner.is_leaf and owner.requires_grad for owner in owners):
                self._leaves.add(reference)
        return tensor.detach()  # the tensor itself may be the output that keeps it: a cycle, never freed

    def _unpack(self, tensor: Tensor) -> Tensor:
        self._count()
        return tensor

    def _count(self) -> None:
        """Once a backward: each use of a saved tensor may be the first, and the next one finds less of them."""
        if not self._is_counted:
            kept = [
                size for storage, size in self._bytes.items() if not storage.expired() and storage not in self._leaves
            ]
            self._most, self._is_counted = max(self._most, sum(kept)), True


@contextlib.contextmanager
def saved_tensors() -> Generator[Saved]:
    """Count what is saved for a backward, each storage once, beside leaves that require gradients and their views.

    The graph has to be made inside, be it by the step or where the step is built::

        with saved_tensors() as saved:
            step = build()
            step()
        saved.mib

    Those leaves are the inputs and the parameters of a training step. A mask is none, and counts where it is saved.
    """
    saved = Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved._pack, saved._unpack):
        yield saved
