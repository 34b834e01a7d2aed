"""Attention over parts of the keys: merged outputs and added gradients are those of the whole, on every backend."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import fastattn
from fastattn.ops.attention import partial
from fastattn.ops.attention.call import make_call
from fastattn.ops.attention.contract import Kept, Needs, OutputGradients
from fastattn.ops.attention.operator import operands

ROWS, CUTS = 20, (0, 9, 10, 33)


def by_parts(call, backend, d_output, d_lse):
    """``(output, lse, d_query, d_key, d_value, d_bias, d_sinks)`` of a call whose keys are cut into parts."""
    inputs, options = operands(call, None, backend, keeps_statistics=True)
    assert inputs.bias is not None and inputs.sinks is not None and options.upper is not None
    spans = [slice(start, stop) for start, stop in itertools.pairwise(CUTS)]
    parts = []
    for keys in spans:
        own = inputs._replace(
            key=inputs.key[:, :, keys], value=inputs.value[:, :, keys], bias=inputs.bias[..., keys], sinks=None
        )
        parts.append((own, options._replace(upper=options.upper - keys.start, shift=options.shift - keys.start)))
    merge = partial.Merge(inputs.query, inputs.value.shape[3])
    for own, rules in parts:
        merge.add(*partial.forward(own, rules), slice(0, ROWS))
    output, lse = merge.finish(inputs.sinks)
    row = partial.row_of(OutputGradients(d_output, d_lse, None), Kept(output.to(inputs.query.dtype), lse))
    found = [partial.backward(row, Needs(True, False, False, False), own, rules) for own, rules in parts]
    d_query = torch.stack([gradients.d_query for gradients in found]).sum(dim=0)
    d_key, d_value = (torch.cat([getattr(g, name) for g in found], dim=2) for name in ("d_key", "d_value"))
    d_bias = torch.cat([gradients.d_bias for gradients in found], dim=3)
    return output, lse, d_query, d_key, d_value, d_bias, partial.sink_gradients(inputs.sinks, row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("with_lse", [False, True], ids=["output", "lse"])
def test_parts_are_the_whole(dtype, with_lse, backend, device):
    """Rows that see nothing of a part, and rows that see nothing at all but the sink, among them."""
    torch.manual_seed(3)
    query = torch.randn(2, 4, ROWS, 16, device=device).to(dtype)
    key, value = (torch.randn(2, 2, CUTS[-1], 16, device=device).to(dtype) for _ in range(2))
    bias, sinks = torch.randn(4, ROWS, CUTS[-1], device=device), torch.randn(4, device=device)
    bias[:, 3] = float("-inf")
    d_output, d_lse = torch.randn_like(query), torch.randn(2, 4, ROWS, device=device) if with_lse else None
    words: Any = {"is_causal": True, "causal_alignment": "bottom_right", "softcap": 5.0}

    leaves = [t.double().requires_grad_() for t in (query, key, value, bias, sinks)]
    output, lse = fastattn.attention(
        *leaves[:3], attn_mask=leaves[3], sinks=leaves[4], **words, return_lse=True, backend="torch"
    )
    loss = (output * d_output).sum() + (0 if d_lse is None else (lse * d_lse).sum())
    expected = [output.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]

    call = make_call(query, key, value, attn_mask=bias, sinks=sinks, **words)
    for number, (ours, truth) in enumerate(zip(by_parts(call, backend, d_output, d_lse), expected)):
        assert ours.dtype == torch.float32  # of 16-bit inputs, too
        # float32 products on a GPU, and bfloat16 weights in the kernels, have their own rounding
        most = 1e-2 if dtype == torch.bfloat16 else 5e-6
        error = (ours.double() - truth.view(ours.shape)).abs().max() / truth.abs().max().clamp(min=1)
        assert error <= most, number
