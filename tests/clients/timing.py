"""How long a client takes with this package and without, turn by turn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import fastattn
from benchmarks.measure.timing import Timing, time_on_cpu
from tests.clients.cases import Client, Inputs, classes, make
from tests.clients.runs import outputs

ORIGINAL, OURS = "original", "fastattn"
BATCHES = (2, 16)  # the first is that of the clients' inputs
_WARM_UP = 3


def measure(client: Client, seconds: float) -> Iterator[Timing]:
    """The times of inference and of a training step, patched and fused, beside the original's, on the torch backend:
    both with each of the batch sizes.

    Raises:
        RuntimeError: one of them could not be timed.
    """
    original = make(client)
    ours = copy.deepcopy(original)
    fastattn.fuse(ours, also=classes(client.also))
    patch = fastattn.patch_sdpa()

    def timed(run: Callable[[nn.Module, Inputs], object], inputs: Inputs) -> Timing:
        def patched() -> None:
            with patch:
                run(ours, inputs)

        steps = {ORIGINAL: lambda: run(original, inputs), OURS: patched}
        for _ in range(_WARM_UP):
            for of_one in steps.values():
                of_one()
        timing = time_on_cpu(steps, ORIGINAL, seconds=seconds)[OURS]
        if not isinstance(timing, Timing):
            raise RuntimeError(f"{client.package}, {client.name}: not timed: {timing}")
        return timing

    drawn = client.inputs(torch.Generator().manual_seed(0))
    with fastattn.use_backend("torch"):
        for batch in BATCHES:
            inputs = _repeated(drawn, batch // BATCHES[0])
            yield from (timed(run, inputs) for run in (_infer, _train))


def _repeated(inputs: Inputs, times: int) -> Inputs:
    """A batch so many times as large."""

    def repeat(value: Any) -> Any:
        is_batch = isinstance(value, Tensor) and value.shape[0] == BATCHES[0]
        return value.repeat(times, *[1] * (value.dim() - 1)) if is_batch else value

    return tree_map(repeat, inputs)


def _infer(model: nn.Module, inputs: Inputs) -> None:
    model.eval()
    with torch.no_grad():
        outputs(model, inputs)


def _train(model: nn.Module, inputs: Inputs) -> None:
    model.train()
    model.zero_grad()
    torch.autograd.backward([out.square().mean() for out in outputs(model, inputs)])
