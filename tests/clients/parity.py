"""Does a client compute on this package what it does without: outputs, gradients of every parameter, who was called?"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import nn

import fastattn
from fastattn.integrations import diffusers
from fastattn.ops.common.backends import Backend
from fastattn.testing import measure_error, ulp
from tests.clients.cases import Client, Inputs, classes, in_dtype, make
from tests.clients.runs import Compute, KeepDouble, Tensors, called_modules, calls_of_sdpa, evaluate, train
from tests.poison import poisoned_memory

# Inputs are drawn so often, and a tensor is judged by its errors in all of these runs: those of one run hang together.
TRAINED, EVALUATED = 12, 4
LIMIT = 2.0  # of an error over the original's

# In which ways this package serves a client: by patch_sdpa, by fuse, by both, by the registry of diffusers.
PATCHED, FUSED, BOTH, REGISTERED = "patched", "fused", "patched and fused", "registered"


class Outcome(NamedTuple):
    """What was found of a client.

    Attributes:
        calls: of ``F.scaled_dot_product_attention`` in a training step of the original, by the class of the module
            that calls. All are ours under ``patch_sdpa``.
        fused: modules that are ours under ``fuse``, by the class that they were of.
        left: attention and norms that are not, by class: how many, and why.
        ratio: the largest of all tensors' errors over the original's, see :func:`ratios`.
        worst: which tensor that was.
    """

    calls: Counter[str]
    fused: Counter[str]
    left: dict[str, tuple[int, str]]
    ratio: float
    worst: str


def examine(client: Client, backend: Backend, ways: tuple[str, ...]) -> Outcome:
    """Compare the client in each of the ways with itself: a training step, evaluation, and evaluation in bfloat16.

    Raises:
        AssertionError: a tensor is outside of its error budget; or a call or a module was not ours that should be.
    """
    model, found = make(client), {}
    for compute, count, dtype in (
        (train, TRAINED, torch.float32),
        (evaluate, EVALUATED, torch.float32),
        (evaluate, EVALUATED, torch.bfloat16),
    ):
        draws = [in_dtype(client.inputs(torch.Generator().manual_seed(i)), dtype) for i in range(count)]
        original = client.cast(copy.deepcopy(model), dtype)
        for way, *results in _in_each_way(client, original, draws, compute, backend, ways):
            label = f"{way}, {str(dtype).removeprefix('torch.')}"
            found |= {f"{name}, {label}": ratio for name, ratio in ratios(*results).items()}
    worst = max(found, key=found.__getitem__)
    assert found[worst] <= LIMIT, f"{worst}: its error is {found[worst]:.3g} times the original's"
    return Outcome(*_served(client, model), found[worst], worst)


def ratios(found: Tensors, peer: Tensors, truth: Tensors) -> dict[str, float]:
    """The error of each tensor over the peer's, both against float64; 2 is the most that is granted.

    The RMS error is taken over the peer's and half an ulp of the largest number, so that its budget is that of
    :func:`fastattn.testing.assert_within_budget`. The largest error of the gradient of a whole model is a matter of
    chance: one weight in a thousand may be off by ten times the RMS error, in one of two computations and not in the
    other. So it is taken over the same, times the most that the peer's largest error is above its RMS error in any
    tensor.
    """
    assert found.keys() == peer.keys() == truth.keys(), "other gradients"
    _assert_alike(peer, truth)
    peers = {name: measure_error(peer[name], truth[name]) for name in truth}
    scales = {
        name: peers[name].rms + ulp(tensor.abs().max().item(), peer[name].dtype) / 2 for name, tensor in truth.items()
    }
    tail = max(1.0, *(peers[name].maximum / scale for name, scale in scales.items()))
    errors = {name: measure_error(found[name], truth[name]) for name in truth}
    return {name: max(error.rms, error.maximum / tail) / scales[name] for name, error in errors.items()}


def _assert_alike(peer: Tensors, truth: Tensors) -> None:
    """The original has to compute the same in both dtypes: one that draws at random would allow us anything."""
    error = sum((peer[name].double() - truth[name]).square().sum().item() for name in truth)
    size = sum(tensor.square().sum().item() for tensor in truth.values())
    dtype = next(iter(peer.values())).dtype
    assert math.sqrt(error / size) < math.sqrt(torch.finfo(dtype).eps), f"{math.sqrt(error / size):.2g} from float64"


def _in_each_way(
    client: Client,
    original: nn.Module,
    draws: list[Inputs],
    compute: Compute,
    backend: Backend,
    ways: tuple[str, ...],
) -> Iterator[tuple[str, Tensors, Tensors, Tensors]]:
    """Of each way its name and what it computes, what the original does, and what that does in float64.

    Raises:
        AssertionError: a call or a module is not ours that should be.
    """
    peer = compute(copy.deepcopy(original), draws)
    with KeepDouble():
        truth = compute(copy.deepcopy(original).double(), [in_dtype(inputs, torch.float64) for inputs in draws])
    calls, ran = calls_of_sdpa(original, draws[0], compute), called_modules(original, draws[0])

    for way in ways:
        ours, expected = copy.deepcopy(original), calls.total() * len(draws)
        with contextlib.ExitStack() as stack:
            stack.enter_context(fastattn.use_backend(backend))
            if way in (FUSED, BOTH):
                fusion = stack.enter_context(fastattn.fuse(ours, also=classes(client.also)))
                missed = (ran & fusion.replaced.keys()) - called_modules(ours, draws[0])
                assert not missed, f"fuse keeps the model from calling {missed}"
                if fastattn.MultiheadAttention in fusion.replaced.values():
                    expected -= calls["MultiheadAttention"] * len(draws)
            routing = diffusers.register() if way == REGISTERED else fastattn.patch_sdpa()
            if way != FUSED:
                stack.enter_context(routing)
            stack.enter_context(poisoned_memory())
            found = compute(ours, draws)
        if way != FUSED:
            assert (routing.routed, routing.refused.total()) == (expected, 0), f"{way}, {expected} expected: {routing}"
        yield way, found, peer, truth


# ------------------------------------------------------------------------------------------- what is ours, and what not


def _served(client: Client, model: nn.Module) -> tuple[Counter[str], Counter[str], dict[str, tuple[int, str]]]:
    """The calls, the modules that are ours, and those that are not, of an :class:`Outcome`."""
    calls = calls_of_sdpa(model, client.inputs(torch.Generator().manual_seed(0)), train)
    assert bool(calls) == client.attends, f"F.scaled_dot_product_attention was called: {calls}"
    for kind, stands_for in classes(client.unlike).items():
        with pytest.raises(ValueError, match=f"is no nn.{stands_for.__name__}"):
            fastattn.fuse(model, also={kind: stands_for})
    classes_before = {name: type(module) for name, module in model.named_modules()}
    with fastattn.fuse(model, also=classes(client.also)) as fusion:
        assert fusion.replaced or calls
        left = {name: reason.partition(";")[0] for name, reason in fusion.left_alone.items()}
        for name, module in model.named_modules():
            if name not in fusion.replaced and name not in left and _is_innermost(module):
                called = type(module).__name__ in calls
                left[name] = (
                    "calls SDPA" if called else "a norm of another kind" if _is_norm(module) else "its own products"
                )
    reasons = Counter((classes_before[name].__name__, reason) for name, reason in left.items())
    fused = Counter(classes_before[name].__name__ for name in fusion.replaced)
    return calls, fused, {kind: (count, reason) for (kind, reason), count in reasons.items()}


def _is_norm(module: nn.Module) -> bool:
    """Whether it normalises by itself, by its class's name: those with a norm and a projection inside do not."""
    return "norm" in type(module).__name__.lower() and not any(module.children())


def _is_attention(module: nn.Module) -> bool:
    return any(part in type(module).__name__.lower() for part in ("attention", "attn"))


def _is_innermost(module: nn.Module) -> bool:
    """A norm, or attention that holds no other."""
    return _is_norm(module) or (
        _is_attention(module) and not any(_is_attention(part) for part in module.modules() if part is not module)
    )
