"""Calls over a key/value cache, features by name, and how they are held against the reference."""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import torch

import fastattn
from fastattn.reference import attention_with_kvcache as reference
from fastattn.testing import assert_within_budget, measure_error, random_tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# How many tokens each sequence holds before the call.
HELD: dict[str, list[int]] = {
    "alike": [37, 37, 37],
    "ragged": [0, 21, 60, 16],
    "one": [45],
}
AXES: dict[str, tuple[Any, ...]] = {
    "held": tuple(HELD),
    "length": (1, 3, 9),
    "new": (True, False),
    "dtype": tuple(DTYPES),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "widths": ((16, 16), (10, 20)),
    "page_size": (None, 16, 7),
    "layout": ("heads", "slots"),
    "shared": (False, True),
    "padding": (False, True),
    "rotary": (None, "halves", "interleaved"),
    "causal": (True, False),
    "window": (None, (5, None), (19, 2), (3, 0)),
    "alibi": (False, "heads", "each"),
    "softcap": (None, 1.5),
    "sinks": (False, True),
    "bias": (None, "each", "slots", "bool"),
    "scale": (None, -0.3),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: a level of each axis; the fuzzer draws what is held, sizes, splits and seeds as well."""

    held: str | tuple[int, ...] = "alike"
    length: int = 1
    new: bool = True
    dtype: str = "fp32"
    heads: tuple[int, int] = (2, 2)
    widths: tuple[int, int] = (16, 16)
    page_size: int | None = None
    layout: str = "heads"
    shared: bool = False
    padding: bool = False
    rotary: str | None = None
    causal: bool = True
    window: Any = None
    alibi: Any = False
    softcap: float | None = None
    sinks: bool = False
    bias: str | None = None
    scale: float | None = None
    num_splits: int = 0
    seed: int = 0  # another one draws other numbers
    dropout = 0.0  # there is none over a cache

    @property
    def id(self) -> str:
        """The levels that are not the plain ones."""
        told = [(f.name, level) for f in dataclasses.fields(self) if (level := getattr(self, f.name)) != f.default]
        return " ".join(f"{name}-{level}" for name, level in told).replace("'", "") or "plain"

    @property
    def tokens(self) -> list[int]:
        """How many tokens each sequence holds before the call."""
        return HELD[self.held] if isinstance(self.held, str) else list(self.held)

    @property
    def room(self) -> int:
        """How many slots a sequence of a contiguous cache has."""
        return max([60, *self.tokens]) + max(10, self.length)

    @property
    def makes_sense(self) -> bool:
        """Does a call have all these levels?"""
        if self.rotary is not None and (not self.new or self.widths[0] < 4):
            return False
        return not self.shared or self.page_size is not None

    @property
    def cost(self) -> float:
        """About how many tiles of scores a kernel visits, as :attr:`attention_cases.Case.cost`."""
        tiles = sum(1 + tokens // 32 for tokens in self.tokens)
        return tiles * self.heads[1] * (1 + self.length * (self.heads[0] // self.heads[1]) // 16)


@dataclasses.dataclass
class Problem:
    """The tensors of a case: those with gradients, the caches, which are written, and the other words."""

    leaves: dict[str, torch.Tensor]
    caches: dict[str, torch.Tensor]
    words: dict[str, Any]

    def arguments(self, dtype: torch.dtype | None = None, *, gradients: bool = True) -> dict[str, Any]:
        """Copies of all, the floating tensors in another dtype if there is one."""

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            # strides stay: torch.clone keeps those of a dense tensor, whatever the order of its dimensions
            return tensor.clone() if dtype is None or not tensor.is_floating_point() else tensor.to(dtype).clone()

        leaves = {name: copy(t).requires_grad_(gradients) for name, t in self.leaves.items()}
        caches = {name: copy(t) for name, t in self.caches.items()}
        words = {name: copy(t) if isinstance(t, torch.Tensor) else t for name, t in self.words.items()}
        return {**leaves, **caches, **words}


def make_problem(case: Case, device: Any = "cpu") -> Problem:
    """Random tensors. What no sequence holds, and padding, is NaN."""
    seeds = iter(range(zlib.crc32(case.id.encode()) % 1000, 10**6))
    held, (heads, kv_heads), (width, value_width) = case.tokens, case.heads, case.widths
    batch, length, dtype, room = len(held), case.length, DTYPES[case.dtype], case.room

    def draw(*shape: int) -> torch.Tensor:
        return random_tensor(*shape, seed=next(seeds), dtype=dtype, device=device)

    leaves = {"query": draw(batch, heads, length, width)}
    if case.new:
        leaves["key"] = draw(batch, kv_heads, length, width)
        leaves["value"] = draw(batch, kv_heads, length, value_width)
    words: dict[str, Any] = {"cache_seqlens": torch.tensor(held, dtype=torch.int32, device=device)}
    words |= {"is_causal": case.causal, "window": case.window, "softcap": case.softcap, "scale": case.scale}
    padding = [min(tokens, 2 + 4 * number) if case.padding else 0 for number, tokens in enumerate(held)]
    if case.padding:
        words["cache_leftpad"] = torch.tensor(padding, dtype=torch.int32, device=device)
    shape = (batch, kv_heads, room)
    if case.page_size is not None:
        in_sequence = -(-room // case.page_size)
        pages = batch * in_sequence + 3  # some belong to nobody
        shape = (pages, kv_heads, case.page_size)
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(next(seeds)))
        table = order[: batch * in_sequence].view(batch, in_sequence).to(torch.int32)
        if case.shared:  # the pages that are full of tokens that all sequences have
            table[:, : min(held) // case.page_size] = table[:1, : min(held) // case.page_size].clone()
        words["block_table"] = table.to(device)
        room = in_sequence * case.page_size
    caches = {}
    for name, size in (("key_cache", width), ("value_cache", value_width)):
        cache = draw(*shape, size)
        if case.layout == "slots":
            cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
        in_use = torch.zeros(shape[0], shape[2], dtype=torch.bool)
        for number, (tokens, skipped) in enumerate(zip(held, padding)):
            for slot in range(skipped, tokens):
                if case.page_size is None:
                    in_use[number, slot] = True
                else:
                    in_use[int(words["block_table"][number, slot // case.page_size]), slot % case.page_size] = True
        caches[name] = cache.masked_fill_(~in_use[:, None, :, None].to(device), torch.nan)
    if case.rotary is not None:
        angles = draw(room, width // 2 - 1) * 3.0
        words |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
        words["rotary_interleaved"] = case.rotary == "interleaved"
    if case.alibi:
        leaves["alibi_slopes"] = draw(*(() if case.alibi == "heads" else (batch,)), heads).abs()
    if case.sinks:
        leaves["sinks"] = draw(heads)
    if case.bias == "bool":
        words["attn_mask"] = draw(heads, length, room) < 0.8
    elif case.bias is not None:
        leaves["attn_mask"] = draw(*((batch, heads, length, room) if case.bias == "each" else (batch, 1, 1, room)))
    return Problem(leaves, caches, words)


def results_of(arguments: dict[str, Any], output: torch.Tensor, lse: torch.Tensor) -> dict[str, torch.Tensor]:
    """Results, caches, and the gradients of all that has one."""
    found = {"output": output, "lse": lse}
    leaves = {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    if leaves:
        of_output, of_lse = (
            random_tensor(*t.shape, seed=77 + t.dim(), dtype=torch.float32).to(t.device, t.dtype) for t in (output, lse)
        )
        total = (output * of_output).sum() + torch.where(lse.isfinite(), lse * of_lse, 0).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        for (name, leaf), gradient in zip(leaves.items(), gradients):
            found[f"d_{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def check_gradients(case: Case, backend: Any, device: Any = "cpu") -> None:
    """Hold a call in float64, and all its gradients, against the reference: nothing is rounded that needs a budget."""
    problem = make_problem(case, device)
    arguments, known = problem.arguments(torch.float64), problem.arguments(torch.float64)
    attend: Any = fastattn.attention_with_kvcache
    actual = results_of(arguments, *attend(**arguments, return_lse=True, backend=backend))
    expected = results_of(known, *reference(**known)[:2])
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-10)


def check(feature: str, case: Case, backend: Any, device: Any = "cpu", *, gradients: bool | None = None) -> None:
    """Hold every result of a case to its error budget; the caches hold the new tokens after it.

    Args:
        feature: a word for what is tested.
        case: of the call.
        backend: that runs it.
        device: where the tensors lie.
        gradients: whether gradients are held to budgets as well. None: on the torch backend they are checked in
            float64. The roundings of a call drawn at random would need such allowances as ``attention_cases`` derives,
            and of ``attention``'s calls this one consists.
    """
    if gradients is None and backend == "torch":
        check_gradients(case, backend, device)
    problem = make_problem(case, device)
    arguments = problem.arguments(gradients=gradients is True)
    attend: Any = fastattn.attention_with_kvcache
    output, lse = attend(**arguments, num_splits=case.num_splits, return_lse=True, backend=backend)
    actual = results_of(arguments, output, lse)
    known = []
    for dtype in (torch.float64, DTYPES[case.dtype]):
        in_dtype = problem.arguments(dtype, gradients=gradients is True)
        result = reference(**in_dtype)
        known.append((results_of(in_dtype, result.output, result.lse), result))
    (truth, exact), (peer, rounded) = known
    for name in ("key_cache", "value_cache"):
        assert_within_budget(
            arguments[name].nan_to_num(1e4), truth=getattr(exact, name).detach().nan_to_num(1e4),
            peer=getattr(rounded, name).detach().nan_to_num(1e4), name=name, backend=backend,
        )  # fmt: skip
    for name, tensor in actual.items():
        of_peer = peer[name].to(tensor.dtype)
        # of few elements the peer's error is a poor measure of what roundings lose: see varlen_cases.check
        stray = 2 * 3 / math.sqrt(2 * max(1, tensor.numel())) * measure_error(of_peer.double(), truth[name]).maximum
        assert_within_budget(
            tensor, truth=truth[name], peer=of_peer, name=name, allowance=stray, backend=backend, feature=feature
        )
