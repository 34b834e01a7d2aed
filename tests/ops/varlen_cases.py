"""Calls over packed sequences, features by name, and how they are held against the reference."""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import torch

import fastattn
from fastattn.reference import attention_varlen as reference
from fastattn.testing import assert_within_budget, measure_error, random_tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Rows and keys of each sequence, and how many lie behind the last one.
LENGTHS: dict[str, tuple[list[int], list[int], int]] = {
    "same": ([5, 17, 1, 40], [5, 17, 1, 40], 0),
    "rest": ([5, 17, 1, 40], [5, 17, 1, 40], 7),
    "more_keys": ([3, 20, 1, 33], [9, 40, 70, 33], 2),
    "more_rows": ([30, 9, 40], [7, 9, 1], 0),
    "empty": ([0, 11, 0, 5, 8, 0], [4, 11, 0, 0, 20, 0], 3),
    "one": ([29], [29], 0),
}
AXES: dict[str, tuple[Any, ...]] = {
    "lengths": tuple(LENGTHS),
    "dtype": tuple(DTYPES),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "widths": ((16, 16), (9, 20)),
    "causal": (False, True),
    "alignment": ("top_left", "bottom_right"),
    "window": (None, (3, None), (4, 2)),
    "prefix": (None, 2, "each"),
    "alibi": (False, "heads", "each"),
    "softcap": (None, 1.5),
    "sinks": (False, True),
    "bias": (None, "pairs", "each", "keys", "bool"),
    "used": (False, True),
    "scale": (None, -0.3),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: a level of each axis."""

    lengths: str = "same"
    dtype: str = "fp32"
    heads: tuple[int, int] = (2, 2)
    widths: tuple[int, int] = (16, 16)
    causal: bool = False
    alignment: Any = "top_left"
    window: Any = None
    prefix: Any = None
    alibi: Any = False
    softcap: float | None = None
    sinks: bool = False
    bias: str | None = None
    used: bool = False
    scale: float | None = None

    @property
    def id(self) -> str:
        """The levels that are not the first of their axis."""
        plain = Case()
        told = [f"{a}-{getattr(self, a)}" for a in AXES if getattr(self, a) != getattr(plain, a)]
        return " ".join(told).replace("'", "") or "plain"


def offsets(lengths: list[int]) -> torch.Tensor:
    """int32 ``[N + 1]``."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@dataclasses.dataclass
class Problem:
    """The tensors of a case.

    Attributes:
        leaves: those that have gradients.
        words: of ``fastattn.attention_varlen``, beside leaves and offsets.
        reference_words: of the reference.
        rows: how many rows belong to a sequence.
    """

    case: Case
    leaves: dict[str, torch.Tensor]
    cu_seqlens: tuple[torch.Tensor, torch.Tensor]
    words: dict[str, Any]
    reference_words: dict[str, Any]
    rows: int

    def gradient_of(self, result: torch.Tensor) -> torch.Tensor:
        """What comes in as the gradient of a result, in its dtype."""
        drawn = random_tensor(*result.shape, seed=77 + result.dim(), dtype=self.leaves["query"].dtype)
        return drawn.to(result.device, result.dtype)


def make_problem(case: Case, device: Any) -> Problem:
    """Random tensors. What lies behind the last sequence, or out of use, is NaN."""
    seeds = iter(range(zlib.crc32(case.id.encode()) % 1000, 10**6))
    of_rows, of_keys, rest = LENGTHS[case.lengths]
    count, (heads, kv_heads), (width, value_width) = len(of_rows), case.heads, case.widths
    dtype = DTYPES[case.dtype]

    def draw(*shape: int) -> torch.Tensor:
        return random_tensor(*shape, seed=next(seeds), dtype=dtype, device=device)

    leaves = {
        "query": draw(sum(of_rows) + rest, heads, width),
        "key": draw(sum(of_keys) + rest, kv_heads, width),
        "value": draw(sum(of_keys) + rest, kv_heads, value_width),
    }
    cu_seqlens = offsets(of_rows).to(device), offsets(of_keys).to(device)
    words: dict[str, Any] = {"is_causal": case.causal, "causal_alignment": case.alignment, "window": case.window}
    words |= {"softcap": case.softcap, "scale": case.scale}
    left, right = (None, None) if case.window is None else case.window
    known: dict[str, Any] = {"bottom_right": case.alignment == "bottom_right", "scale": case.scale}
    known |= {"softcap": case.softcap, "upper": 0 if case.causal else right, "lower": None if left is None else -left}
    if case.used:
        used = torch.tensor([max(0, keys - 1 - number % 3) for number, keys in enumerate(of_keys)], dtype=torch.int32)
        words["seqused_k"] = known["seqused_k"] = used.to(device)
        ends = cu_seqlens[1][1:].tolist()
        for begin, end, keys in zip(cu_seqlens[1].tolist(), ends, used.tolist()):
            leaves["key"][begin + keys : end] = leaves["value"][begin + keys : end] = torch.nan
    for name, tensor in leaves.items():
        tensor[sum(of_rows if name == "query" else of_keys) :] = torch.nan
    if case.prefix is not None:
        each = torch.arange(count, device=device) if case.prefix == "each" else None
        words["prefix"] = case.prefix if each is None else each
        known["prefix"] = torch.tensor([case.prefix], device=device) if each is None else each
    if case.alibi:
        leaves["alibi_slopes"] = draw(*(() if case.alibi == "heads" else (count,)), heads).abs()
    if case.sinks:
        leaves["sinks"] = draw(heads)
    longest = max(of_rows, default=0), max(of_keys, default=0) + 2
    if case.bias == "bool":
        words["attn_mask"] = draw(heads, *longest) < 0.8
        known["bias"] = torch.where(words["attn_mask"], 0.0, -torch.inf)[None]
    elif case.bias is not None:
        shapes = {"pairs": longest, "each": (count, heads, *longest), "keys": (count, 1, 1, longest[1])}
        leaves["attn_mask"] = draw(*shapes[case.bias])
    return Problem(case, leaves, cu_seqlens, words, known, sum(of_rows))


def results_of(
    problem: Problem, output: torch.Tensor, lse: torch.Tensor, leaves: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Results of the rows that belong to a sequence, and all gradients."""
    output, lse = output[: problem.rows], lse[:, : problem.rows]
    of_output, of_lse = (problem.gradient_of(t) for t in (output, lse))
    total = (output * of_output).sum() + torch.where(lse.isfinite(), lse * of_lse, 0).sum()
    found = torch.autograd.grad(total, list(leaves.values()))
    return {"output": output, "lse": lse, **{f"d_{name}": d for name, d in zip(leaves, found)}}


def run(problem: Problem, backend: str, function: Any = fastattn.attention_varlen) -> dict[str, torch.Tensor]:
    """What the package finds."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in problem.leaves.items()}
    rest = {name: t for name, t in leaves.items() if name not in ("query", "key", "value")}
    output, lse = function(
        *(leaves[name] for name in ("query", "key", "value")), *problem.cu_seqlens, **rest, **problem.words,
        return_lse=True, backend=backend,
    )  # fmt: skip
    return results_of(problem, output, lse, leaves)


def run_reference(problem: Problem, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What is right, in float64, or what plain torch makes of it in another dtype."""
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in problem.leaves.items()}
    words: dict[str, Any] = {
        name: t if t.dim() == 2 else t[None] for name, t in leaves.items() if name in ("alibi_slopes", "sinks")
    }
    if (bias := leaves.get("attn_mask")) is not None:
        words["bias"] = bias[(None,) * (4 - bias.dim())]
    query, key, value, *_ = leaves.values()
    found = reference(query, key, value, *problem.cu_seqlens, **words, **problem.reference_words)
    return results_of(problem, found.output, found.lse, leaves)


def check(case: Case, backend: str, device: Any, function: Any = fastattn.attention_varlen) -> None:
    """Hold every result and every gradient of a case to its error budget.

    The peer's error is a sample of as many roundings as the result has elements. Where these are few, as in the
    gradients of sinks and slopes, it strays from what such roundings lose on average by one part in ``sqrt(2 n)``, and
    three such parts are allowed (as in ``attention_cases.allowances``).
    """
    problem = make_problem(case, device)
    actual = run(problem, backend, function)
    truth, peer = run_reference(problem, torch.float64), run_reference(problem, DTYPES[case.dtype])
    for name, tensor in actual.items():
        rounded = peer[name].to(tensor.dtype)
        stray = 3 / math.sqrt(2 * max(1, tensor.numel()))
        assert_within_budget(
            tensor,
            truth=truth[name],
            peer=rounded,
            name=name,
            allowance=2 * stray * measure_error(rounded.double(), truth[name]).maximum,
            feature="packed",
            backend=backend,
        )
