"""What the tests of models do: run one with an attention, watch what computed it, hold the results to a budget."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import fastattn
from fastattn.integrations.transformers import attention, masks
from fastattn.testing import assert_within_budget, measure_error
from tests.integrations.transformers.families import BY_NAME, Family, Inputs, Padding, build

DRAWS = 4  # models and inputs whose errors are looked at together: the largest of a few roundings is a matter of luck


def said_by(code: str) -> str:
    """What ``code`` prints in a process of its own; a failure shows its traceback."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


# ------------------------------------------------------------------------------------------------------------ watching


class Watch:
    """What happened inside :func:`watching`.

    Attributes:
        calls: the keyword arguments of each call of this package's attention.
        exact_masks: so many masks ``[B, 1, L, S]`` were made.
        elsewhere: softmaxes and scaled dot products outside of this package, by operator.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.exact_masks = 0
        self.elsewhere: Counter[str] = Counter()
        self.inside = False

    @property
    def carried(self) -> set[str]:
        """What attention got beside query, key and value, in any of the calls, in words of the table of families."""
        found: set[str] = set()
        for words in self.calls:
            mask = words.get("attn_mask")
            found |= {name for name in ("window", "softcap", "sinks") if words.get(name) is not None}
            found |= {"padding"} if words.get("key_padding_mask") is not None else set()
            found |= {"documents"} if words.get("document_ids") is not None else set()
            if mask is not None:
                flat = mask.dtype == torch.bool and mask.shape[-2] == 1
                found.add("padding" if flat else "bias" if mask.is_floating_point() else "mask")
        return found


class _Elsewhere(TorchDispatchMode):
    """Sees every operator, and notes those that are attention, or a part of it, outside of this package's."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not self.watch.inside and name in ("_softmax", "_safe_softmax"):
            self.watch.elsewhere["softmax"] += 1
        if not self.watch.inside and "scaled_dot_product" in name:
            self.watch.elsewhere["sdpa"] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def watching(*, elsewhere: bool = False) -> Generator[Watch]:
    """Count calls of this package's attention and exact masks; with ``elsewhere`` look at every operator, too."""
    watch = Watch()
    run, exact = attention.attention, masks.exact_mask

    def watched(*args: Any, **words: Any) -> Any:
        watch.calls.append(words)
        watch.inside = True
        try:
            return run(*args, **words)
        finally:
            watch.inside = False

    def counted(**arguments: Any) -> Tensor:
        watch.exact_masks += 1
        return exact(**arguments)

    with pytest.MonkeyPatch.context() as patch, _Elsewhere(watch) if elsewhere else contextlib.nullcontext():
        patch.setattr(attention, "attention", watched)
        patch.setattr(masks, "exact_mask", counted)
        yield watch


# --------------------------------------------------------------------------------------------------------------- truth


class InFloat64(TorchFunctionMode):
    """Where code says float32, as the softmax, norms and rotary embeddings of models do, this takes float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.multinomial:  # which draws other numbers in float64
            args = (args[0].to(torch.float32), *args[1:])
            return func(*args, **(kwargs or {}))
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*tree_map(_wider, args), **tree_map(_wider, kwargs or {}))


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


# ------------------------------------------------------------------------------------------------------------- running


class Results(NamedTuple):
    """What a model makes of its inputs.

    Attributes:
        output: the logits, or hidden states, of what is no padding, ``[n, ...]``.
        loss: the model's own, or a random projection of the output.
        gradients: of every parameter that has one.
    """

    output: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


@functools.cache
def model_of(name: str, seed: int = 0) -> Any:
    """The family's tiny model, to be copied before anything is changed."""
    return build(BY_NAME[name], seed=seed)


