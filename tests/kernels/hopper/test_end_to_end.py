"""The public function on Gluon's kernels: forward and gradients, beside plain Triton's."""

import pytest
import torch

import fastattn
from fastattn.reference import attention as reference
from fastattn.testing import assert_within_budget, attention_inputs
from tests import machines

pytestmark = pytest.mark.skipif(not machines.RUNS_GLUON, reason=machines.NO_GLUON)


@pytest.mark.machine
@pytest.mark.parametrize("deterministic", [True, False], ids=["pair", "one_pass"])
def test_attention_grad_on_gluon_matches_reference(deterministic, device):
    tensors = attention_inputs(1, 2, 70, 90, 64, kv_heads=1, dtype=torch.bfloat16, seed=3, device=device)
    d_output = torch.randn(1, 2, 70, 64, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    padding = torch.arange(90, device=device)[None] >= 75

    def gradients(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        output = function(*leaves)
        return output.detach(), *torch.autograd.grad(output, leaves, d_output.to(dtype))

    def ours(*qkv):
        return fastattn.attention(*qkv, is_causal=True, key_padding_mask=padding, backend="triton")

    def theirs(*qkv):
        return reference(*qkv, upper=0, key_padding_mask=padding).output

    with fastattn.use_kernels("gluon", deterministic=deterministic):
        found = gradients(ours, torch.bfloat16)
    truths, peers = gradients(theirs, torch.float64), gradients(theirs, torch.bfloat16)
    for name, tensor, truth, peer in zip(("output", "dq", "dk", "dv"), found, truths, peers):
        assert_within_budget(tensor, truth=truth, peer=peer, name=name, backend="hopper")
