"""The family ``functions``: scores and masks by a function of the user's, an example of the cookbook to a case.

What such a function captures is learned where it is floating, so that a training step has its gradient too. Beside it
stand FlexAttention with the same function, and what is written without one: a mask or a bias made whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from benchmarks.cases import Case
from benchmarks.cookbook.examples import EXAMPLES, Example, Inputs, Setting, by_name, learned
from benchmarks.families.masks import in_words_of_reference
from benchmarks.families.peers import cannot_compile, compiled, whole_mask
from benchmarks.variants import Family, Step, Variant, Work, differentiated
from fastattn.ops.attention.call import make_call
from fastattn.reference import attention as reference

# So many drafts a step of speculative decoding has at most.
_DRAFTS = 64

Attend = Callable[[Tensor, Tensor, Tensor, Inputs], Tensor]


@dataclasses.dataclass(frozen=True)
class FunctionCase(Case):
    """Attention with the function of an example. ``backward`` is a training step: forward and backward.

    Attributes:
        example: its name.
        batch: sequences.
        heads: of queries, keys and values.
        seqlen: keys, and queries but where these are drafts.
        head_dim: of all three.
    """

    example: str
    batch: int = 2
    heads: int = 8
    seqlen: int = 512
    head_dim: int = 64

    @property
    def name(self) -> str:
        """As in ``functions-t5_bias-b2-h8-l512-d64-train-float32``."""
        size = f"b{self.batch}-h{self.heads}-l{self.seqlen}-d{self.head_dim}"
        return f"{self.family}-{self.example}-{size}-{'train' if self.backward else 'eval'}-{self.dtype_name}"

    def tiny(self) -> FunctionCase:
        return dataclasses.replace(self, batch=1, heads=1, seqlen=4, head_dim=4)

    @property
    def queries(self) -> int:
        """How many a sequence has."""
        return min(_DRAFTS, self.seqlen // 2) if by_name(self.example).drafts else self.seqlen


def inputs(case: FunctionCase, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], Inputs]:
    """Query, key and value as views of ``[B, L, H, D]``, and what the function captures."""
    generator = case.generator()

    def draw(*sizes: int) -> Tensor:
        return case.draw(*sizes, dtype=dtype, generator=generator)

    lengths = (case.queries, case.seqlen, case.seqlen)
    query, key, value = (draw(case.batch, n, case.heads, case.head_dim).transpose(1, 2) for n in lengths)
    setting = Setting(case.batch, case.heads, case.queries, case.seqlen, draw, case.device)
    return (query, key, value), by_name(case.example).inputs(setting)


# ------------------------------------------------------------------------------------------------------------ the steps


def _step(make: Callable[[FunctionCase, Example, torch.dtype], Attend]) -> Callable[[FunctionCase, torch.dtype], Step]:
    def build(case: FunctionCase, dtype: torch.dtype) -> Step:
        qkv, captured = inputs(case, dtype)
        names = learned(captured)
        attend = make(case, by_name(case.example), dtype)

        def function(query: Tensor, key: Tensor, value: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            return (attend(query, key, value, {**captured, **dict(zip(names, tensors))}),)

        return differentiated(function, (*qkv, *(captured[name] for name in names)), case)

    return build


def _ours(case: FunctionCase, example: Example, dtype: torch.dtype) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor, captured: Inputs) -> Tensor:
        return _output(fastattn.attention(query, key, value, **example.arguments(captured)))

    return attend


def _in_words(case: FunctionCase, example: Example, dtype: torch.dtype) -> Attend:
    words = _words(case, example, dtype)

    def attend(query: Tensor, key: Tensor, value: Tensor, captured: Inputs) -> Tensor:
        return _output(fastattn.attention(**_arguments(query, key, value, words(query, key, captured))))

    return attend


def _arguments(query: Tensor, key: Tensor, value: Tensor, words: Inputs) -> Inputs:
    """Of ``fastattn.attention``; the words may hold another query."""
    return {"query": query, "key": key, "value": value, **words}


def _words(case: FunctionCase, example: Example, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Inputs], Inputs]:
    """What replaces the function: made once where nothing of it is learned, else in each step."""
    (query, key, _), captured = inputs(case, dtype)
    if learned(captured):
        return lambda query, key, captured: example.words(query, key, **captured)
    words = example.words(query, key, **captured)
    return lambda query, key, captured: words


def _sdpa(case: FunctionCase, example: Example, dtype: torch.dtype) -> Attend:
    """A mask is made once; a bias that is learned in each step, as the user of SDPA has to."""
    words = _words(case, example, dtype)

    def masked(query: Tensor, key: Tensor, value: Tensor, captured: Inputs) -> tuple[Tensor, Tensor | None]:
        call = make_call(**_arguments(query, key, value, words(query, key, captured)))
        return call.query, whole_mask(call)

    (query, key, value), captured = inputs(case, dtype)
    once = None if learned(captured) else masked(query, key, value, captured)[1]

    def attend(query: Tensor, key: Tensor, value: Tensor, captured: Inputs) -> Tensor:
        query, mask = (query, once) if once is not None else masked(query, key, value, captured)
        return F.scaled_dot_product_attention(query, key, value, mask)

    return attend


def _sdpa_applies(case: FunctionCase) -> str | None:
    return "SDPA has no softcap" if case.example == "softcap" else None


def _flex(case: FunctionCase, example: Example, dtype: torch.dtype) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _, captured = inputs(case, dtype)
    hides = example.arguments(captured).get("mask_mod")
    sizes = case.batch, case.heads, case.queries, case.seqlen
    block_mask = None if hides is None else create_block_mask(hides, *sizes, device=case.device)

    def attend(query: Tensor, key: Tensor, value: Tensor, captured: Inputs) -> Tensor:
        change = example.arguments(captured).get("score_mod")
        return _output(flex_attention(query, key, value, score_mod=change, block_mask=block_mask))

    return compiled(attend)


def _flex_applies(case: FunctionCase) -> str | None:
    if case.backward and torch.device(case.device).type == "cpu":
        return "FlexAttention has no backward on a CPU"
    return cannot_compile(case)


def _eager(case: FunctionCase, example: Example, dtype: torch.dtype) -> Attend:
    """The function once, of all scores at once."""

    def attend(query: Tensor, key: Tensor, value: Tensor, captured: Inputs) -> Tensor:
        scores = (query @ key.mT) * query.shape[-1] ** -0.5
        # [B, 1, 1, 1], [H, 1, 1], [L, 1] and [S]
        indices = [
            torch.arange(size, device=query.device).view(-1, *[1] * (3 - axis))
            for axis, size in enumerate(scores.shape)
        ]
        arguments = example.arguments(captured)
        if "mask_mod" in arguments:
            scores = scores.masked_fill(~arguments["mask_mod"](*indices), float("-inf"))
        else:
            scores = arguments["score_mod"](scores, *indices)
        return torch.softmax(scores, dim=-1).to(value.dtype) @ value

    return attend


def _definition(case: FunctionCase, example: Example, dtype: torch.dtype) -> Attend:
    """The reference of the words."""

    def attend(query: Tensor, key: Tensor, value: Tensor, captured: Inputs) -> Tensor:
        call = make_call(**_arguments(query, key, value, example.words(query, key, **captured)))
        return reference(call.query, call.key, call.value, **in_words_of_reference(call)).output

    return attend


def _output(result: Any) -> Tensor:
    assert isinstance(result, Tensor)
    return result


# ----------------------------------------------------------------------------------------------------- what is expected


def _allowance(case: FunctionCase, result: Tensor) -> float:
    """The gradient of what is learned sums many pairs, one after the other: their errors are a random walk."""
    if result.dim() == 4:
        return 0.0
    pairs = case.batch * case.heads * case.queries * case.seqlen
    return torch.finfo(torch.float32).eps * (pairs / result.numel()) ** 0.5


def work(case: FunctionCase, variant: str) -> Work:
    """Two products of all pairs forward and five more backward, whatever is hidden, and each tensor in and out once."""
    pairs = case.batch * case.heads * case.queries * case.seqlen
    products, passes = (7, 2) if case.backward else (2, 1)
    rows = 2 * (case.queries + case.seqlen) * passes
    return Work(
        flops=float(2 * products * pairs * case.head_dim),
        moved_bytes=case.batch * case.heads * rows * case.head_dim * case.dtype.itemsize,
        formula=f"operations {2 * products} B H L S D; bytes {2 * passes * case.dtype.itemsize} B H (L + S) D",
    )


definition = _step(_definition)

FAMILY = Family(
    "functions",
    (
        Variant("fastattn", _step(_ours)),
        Variant("fastattn-words", _step(_in_words)),
        Variant("flex", _step(_flex), _flex_applies, slow=True),
        Variant("sdpa", _step(_sdpa), _sdpa_applies),
        Variant("eager", _step(_eager)),
    ),
    peer="sdpa",
    reference=definition,
    allowance=_allowance,
    work=work,
)


def quick_cases() -> list[FunctionCase]:
    """Two small ones: a mask in evaluation, and a bias that is learned."""
    sizes = {"batch": 1, "heads": 4, "seqlen": 128, "head_dim": 32}
    return [
        FunctionCase("functions", "prefix_lm", **sizes),
        FunctionCase("functions", "t5_bias", **sizes, backward=True),
    ]


def more_cases() -> list[FunctionCase]:
    """Every example, in evaluation and in training."""
    return [
        FunctionCase("functions", example.name, backward=backward) for example in EXAMPLES for backward in (False, True)
    ]
