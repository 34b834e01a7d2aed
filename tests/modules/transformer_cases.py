"""One configuration of a transformer layer and its inputs, run through any implementation of it."""

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn.testing import random_tensor

BATCH, LENGTH, KEYS, INNER = 2, 11, 9, 28

THEIRS: dict[str, Any] = {"encoder": nn.TransformerEncoderLayer, "decoder": nn.TransformerDecoderLayer}
OURS: dict[str, Any] = {"encoder": fastattn.TransformerEncoderLayer, "decoder": fastattn.TransformerDecoderLayer}
ACTIVATIONS: dict[str, str | Callable] = {"relu": "relu", "gelu": "gelu", "function": F.silu, "module": nn.Mish()}


@dataclasses.dataclass(frozen=True)
class Case:
    """Levels by name; see ``AXES`` for the possible ones."""

    kind: str = "encoder"
    norm_first: bool = False
    activation: str = "relu"
    layout: str = "batch_first"
    size: tuple[int, int] = (20, 4)  # d_model, nhead
    bias: bool = True
    mask: str = "none"
    padding: str = "none"
    dtype: torch.dtype = torch.float32
    mode: str = "train"

    def __str__(self):
        """What differs from the plainest case."""
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return "-".join(changed).replace("torch.", "") or "plain"


AXES: dict[str, list[Any]] = {
    "kind": ["encoder", "decoder"],
    "norm_first": [False, True],
    "activation": list(ACTIVATIONS),
    "layout": ["batch_first", "sequence_first", "unbatched"],
    "size": [(20, 4), (15, 3), (7, 1)],
    "bias": [True, False],
    "mask": ["none", "causal_bool", "causal_float", "causal_hint", "float_3d"],
    "padding": ["none", "bool", "float"],
    "dtype": [torch.float32, torch.float64, torch.bfloat16],
    "mode": ["train", "eval", "eval_no_grad"],
}


def makes_sense(case: dict[str, Any]) -> bool:
    """Does rounding leave the gradients of ``case`` where they are? ReLU's jump where bfloat16 crosses 0."""
    return case["dtype"] != torch.bfloat16 or case["activation"] != "relu"


def make_layer(case: Case, kinds: dict[str, Any], dropout: float = 0.0, **more: Any) -> Any:
    """A layer for the case, in its dtype; what torch initialises with zeros and ones is neither here."""
    torch.manual_seed(5)
    layer = kinds[case.kind](
        *case.size,
        INNER,
        dropout,
        copy.deepcopy(ACTIVATIONS[case.activation]),
        1e-4,
        case.layout == "batch_first",
        case.norm_first,
        case.bias,
        dtype=case.dtype,
        **more,
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
    return layer.train(case.mode == "train")


def make_arguments(case: Case, seed: int) -> dict[str, Any]:
    """Inputs and masks by the names of forward, already rounded to the case's dtype, so that float64 sees the same."""
    size, heads = case.size
    batch = 1 if case.layout == "unbatched" else BATCH
    names = {"encoder": ["src"], "decoder": ["tgt", "memory"]}[case.kind]
    arguments: dict[str, Any] = {}
    for i, (name, length) in enumerate(zip(names, (LENGTH, KEYS))):
        shape = {
            "batch_first": (batch, length, size),
            "sequence_first": (length, batch, size),
            "unbatched": (length, size),
        }[case.layout]
        arguments[name] = random_tensor(*shape, seed=8 * seed + i, dtype=case.dtype)
        if case.mask != "none":
            arguments |= make_mask(case, name, (batch * heads, LENGTH, length), 8 * seed + 2 + i)
        if case.padding != "none":
            padding = torch.zeros(batch, length, dtype=torch.bool)
            padding[0, length // 2 :] = True
            if case.padding == "float":
                padding = torch.where(padding, -torch.inf, random_tensor(batch, length, seed=8 * seed + 4 + i))
                padding = padding.to(case.dtype)
            arguments[f"{name}_key_padding_mask"] = padding[0] if case.layout == "unbatched" else padding
    return arguments


def make_mask(case: Case, name: str, shape: tuple[int, int, int], seed: int) -> dict[str, Any]:
    """The arguments that make up the mask of the input ``name``."""
    if case.mask == "float_3d":
        return {f"{name}_mask": random_tensor(*shape, seed=seed, dtype=case.dtype)}
    causal = torch.ones(shape[1:], dtype=torch.bool).triu(1)
    if case.mask == "causal_float":
        causal = torch.zeros(shape[1:], dtype=case.dtype).masked_fill(causal, -torch.inf)
    promise = {"is_causal" if name == "src" else f"{name}_is_causal": True}
    return {f"{name}_mask": causal} | (promise if case.mask == "causal_hint" else {})


def run(layer: nn.Module, case: Case, arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The output, and in training the gradients of every parameter and input, by name; all in ``dtype``."""
    layer = layer.to(dtype)
    cast = {
        name: value.detach().to(dtype, copy=True) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    inputs = {
        name: cast[name].requires_grad_(case.mode == "train") for name in ("src", "tgt", "memory") if name in cast
    }
    with contextlib.ExitStack() as stack:
        if case.mode == "eval_no_grad":
            stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Support for mismatched")
        output = layer(**cast)
    results = {"output": output}
    if case.mode == "train":
        output.backward(random_tensor(*output.shape, seed=0, dtype=dtype))
        results |= {f"d_{name}": p.grad for name, p in layer.named_parameters()}
        results |= {f"d_{name}": tensor.grad for name, tensor in inputs.items()}
    return results
