"""The family ``norm``: a residual add and the norm of the sum, both kept, as in pre-norm layers (arXiv:2002.04745), and
norms alone.

A step is the forward, or the backward alone: its graph is made before, and each step goes through it again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from benchmarks.cases import Kind, NormCase
from benchmarks.families.peers import cannot_compile, compiled, imported, not_at_hand
from benchmarks.variants import Family, Step, Variant, Work, backward_alone, differentiated
from fastattn.reference import add_norm

_EPS = 1e-5
_WITH_RESIDUAL = "is measured with a residual"
_LIGER_LIMIT = 65536  # its kernels hold a row in one block

# (x, residual, weight[, bias]) -> (y, r'), or, of a norm alone, (x, weight[, bias]) -> (y,)
Norm = Callable[..., tuple[Tensor, ...]]


def _inputs(case: NormCase, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """``x``, ``residual``, unless the norm is alone, the weight and, in a layer norm, the bias."""
    generator = case.generator()
    shape, vectors = (case.rows, case.size), 2 if case.kind == "layer" else 1
    x = case.draw(*shape, dtype=dtype, generator=generator)
    residual = case.draw(*shape, dtype=_of_residual(case, dtype), generator=generator)
    rows = (x,) if case.alone else (x, residual)
    return *rows, *(case.draw(case.size, dtype=dtype, generator=generator) for _ in range(vectors))


def _of_residual(case: NormCase, dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, case.residual_dtype)


def _step(make: Callable[[NormCase], Norm]) -> Callable[[NormCase, torch.dtype], Step]:
    def build(case: NormCase, dtype: torch.dtype) -> Step:
        norm, inputs = make(case), _inputs(case, dtype)
        return _backward(case, norm, inputs) if case.backward else differentiated(norm, inputs, case)

    return build


def _backward(case: NormCase, norm: Norm, inputs: tuple[Tensor, ...]) -> Step:
    generator = case.generator(1)
    return backward_alone(norm, inputs, lambda t: case.draw(*t.shape, dtype=t.dtype, generator=generator))


# ---------------------------------------------------------------------------------------------------------- definition


def _definition(case: NormCase, keep: Tensor | None = None) -> Norm:
    def norm(x: Tensor, residual: Tensor | None, *vectors: Tensor) -> tuple[Tensor, ...]:
        call = {"kind": case.kind, "eps": _EPS, "dropout_keep": keep, "dropout_p": case.dropout_p}
        return tuple(add_norm(x, residual, *vectors, **call))

    return (lambda x, *vectors: norm(x, None, *vectors)[:1]) if case.alone else norm


def _observed(case: NormCase, results: tuple[Tensor, ...]) -> Callable[[NormCase, torch.dtype], Step]:
    """The definition with the elements that dropout kept: those that changed the residual, or have a gradient."""
    keep = results[1] != _inputs(case, case.dtype)[1]
    if case.backward:  # a small element changes no large residual, and a gradient may be zero: seldom both at once
        keep |= results[2] != 0
    share, expected = keep.double().mean().item(), 1 - case.dropout_p
    if abs(share - expected) > 5 * (expected * case.dropout_p / keep.numel()) ** 0.5 + 5e-3:  # those that 16 bits hide
        raise ValueError(f"dropout keeps {share:.4f} of the elements, where {expected:g} was asked for")
    return _step(functools.partial(_definition, keep=keep))


def _allowance(case: NormCase, result: Tensor) -> float:
    """A vector's gradient sums the rows in float32; where one after the other, its errors are a random walk."""
    return torch.finfo(torch.float32).eps * case.rows**0.5 if result.dim() == 1 else 0.0


# ------------------------------------------------------------------------------------------------------------ variants


