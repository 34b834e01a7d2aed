"""One configuration of ``nn.MultiheadAttention`` and its inputs, run through any implementation of it."""

import contextlib
import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.testing import random_tensor

BATCH, LENGTH, KEYS = 2, 7, 9


@dataclasses.dataclass(frozen=True)
class Case:
    """Levels by name; see ``AXES`` for the possible ones."""

    layout: str = "batch_first"
    inputs: str = "self"
    heads: int = 4
    features: str = "packed"
    bias: bool = True
    add_bias_kv: bool = False
    add_zero_attn: bool = False
    attn_mask: str = "none"
    key_padding_mask: str = "none"
    weights: str = "none"
    dtype: torch.dtype = torch.float32
    mode: str = "train"
    empty: str = "nothing"

    def __str__(self):
        """What differs from the plainest case."""
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return "-".join(changed).replace("torch.", "") or "plain"


AXES: dict[str, list[Any]] = {
    "layout": ["batch_first", "sequence_first", "unbatched"],
    "inputs": ["self", "key_is_value", "separate", "query_is_value"],
    "heads": [4, 3, 1],
    "features": ["packed", "kdim", "vdim"],
    "bias": [True, False],
    "add_bias_kv": [False, True],
    "add_zero_attn": [False, True],
    "attn_mask": ["none", "bool", "float", "bool_3d", "float_3d", "causal_hint"],
    "key_padding_mask": ["none", "bool", "float"],
    "weights": ["none", "average", "heads"],
    "dtype": [torch.float32, torch.float64, torch.bfloat16],
    "mode": ["train", "eval", "eval_no_grad"],
    "empty": ["nothing", "batch", "query", "keys"],
}


def makes_sense(case: dict[str, Any]) -> bool:
    """Are all levels of ``case`` possible together?"""
    if case["features"] != "packed" and case["inputs"] != "separate":
        return False
    if case["empty"] != "nothing":
        # torch's fused path leaves the weights of what is empty out, and it has no mask of nothing: no peer there.
        masked = case["attn_mask"] != "none" or case["key_padding_mask"] != "none"
        if case["mode"] == "eval_no_grad" or (masked and case["weights"] == "none"):
            return False
        if case["empty"] == "batch" and case["layout"] == "unbatched":
            return False
        if case["empty"] != "batch" and case["inputs"] == "self":
            return False
        return case["attn_mask"] != "causal_hint" and case["inputs"] != "query_is_value"
    return True


@dataclasses.dataclass
class Arguments:
    """Float64 inputs and masks of a case; ``embed_dim`` is 12 for every number of heads."""

    query: Tensor
    key: Tensor
    value: Tensor
    masks: dict[str, Any]


EMBED_DIM = 12


def make_module(kind: type[nn.MultiheadAttention], case: Case, **more: Any) -> nn.MultiheadAttention:
    """A module of ``kind`` for the case, in its dtype, with biases that are not zero."""
    torch.manual_seed(5)
    module = kind(
        EMBED_DIM,
        case.heads,
        bias=case.bias,
        add_bias_kv=case.add_bias_kv,
        add_zero_attn=case.add_zero_attn,
        kdim=10 if case.features == "kdim" else None,
        vdim=14 if case.features == "vdim" else None,
        batch_first=case.layout != "sequence_first",
        dtype=case.dtype,
        **more,
    )
    if case.bias:
        nn.init.normal_(module.in_proj_bias)
        nn.init.normal_(module.out_proj.bias)
    return module.train(case.mode == "train")


def make_arguments(case: Case, seed: int) -> Arguments:
    """Inputs already rounded to the case's dtype, so that float64 sees the same numbers."""
    batch = 0 if case.empty == "batch" else 1 if case.layout == "unbatched" else BATCH
    length = 0 if case.empty == "query" else LENGTH
    keys = length if case.inputs in ("self", "query_is_value") else 0 if case.empty == "keys" else KEYS

    def tensor(rows: int, features: int, index: int) -> Tensor:
        shape = {
            "batch_first": (batch, rows, features),
            "sequence_first": (rows, batch, features),
            "unbatched": (rows, features),
        }[case.layout]
        return random_tensor(*shape, seed=8 * seed + index, dtype=case.dtype)

    query = tensor(length, EMBED_DIM, 0)
    key = query if case.inputs == "self" else tensor(keys, 10 if case.features == "kdim" else EMBED_DIM, 1)
    if case.inputs in ("self", "key_is_value"):
        value = key
    elif case.inputs == "query_is_value":
        value = query
    else:
        value = tensor(keys, 14 if case.features == "vdim" else EMBED_DIM, 2)

    masks: dict[str, Any] = {}
    shape = (batch * case.heads, length, keys) if case.attn_mask.endswith("3d") else (length, keys)
    if case.attn_mask == "causal_hint":
        masks |= {"attn_mask": torch.ones(length, keys, dtype=torch.bool).triu(1), "is_causal": True}
    elif case.attn_mask.startswith("bool"):
        masks["attn_mask"] = random_tensor(*shape, seed=8 * seed + 3) > 0.5
        masks["attn_mask"][..., :1] = False
    elif case.attn_mask != "none":
        masks["attn_mask"] = random_tensor(*shape, seed=8 * seed + 3, dtype=case.dtype)
        masks["attn_mask"][..., 1:][random_tensor(*shape, seed=8 * seed + 4)[..., 1:] > 1] = -torch.inf
    if case.key_padding_mask != "none":
        padding = torch.zeros(batch, keys, dtype=torch.bool)
        padding[:1, keys // 2 :] = keys > 1
        if case.key_padding_mask == "float":
            padding = torch.where(padding, -torch.inf, random_tensor(batch, keys, seed=8 * seed + 5)).to(case.dtype)
        masks["key_padding_mask"] = padding[0] if case.layout == "unbatched" else padding
    return Arguments(query, key, value, masks)


def run(module: nn.MultiheadAttention, case: Case, arguments: Arguments, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs, and in training the gradients of every parameter and input, by name; all in ``dtype``."""
    module = module.to(dtype)
    cast = {}
    for tensor in (arguments.query, arguments.key, arguments.value):
        cast.setdefault(id(tensor), tensor.detach().to(dtype, copy=True).requires_grad_(case.mode == "train"))
    query, key, value = (cast[id(t)] for t in (arguments.query, arguments.key, arguments.value))
    masks = {
        name: mask.to(dtype) if isinstance(mask, Tensor) and mask.is_floating_point() else mask
        for name, mask in arguments.masks.items()
    }
    with contextlib.ExitStack() as stack:
        if case.mode == "eval_no_grad":
            stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")
        output, weights = module(
            query,
            key,
            value,
            need_weights=case.weights != "none",
            average_attn_weights=case.weights == "average",
            **masks,
        )
    results = {"output": output}
    if weights is not None:
        results["weights"] = weights
    if case.mode == "train":
        cotangents = [random_tensor(*t.shape, seed=i, dtype=dtype) for i, t in enumerate(results.values())]
        torch.autograd.backward(tuple(results.values()), cotangents)
        results |= {f"d_{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
        results |= {f"d_input_{i}": t.grad for i, t in enumerate(cast.values()) if t.grad is not None}
    return results
