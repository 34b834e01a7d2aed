"""The family ``additive``: Bahdanau's attention, ``softmax(w . tanh(q_i + k_j)) V`` (arXiv:1409.0473), on one head.

As it is usually written the ``[B, L, S, A]`` tangents are made, and kept for the backward; here they are compared with
what never makes them. The peaks of memory are as telling as the times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.families.peers import cannot_compile, compiled
from benchmarks.variants import Family, Step, Variant, Work, differentiated
from fastattn.ops import additive_attention
from fastattn.reference import additive_attention as reference

# Above this many tangents a variant that makes them all is not worth its minutes and gigabytes.
_MOST_TANGENTS = {"cpu": 1 << 27, "cuda": 1 << 31}

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


@dataclasses.dataclass(frozen=True)
class AdditiveCase(Case):
    """Queries and keys, projected already. ``backward`` is a training step: forward and backward.

    Attributes:
        batch: sequences.
        seqlen: keys, and queries unless there is one.
        size: of the layer that scores them, and of the values.
        step: is there one query alone, as in a decoder's step?
    """

    batch: int
    seqlen: int
    size: int
    step: bool = False

    @property
    def name(self) -> str:
        """As in ``additive-b8-l64-a64-train-float32``, and ``additive-b8-q1-l64-a64-eval-float32`` of one query."""
        step, queries = "train" if self.backward else "eval", "-q1" if self.step else ""
        return f"{self.family}-b{self.batch}{queries}-l{self.seqlen}-a{self.size}-{step}-{self.dtype_name}"

    def tiny(self) -> AdditiveCase:
        return dataclasses.replace(self, batch=1, seqlen=4, size=4)

    @property
    def queries(self) -> int:
        return 1 if self.step else self.seqlen

    @property
    def pairs(self) -> int:
        """Of queries and keys, and so many scores."""
        return self.batch * self.queries * self.seqlen

    @property
    def tangents(self) -> int:
        """How many the scores take."""
        return self.pairs * self.size


def _inputs(case: AdditiveCase, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, key, value and weight."""
    generator, of_keys = case.generator(), (case.batch, case.seqlen, case.size)
    shapes = ((case.batch, case.queries, case.size), of_keys, of_keys, (case.size,))
    return tuple(case.draw(*shape, dtype=dtype, generator=generator) for shape in shapes)


def _step(make: Callable[[AdditiveCase], Attend]) -> Callable[[AdditiveCase, torch.dtype], Step]:
    def build(case: AdditiveCase, dtype: torch.dtype) -> Step:
        return differentiated(make(case), _inputs(case, dtype), case)

    return build


def _ours(case: AdditiveCase) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        output = additive_attention(query, key, value, weight)
        assert isinstance(output, Tensor)
        return (output,)

    return attend


def _ours_compiled(case: AdditiveCase) -> Attend:
    return compiled(_ours(case))


def _eager(case: AdditiveCase) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        scores = torch.tanh(query[:, :, None] + key[:, None]) @ weight
        return (torch.softmax(scores, dim=-1) @ value,)

    return attend


def _compiled(case: AdditiveCase) -> Attend:
    return compiled(_eager(case))


def _definition(case: AdditiveCase) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (reference(query[:, None], key[:, None], value[:, None], weight[None]).output[:, 0],)

    return attend


def _eager_applies(case: AdditiveCase) -> str | None:
    device = torch.device(case.device).type
    most = _MOST_TANGENTS.get(device, _MOST_TANGENTS["cuda"])
    if case.tangents > most:
        return f"makes all {case.tangents} tangents: on {device} only up to {most} are taken"
    return None


def _allowance(case: AdditiveCase, result: Tensor) -> float:
    """A score is summed up over its columns in float32, and the weight's gradient over all pairs; where one after the
    other, the errors are a random walk."""
    terms = case.pairs if result.dim() == 1 else case.size
    return torch.finfo(torch.float32).eps * terms**0.5


def work(case: AdditiveCase, variant: str) -> Work:
    """Operations, a tangent counted as one, and every tensor that comes in or goes out, once.

    The floor that follows is at the rate of matrix products, and no tangent has that: a GPU makes 16 a clock and
    multiprocessor, an eighth of its multiply-adds outside of products. Shares of it compare variants, no more.
    """
    pairs, rows = case.pairs, case.batch * (case.queries + case.seqlen)  # query and output, key and value
    # forward: add, tangent, multiply-add, and the product; backward: 1 - t^2, the three sums, and two products
    of_pair = (12 * case.size + 6 * case.size) if case.backward else (4 * case.size + 2 * case.size)
    of_element = (4 if case.backward else 2) * case.dtype.itemsize
    return Work(
        flops=float(pairs * of_pair),
        moved_bytes=rows * case.size * of_element,
        formula=f"operations {of_pair // case.size} B L S A, a tangent as one; bytes {of_element} B (L + S) A",
    )


FAMILY = Family(
    "additive",
    (
        Variant("fastattn", _step(_ours)),
        Variant("fastattn-compile", _step(_ours_compiled), cannot_compile, slow=True),
        Variant("eager", _step(_eager), _eager_applies),
        Variant("compile", _step(_compiled), cannot_compile, slow=True),
    ),
    peer="eager",
    reference=_step(_definition),
    allowance=_allowance,
    work=work,
)


def of_tangents(tangents: int, seqlen: int, size: int, backward: bool, **options: object) -> AdditiveCase:
    """As large a batch as makes up the tangents."""
    batch = max(1, tangents // (seqlen**2 * size))
    return AdditiveCase("additive", batch, seqlen, size, backward=backward, **options)  # type: ignore[arg-type]


def quick_cases() -> list[AdditiveCase]:
    """Two small ones: an evaluation and a training step."""
    return [of_tangents(1 << 22, 64, 128, backward) for backward in (False, True)]


def more_cases() -> list[AdditiveCase]:
    """A decoder's step, few short sentences, and from short sentences to long ones, in layers of usual sizes and in 16
    bits."""
    small = [
        AdditiveCase("additive", batch, seqlen, size, backward=backward, step=step)
        for batch, seqlen, size, step in (
            (4, 16, 64, True),
            (8, 64, 128, True),
            (64, 64, 256, True),
            (1, 16, 64, False),
            (8, 16, 64, False),
            (1, 64, 256, False),
        )
        for backward in (False, True)
    ]
    cases = [
        of_tangents(1 << 25, seqlen, size, backward)
        for seqlen in (64, 256, 512)
        for size in (64, 256)
        for backward in (False, True)
    ]
    narrow = [of_tangents(1 << 25, 256, 128, backward, dtype=torch.bfloat16) for backward in (False, True)]
    return [*small, *cases, *narrow]
