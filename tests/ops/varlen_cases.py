"""Calls over packed sequences, features by name, and how they are held against the reference."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

import fastattn
from fastattn.ops.attention import dropout
from fastattn.ops.attention.varlen import operator
from fastattn.ops.attention.varlen.call import make_call
from fastattn.reference import attention_varlen as reference
from fastattn.testing import assert_within_budget, random_tensor
from tests.ops import attention_cases

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TENSORS = ("query", "key", "value")
# Rows and keys of each sequence, and how many lie behind the last one.
Lengths = tuple[list[int], list[int], int]
LENGTHS: dict[str, Lengths] = {
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
    "layout": ("dense", "heads_first", "every_other"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: a level of each axis; the fuzzer draws lengths, dropout, garbage and seeds as well."""

    lengths: str | Lengths = "same"
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
    layout: str = "dense"
    dropout: float = 0.0
    garbage: str | None = None  # what stands where nobody may see it inside a sequence; outside there always is NaN
    seed: int = 0  # another one draws other numbers

    @property
    def id(self) -> str:
        """The levels that are not plain."""
        told = [(f.name, level) for f in dataclasses.fields(self) if (level := getattr(self, f.name)) != f.default]
        return " ".join(f"{name}-{level}" for name, level in told).replace("'", "") or "plain"

    @property
    def parts(self) -> Lengths:
        """Rows and keys of each sequence, and how many lie behind the last one."""
        return LENGTHS[self.lengths] if isinstance(self.lengths, str) else self.lengths

    @property
    def makes_sense(self) -> bool:
        """Does every level that is not plain change anything?"""
        bounded = self.causal or self.window is not None
        return (
            (bounded or self.garbage is None)
            and (bounded or self.prefix is None)
            and (bounded or bool(self.alibi) or self.alignment == "top_left")
        )

    @property
    def cost(self) -> float:
        """About how many tiles of scores a kernel visits, as :attr:`attention_cases.Case.cost`."""
        tiles = sum(-(-rows // 64) * -(-keys // 32) for rows, keys in zip(*self.parts[:2]))
        return self.heads[0] * tiles * (32 + max(self.widths)) / 96 * (4 if self.dropout else 1)


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
    of_rows, of_keys, rest = case.parts
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
    for name in TENSORS:
        leaves[name] = laid_out(leaves[name], case.layout)
    return Problem(case, leaves, cu_seqlens, words, known, sum(of_rows))


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers ``[T, H, D]`` with other strides."""
    if layout == "heads_first":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return tensor.repeat_interleave(2, dim=2)[..., ::2] if layout == "every_other" else tensor


def results_of(
    problem: Problem, output: torch.Tensor, lse: torch.Tensor, leaves: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Results of the rows that belong to a sequence, and all gradients."""
    output, lse = output[: problem.rows], lse[:, : problem.rows]
    of_output, of_lse = (problem.gradient_of(t) for t in (output, lse))
    total = (output * of_output).sum() + torch.where(lse.isfinite(), lse * of_lse, 0).sum()
    total = total + sum(leaf[:0].sum() for leaf in leaves.values())  # 0: no sequence may read a leaf
    found = torch.autograd.grad(total, list(leaves.values()))
    return {"output": output, "lse": lse, **{f"d_{name}": d for name, d in zip(leaves, found)}}


# ------------------------------------------------------------------------------------------------ sequence by sequence


class Alone(NamedTuple):
    """A sequence that has rows and keys, and the call of ``attention`` that it is by itself, of views."""

    number: int
    rows: slice
    keys: slice
    problem: attention_cases.Problem

    def of_pairs(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a tensor that broadcasts to ``[N, H, longest, longest]`` has for the pairs of the sequence."""
        tensor = tensor[(None,) * (4 - tensor.dim())]
        own = tensor if len(tensor) == 1 else tensor[self.number : self.number + 1]
        return own[:, :, : self.rows.stop - self.rows.start, : self.keys.stop - self.keys.start]


def each_alone(problem: Problem) -> Iterator[Alone]:
    case, leaves, words = problem.case, problem.leaves, problem.words
    (cu_rows, cu_keys), used = (t.tolist() for t in problem.cu_seqlens), words.get("seqused_k")
    query = leaves["query"]
    d_output = problem.gradient_of(query.new_empty(problem.rows, case.heads[0], case.widths[1]))
    d_lse = problem.gradient_of(query.new_empty(case.heads[0], problem.rows))
    for number, (row, key) in enumerate(zip(cu_rows[:-1], cu_keys[:-1])):
        rows = slice(row, cu_rows[number + 1])
        keys = slice(key, cu_keys[number + 1] if used is None else key + int(used[number]))
        seqlen_q, seqlen_k = rows.stop - rows.start, keys.stop - keys.start
        if not seqlen_q or not seqlen_k:
            continue
        own = attention_cases.Case(
            dtype=case.dtype, causal=case.causal, alignment=case.alignment, window=case.window, softcap=case.softcap,
            scale=case.scale, heads=case.heads, dropout=case.dropout, outputs="lse", garbage=case.garbage,
            seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=case.widths[0],
        )  # fmt: skip
        slopes, prefix = leaves.get("alibi_slopes"), words.get("prefix")
        alone = attention_cases.Problem(
            own,
            *(leaves[name][part].transpose(0, 1)[None] for name, part in zip(TENSORS, (rows, keys, keys))),
            attn_mask=None,
            alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[number : number + 1],
            sinks=leaves.get("sinks"),
            key_padding_mask=None,
            prefix=prefix[number : number + 1] if isinstance(prefix, torch.Tensor) else prefix,
            document_ids=None,
            d_output=d_output[rows].transpose(0, 1)[None],
            d_weights=None,
            d_lse=d_lse[None, :, rows],
        )
        found = Alone(number, rows, keys, alone)
        if (mask := leaves.get("attn_mask", words.get("attn_mask"))) is not None:
            alone.attn_mask = found.of_pairs(mask)
        yield found


def hiding(problem: Problem) -> Problem:
    """The problem with the case's garbage wherever nobody may see it."""
    if problem.case.garbage is None:
        return problem
    leaves = problem.leaves | {name: problem.leaves[name].clone() for name in TENSORS}
    for alone in each_alone(problem):
        hidden = attention_cases.hiding(alone.problem)
        for name, part in zip(TENSORS, (alone.rows, alone.keys, alone.keys)):
            leaves[name][part] = getattr(hidden, name)[0].transpose(0, 1)
    return dataclasses.replace(problem, leaves=leaves)


def allowances(problem: Problem, keep: torch.Tensor | None) -> dict[str, float]:
    """What attention may lose, see :func:`attention_cases.allowances`: at most in a sequence, or in all of them."""
    found: dict[str, list[float]] = {}
    for alone in each_alone(problem):
        own = None if keep is None else alone.of_pairs(keep)
        for name, allowed in attention_cases.allowances(alone.problem, own).items():
            found.setdefault(name, []).append(allowed)
    shared = ("d_attn_mask", "d_alibi_slopes", "d_sinks")
    return {name: sum(each) if name in shared else max(each) for name, each in found.items()}


# -------------------------------------------------------------------------------------------------------- the two sides


def run(
    problem: Problem, backend: str, function: Any = fastattn.attention_varlen
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """What the package finds, and what dropout kept: boolean ``[N, H, longest, longest]``."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in problem.leaves.items()}
    arguments: dict[str, Any] = {**leaves, **problem.words, "return_lse": True}
    tensors = (*(arguments.pop(name) for name in TENSORS), *problem.cu_seqlens)
    if not problem.case.dropout:
        output, lse = function(*tensors, **arguments, backend=backend)
        return results_of(problem, output, lse, leaves), None
    # Below the public function, where the state is known.
    call = make_call(*tensors, **arguments, dropout_p=problem.case.dropout)
    size = (2 if backend == "triton" else 1,)
    state = torch.randint(0, 2**31 - 1, size, generator=torch.Generator().manual_seed(problem.case.seed))
    output, lse = operator.apply(call, state.to(call.device), backend)
    assert lse is not None
    keep = kept_weights(problem, state.to(call.device), backend)
    return results_of(problem, output[0].transpose(0, 1), lse[0], leaves), keep


def kept_weights(problem: Problem, state: torch.Tensor, backend: str) -> torch.Tensor:
    """Boolean ``[N, H, longest, longest]``: what a dropout state keeps of each sequence."""
    (heads, _), rows, keys = problem.case.heads, *(max(each, default=0) for each in problem.case.parts[:2])
    keep = torch.ones(len(problem.case.parts[0]), heads, rows, keys, dtype=torch.bool, device=state.device)
    if backend == "triton":
        from fastattn_kernels.attention.weights import launch_dropout_keep

        launch_dropout_keep(state, problem.case.dropout, keep)
        return keep
    for alone in each_alone(problem):
        own = alone.of_pairs(keep)
        parts = slice(0, 1), *(slice(0, size) for size in own.shape[2:])
        own[:] = dropout.kept(state + alone.number, problem.case.dropout, heads, *parts)
    return keep


def run_reference(problem: Problem, keep: torch.Tensor | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What is right, in float64, or what plain torch makes of it in another dtype."""
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in problem.leaves.items()}
    words: dict[str, Any] = {
        name: t if t.dim() == 2 else t[None] for name, t in leaves.items() if name in ("alibi_slopes", "sinks")
    }
    if (bias := leaves.get("attn_mask")) is not None:
        words["bias"] = bias[(None,) * (4 - bias.dim())]
    query, key, value, *_ = leaves.values()
    words |= {**problem.reference_words, "dropout_keep": keep, "dropout_p": problem.case.dropout}
    found = reference(query, key, value, *problem.cu_seqlens, **words)
    return results_of(problem, found.output, found.lse, leaves)


def check(feature: str, case: Case, backend: str, device: Any, function: Any = fastattn.attention_varlen) -> None:
    """Hold every result and every gradient of a case to its error budget."""
    problem = make_problem(case, device)
    actual, keep = run(hiding(problem), backend, function)
    truth, peer = (run_reference(problem, keep, dtype) for dtype in (torch.float64, DTYPES[case.dtype]))
    allowed = allowances(problem, keep)
    for name, tensor in actual.items():
        assert_within_budget(
            tensor,
            truth=truth[name],
            peer=peer[name].to(tensor.dtype),
            name=name,
            allowance=allowed.get(name, 0.0),
            feature=feature,
            backend=backend,
        )