def _ours(case: NormCase) -> Norm:
    if case.alone:
        function: Callable[..., Tensor] = fastattn.layer_norm if case.kind == "layer" else fastattn.rms_norm
        return lambda x, *vectors: (function(x, (case.size,), *vectors, eps=_EPS),)
    norm: Callable[..., Any] = fastattn.add_layer_norm if case.kind == "layer" else fastattn.add_rms_norm

    def returning_both(x: Tensor, residual: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
        return norm(x, residual, *vectors, eps=_EPS, dropout_p=case.dropout_p, return_residual=True)

    return returning_both


def _eager(case: NormCase) -> Norm:
    if case.alone:
        function: Callable[..., Tensor] = F.layer_norm if case.kind == "layer" else F.rms_norm
        return lambda x, *vectors: (function(x, (case.size,), *vectors, eps=_EPS),)

    def norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = residual + (F.dropout(x, case.dropout_p) if case.dropout_p else x)
        # torch's norms take one dtype
        weight, bias = weight.to(total.dtype), None if bias is None else bias.to(total.dtype)
        if case.kind == "layer":
            output = F.layer_norm(total, weight.shape, weight, bias, _EPS)
        else:
            output = F.rms_norm(total, weight.shape, weight, _EPS)
        return output.to(x.dtype), total

    return norm


def _compiled(case: NormCase) -> Norm:
    return compiled(_eager(case))


def _ours_compiled(case: NormCase) -> Norm:
    return compiled(_ours(case))


def _liger(case: NormCase) -> Norm:
    liger = imported("liger_kernel.transformers.functional", "liger-kernel")
    if case.kind == "rms":
        # "gemma" is what the others compute too: one rounding, at the end
        return functools.partial(liger.liger_fused_add_rms_norm, eps=_EPS, casting_mode="gemma", in_place=False)

    def norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual  # its layer norm adds nothing
        return liger.liger_layer_norm(total, weight, bias, _EPS), total

    return norm


def _liger_applies(case: NormCase) -> str | None:
    if (reason := not_at_hand("liger_kernel", "liger-kernel", case)) is not None:
        return reason
    if case.alone:
        return _WITH_RESIDUAL
    if case.wide_residual:
        return "its residual has the dtype of x"
    if case.dropout_p:
        return "has no dropout"
    return f"takes rows of up to {_LIGER_LIMIT} elements" if case.size > _LIGER_LIMIT else None


def _quack(case: NormCase) -> Norm:
    rmsnorm = imported("quack", "quack-kernels").rmsnorm

    def norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return rmsnorm(x, weight, residual=residual, eps=_EPS, prenorm=True)

    return norm


def _quack_applies(case: NormCase) -> str | None:
    if (reason := not_at_hand("quack", "quack-kernels", case)) is not None:
        return reason
    if torch.cuda.get_device_capability(case.device) < (9, 0):
        return "needs compute capability 9.0"
    if case.kind == "layer":
        return "its layer norm has no residual and no gradient"
    if case.alone:
        return _WITH_RESIDUAL
    return "has no dropout" if case.dropout_p else None


# ------------------------------------------------------------------------------------------------------------ the work


def work(case: NormCase, variant: str) -> Work:
    """Every tensor that comes in or goes out, once; the two numbers a row that may be kept are left out. No operations.

    Forward ``x, residual, weight, bias -> y, r'``. Backward ``dy, dr', r', weight -> dresidual, dweight, dbias``,
    and ``dx`` where dropout or its dtype makes it another tensor than ``dresidual``. Alone ``x, weight, bias -> y`` and
    ``dy, x, weight -> dx, dweight, dbias``.
    """
    narrow, wide = case.dtype.itemsize, case.residual_dtype.itemsize
    vectors = 2 if case.kind == "layer" else 1
    if case.alone:
        element = (3 if case.backward else 2) * narrow
        vectors += case.backward
    elif case.backward:
        element = narrow + 3 * wide + (narrow if case.dropout_p or wide != narrow else 0)
        vectors += 1
    else:
        element = 2 * narrow + 2 * wide
    moved = case.rows * case.size * element + vectors * case.size * narrow
    return Work(moved_bytes=moved, formula=f"bytes {element} M N + {vectors * narrow} N")


FAMILY = Family(
    "norm",
    (
        Variant("fastattn", _step(_ours)),
        Variant("eager", _step(_eager)),
        Variant("compile", _step(_compiled), cannot_compile, slow=True),
        Variant("fastattn-compile", _step(_ours_compiled), cannot_compile, slow=True),
        Variant("liger", _step(_liger), _liger_applies),
        Variant("quack", _step(_quack), _quack_applies),
    ),
    peer="eager",
    reference=_step(_definition),
    allowance=_allowance,
    work=work,
    observed=_observed,
    replays=lambda case: not case.backward,
)


def of_elements(elements: int, kind: Kind, size: int, **options: Any) -> NormCase:
    """As many rows of this size as make up the elements."""
    return NormCase("norm", kind, max(1, elements // size), size, **options)


def quick_cases() -> list[NormCase]:
    """From short rows to long ones, each tensor of 8 MiB."""
    cases = [
        of_elements(1 << 21, kind, size, backward=backward)
        for size in (64, 4096, 65536)
        for kind in get_args(Kind)
        for backward in (False, True)
    ]
    return [*cases, of_elements(1 << 21, "layer", 4096, dtype=torch.bfloat16)]


def more_cases() -> list[NormCase]:
    """Every other power of two, two sizes that are none, a residual in float32, dropout; few rows, 16 bits, alone."""
    both = [(kind, backward) for kind in get_args(Kind) for backward in (False, True)]
    sizes = (256, 512, 769, 1024, 4097, 16384, 262144)
    cases = [of_elements(1 << 22, kind, size, backward=backward) for size in sizes for kind, backward in both]
    for kind, backward in both:
        options = {"backward": backward, "dtype": torch.bfloat16}
        cases.append(of_elements(1 << 22, kind, 4096, wide_residual=True, **options))
        cases.append(of_elements(1 << 22, kind, 4096, dropout_p=0.1, **options))
        for rows, size in ((4, 64), (64, 256), (512, 768)):
            cases += [NormCase("norm", kind, rows, size, backward=backward, alone=alone) for alone in (False, True)]
        for dtype in (torch.bfloat16, torch.float16):
            cases.append(of_elements(1 << 21, kind, 1024, backward=backward, dtype=dtype, alone=True))
    return cases
