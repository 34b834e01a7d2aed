"""Named tuples as arguments of kernels: nested, with None and constants in them, and built inside a kernel.

The kernels rest on this; ``common.arguments`` says which rules of the compiler's it obeys.
"""

from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402

from fastattn_kernels.common.arguments import PerBatch, PerKey, Rules, Sizes, strided  # noqa: E402

pytestmark = pytest.mark.machine


class _Call(NamedTuple):
    rules: Rules
    sizes: Sizes


class _Constants(NamedTuple):
    BLOCK: Any
    DOUBLED: Any


@triton.jit
def _terms(cols, batch, call, constants):
    """The sum of what the rules hold, ``[BLOCK]``."""
    total = tl.zeros([constants.BLOCK], tl.float32)
    inside = cols < call.sizes.seqlen_k
    if call.rules.padding is not None:
        padding = call.rules.padding
        total += tl.load(padding.ptr + batch * padding.stride_b + cols * padding.stride_n, mask=inside, other=0.0)
    if call.rules.prefix is not None:
        total += tl.load(call.rules.prefix.ptr + batch * call.rules.prefix.stride_b)
    if call.rules.softcap is not None:
        total += call.rules.softcap
    if call.sizes.upper is not None:
        total = tl.where(cols <= call.sizes.upper, total, 0.0)
    if constants.DOUBLED:
        total *= 2.0
    return tl.where(inside, total, 0.0)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "lower", "upper", "shift"])
def _terms_kernel(
    out_ptr, rules, seqlen_q, seqlen_k, lower, upper, shift, BLOCK: tl.constexpr, DOUBLED: tl.constexpr
):  # fmt: skip
    """The terms of every key, a batch entry a program, once for each of ``seqlen_q`` rows."""
    call = _Call(rules, Sizes(seqlen_q, seqlen_k, lower, upper, shift))
    batch = tl.program_id(0)
    for start in tl.range(0, seqlen_k, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for row in tl.range(0, seqlen_q):
            if row % 2 == 0:
                total += _terms(cols, batch, call, _Constants(BLOCK, DOUBLED))
            else:
                total += _terms(cols, batch, call, _Constants(BLOCK, DOUBLED))
        tl.store(out_ptr + batch * seqlen_k + cols, total, mask=cols < seqlen_k)


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("upper", [None, 1, 17])
@pytest.mark.parametrize(
    "given", [(), ("softcap",), ("padding",), ("prefix", "softcap"), ("padding", "prefix", "softcap")], ids="-".join
)
def test_kernel_reads_the_fields_of_named_tuples(given, upper, doubled, device):
    """A stride of 1 is a constant in a tuple inside the rules, which triton 3.6 lost inside of loops and branches."""
    batch, rows, keys = 2, 3, 40
    padding = torch.arange(batch * keys, dtype=torch.float32, device=device).view(batch, keys)
    prefix = torch.tensor([1.0, 5.0], device=device)
    rules = Rules(
        padding=strided(PerKey, padding) if "padding" in given else None,
        prefix=strided(PerBatch, prefix) if "prefix" in given else None,
        softcap=0.5 if "softcap" in given else None,
    )
    out = torch.full((batch, keys), torch.nan, device=device)
    _terms_kernel[(batch,)](out, rules, rows, keys, None, upper, 0, BLOCK=16, DOUBLED=doubled)
    expected = torch.zeros(batch, keys, device=device)
    for name, term in (("padding", padding), ("prefix", prefix[:, None]), ("softcap", 0.5)):
        expected = expected + term if name in given else expected
    expected = expected * rows * (2 if doubled else 1)
    if upper is not None:
        expected[:, upper + 1 :] = 0.0
    assert torch.equal(out, expected)