def model_with(name: str, implementation: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A copy of the family's model with an attention and in a dtype."""
    model = copy.deepcopy(model_of(name, seed)).to(dtype)
    model.set_attn_implementation(implementation)
    return model


def inputs_of(name: str, padding: Padding, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """The arguments of a call of the family's model."""
    inputs = BY_NAME[name].inputs(padding, seed)
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


def step(model: Any, inputs: Inputs) -> Results:
    """Forward and backward."""
    uses_cache = {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}
    result = model(**inputs, **uses_cache)
    output = real_output(result, inputs)
    loss = result.loss if getattr(result, "loss", None) is not None else project(output)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Results(output.detach(), loss.detach(), gradients)


def drawn(
    name: str,
    padding: Padding,
    implementation: str,
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[Any], object] = lambda model: None,
    draws: int = DRAWS,
) -> Results:
    """:func:`step` of several models of a family, stacked; each is changed by ``prepare`` first."""
    steps = []
    for seed in range(draws):
        model = model_with(name, implementation, dtype=dtype, seed=seed)
        prepare(model)
        with InFloat64() if dtype == torch.float64 else contextlib.nullcontext():
            steps.append(step(model, inputs_of(name, padding, dtype=dtype, seed=seed)))
    return Results(
        torch.stack([results.output for results in steps]),
        torch.stack([results.loss for results in steps]),
        {key: torch.stack([results.gradients[key] for results in steps]) for key in steps[0].gradients},
    )


@functools.cache
def eager(name: str, padding: Padding, dtype: torch.dtype = torch.float32, draws: int = DRAWS) -> Results:
    """:func:`drawn` with transformers' own attention; in float64 the truth."""
    return drawn(name, padding, BY_NAME[name].peer, dtype, draws=draws)


def real_output(result: Any, inputs: Inputs) -> Tensor:
    """The logits, or hidden states, without those of padding."""
    names = ("logits", "logits_per_image", "last_hidden_state")
    output = next(getattr(result, name) for name in names if getattr(result, name, None) is not None)
    assert output.isfinite().all()
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or mask.shape != output.shape[:2]:
        return output
    return output[mask.bool()]


def project(output: Tensor) -> Tensor:
    """A number that depends on all of the output."""
    generator = torch.Generator().manual_seed(7)
    return (output * torch.randn(output.shape, generator=generator).to(output.dtype)).mean()


def is_norm(module: nn.Module) -> bool:
    """Is it called a norm, and has a weight that is one number for each feature?"""
    return "Norm" in type(module).__name__ and getattr(getattr(module, "weight", None), "ndim", 0) == 1


def fuse(model: Any, family: Family) -> fastattn.Fusion:
    """:func:`fastattn.fuse`, told which classes are torch's RMS norm."""
    kinds = {type(module) for module in model.modules() if type(module).__name__ in family.norms}
    return fastattn.fuse(model, also=dict.fromkeys(kinds, nn.RMSNorm))


# -------------------------------------------------------------------------------------------------------------- budget


class Ratios(NamedTuple):
    """The largest errors as multiples of those of ``"eager"`` in the same dtype."""

    output: float
    gradients: float


def assert_results_within_budget(actual: Results, *, truth: Results, peer: Results, feature: str) -> Ratios:
    """Output, loss and every gradient at most twice as far from the truth as the peer's.

    Gradients are judged by their root mean square: their largest errors hang on the one draw whose numbers cancel
    most. Those that cancel altogether, such as that of a key's bias, which is zero, consist of the others' rounding
    errors: they may be wrong by a unit in the last place of the model's largest. Those of one number are a matter of
    luck, eager's and ours, and may be wrong by two. A cross entropy moves by at most twice what the logits do.
    """
    assert actual.gradients.keys() == truth.gradients.keys() == peer.gradients.keys()
    words: dict[str, Any] = {"feature": feature, "backend": "transformers"}
    assert_within_budget(actual.output, truth=truth.output, peer=peer.output, name="output", **words)
    logits = 2 * measure_error(peer.output, truth.output).maximum
    assert_within_budget(actual.loss, truth=truth.loss, peer=peer.loss, name="loss", allowance=logits, **words)
    largest = max(gradient.abs().max().item() for gradient in truth.gradients.values())
    unit = largest * torch.finfo(actual.output.dtype).eps
    for name, gradient in actual.gradients.items():
        floor = 2 * unit if gradient[0].numel() == 1 else unit
        error, allowed = (measure_error(g, truth.gradients[name]).rms for g in (gradient, peer.gradients[name]))
        message = f"gradient of {name}: rms error {error:.3g}, eager's {allowed:.3g}, and {floor:.3g} to spare"
        assert error <= 2 * allowed + floor, message
    return ratios(actual, truth=truth, peer=peer)


def ratios(actual: Results, *, truth: Results, peer: Results) -> Ratios:
    """By root mean square; of gradients over all parameters together."""

    def joined(results: Results) -> Tensor:
        return torch.cat([gradient.double().flatten() for _, gradient in sorted(results.gradients.items())])

    def ratio(read: Callable[[Results], Tensor]) -> float:
        errors = [measure_error(read(results), read(truth)).rms for results in (actual, peer)]
        return errors[0] / errors[1]

    return Ratios(ratio(lambda results: results.output), ratio(joined))
