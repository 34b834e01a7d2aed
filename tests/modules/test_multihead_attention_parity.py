"""Drop-in equality with ``nn.MultiheadAttention``: outputs, weights and every gradient, against float64."""

import copy
import zlib

import pytest
import torch
from torch import nn

import fastattn
from fastattn.testing import assert_within_budget, ulp
from tests.modules.mha_cases import AXES, Case, make_arguments, make_module, makes_sense, run
from tests.pairwise import pairwise

GRID = [Case(**levels) for levels in pairwise(AXES, makes_sense)]
# Every combination of what decides which code runs in torch and in ours.
CORE = [
    Case(layout=layout, inputs=inputs, attn_mask=attn_mask, weights=weights, mode=mode)
    for layout in AXES["layout"]
    for inputs in AXES["inputs"]
    for attn_mask in ("none", "bool", "float_3d", "causal_hint")
    for weights in AXES["weights"]
    for mode in AXES["mode"]
]
# On the Triton backend: what the module itself does differently from case to case.
KERNELS = [
    Case(),
    Case(weights="average"),
    Case(weights="heads", dtype=torch.bfloat16),
    Case(layout="sequence_first", inputs="key_is_value", attn_mask="bool_3d", mode="eval_no_grad"),
    Case(layout="unbatched", inputs="separate", features="vdim", weights="average", key_padding_mask="bool"),
    Case(inputs="separate", features="kdim", add_bias_kv=True, add_zero_attn=True, attn_mask="bool", weights="heads"),
    Case(heads=3, bias=False, attn_mask="causal_hint", layout="sequence_first"),
    Case(attn_mask="float", key_padding_mask="float", mode="eval_no_grad", dtype=torch.bfloat16),
]


def shrink_queries(module):
    """Divide the projected queries by 8, so that scores stay below 1.

    The kernels keep a row's LSE and remake its weights as ``exp(score - lse)``, whose relative error is the absolute
    one of both: eager torch, the peer, does not have it. What it comes to is tested where the kernels are.
    """
    with torch.no_grad():
        weight = module.q_proj_weight if module.in_proj_weight is None else module.in_proj_weight[: module.embed_dim]
        weight /= 8
        if module.in_proj_bias is not None:
            module.in_proj_bias[: module.embed_dim] /= 8


def check(case, backend):
    seed = zlib.crc32(str(case).encode()) % 10**6
    arguments = make_arguments(case, seed)
    theirs, ours = (
        make_module(nn.MultiheadAttention, case),
        make_module(fastattn.MultiheadAttention, case, backend=backend),
    )
    if backend == "triton":
        shrink_queries(theirs)
        shrink_queries(ours)
    truth = run(copy.deepcopy(theirs), case, arguments, torch.float64)
    peer = run(theirs, case, arguments, case.dtype)
    actual = run(ours, case, arguments, case.dtype)
    assert actual.keys() == peer.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == peer[name].dtype
        # In float64 the peer is the truth itself, to the bit: room for another order of sums of some 36 terms.
        exact = case.dtype == torch.float64 and tensor.numel() > 0
        allowance = 36 * ulp(truth[name].abs().max().item(), torch.float64) if exact else 0.0
        assert_within_budget(
            tensor,
            truth=truth[name],
            peer=peer[name],
            name=name,
            allowance=allowance,
            feature="mha",
            backend=backend,
        )


@pytest.mark.parity
@pytest.mark.parametrize("case", GRID, ids=str)
def test_multihead_attention_matches_torch(case):
    check(case, "torch")


@pytest.mark.parity
@pytest.mark.parametrize("case", CORE, ids=str)
def test_multihead_attention_core_matches_torch(case):
    check(case, "torch")


@pytest.mark.parity
@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_multihead_attention_on_kernels_matches_torch(case):
    check(case, "triton")


@pytest.mark.parametrize("weights", ["none", "average", "heads"])
@pytest.mark.parametrize("layout", ["batch_first", "sequence_first", "unbatched"])
def test_dropout_under_one_seed_is_torchs(layout, weights):
    case = Case(layout=layout, weights=weights, dtype=torch.float64)
    arguments = make_arguments(case, 3)
    results = []
    for kind, more in ((nn.MultiheadAttention, {}), (fastattn.MultiheadAttention, {"backend": "torch"})):
        module = make_module(kind, case, dropout=0.4, **more)
        torch.manual_seed(11)
        results.append(run(module, case, arguments, torch.float64))
    without = run(make_module(nn.MultiheadAttention, case), case, arguments, torch.float64)
    assert not torch.allclose(results[0]["output"], without["output"])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_of_one_leaves_the_output_bias(need_weights):
    module = fastattn.MultiheadAttention(8, 2, dropout=1.0, backend="torch")
    nn.init.normal_(module.out_proj.bias)
    x = torch.randn(5, 2, 8)
    output, _ = module(x, x, x, need_weights=need_weights)
    torch.testing.assert_close(output, module.out_proj.bias.expand_as(output), rtol=0, atol=0)


def test_evaluation_does_not_drop():
    module = fastattn.MultiheadAttention(8, 2, dropout=0.5, backend="torch").eval()
    x = torch.randn(5, 2, 8)
    assert torch.equal(module(x, x, x)[0], module(x, x, x)[0])
