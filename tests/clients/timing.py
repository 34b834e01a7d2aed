"""How long a client takes with this package and without, turn by turn."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

import fastattn
from benchmarks.measure.timing import Timing, time_on_cpu
from tests.clients.cases import Client, Inputs, classes, make
from tests.clients.runs import outputs

ORIGINAL, OURS = "original", "fastattn"
_WARM_UP = 3


def measure(client: Client, seconds: float) -> tuple[Timing, Timing]:
    """The times of inference and of a training step, patched and fused, beside the original's, on the torch backend.

    Raises:
        RuntimeError: one of them could not be timed.
    """
    inputs = client.inputs(torch.Generator().manual_seed(0))
    original = make(client)
    ours = copy.deepcopy(original)
    fastattn.fuse(ours, also=classes(client.also))
    patch = fastattn.patch_sdpa()

    def step(run: Callable[[nn.Module, Inputs], object]) -> Timing:
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

    with fastattn.use_backend("torch"):
        return step(_infer), step(_train)


def _infer(model: nn.Module, inputs: Inputs) -> None:
    model.eval()
    with torch.no_grad():
        outputs(model, inputs)


def _train(model: nn.Module, inputs: Inputs) -> None:
    model.train()
    model.zero_grad()
    torch.autograd.backward([out.square().mean() for out in outputs(model, inputs)])
