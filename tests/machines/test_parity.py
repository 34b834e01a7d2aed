"""The public operators on plain Triton's kernels as compiled: a few of the cases that all backends share.

`make proof` runs every one of them; here each feature is met once.
"""

import pytest
import torch

import fastattn
from tests import machines
from tests.ops import attention_cases, norm_cases, test_additive_parity
from tests.ops.attention_cases import Case as Attention
from tests.ops.norm_cases import Case as Norm
from tests.ops.test_additive_parity import Case as Additive

pytestmark = [
    pytest.mark.machine,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not machines.EXECUTING, reason=f"parity in full runs on {machines.NAME}"),
]

ATTENTION = [
    Attention(dtype="bf16", causal=True, heads=(4, 2), seqlen_k=130),
    Attention(dtype="fp16", mask="bool-blocks", padding=True, batch=2, heads=(2, 1), seqlen_k=130, outputs="lse"),
    Attention(mask="additive-ragged", softcap=1.5, sinks="own", alibi="head", heads=(2, 2), seqlen_k=130),
    Attention(dropout=0.3, outputs="average", heads=(2, 2), scale=-0.2, seqlen_q=50),
    Attention(window=(5, 3), prefix="tensor", documents="self", batch=2, heads=(1, 1), seqlen_q=97, garbage="nan"),
    Attention(head_dim=59, value="smaller", layout="every_other", seqlen_q=3, seqlen_k=130),
]
NORM = [
    Norm(rows=(130,), size=255, dtype="bf16", x_bias="own", dropout=0.4),
    Norm(kind="rms", size=1025, rows=(2, 3), unit_offset=True, layout="transposed", row_scale="own"),
    Norm(size=4097, rows=(1,), weight="none", offset=1000.0),
]
ADDITIVE = [
    Additive(),
    Additive(dtype="bf16", heads=2, outputs="average"),
]


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.id)
def test_attention_grad_on_plain_kernels_matches_reference(case, device):
    with fastattn.use_kernels("triton"):
        attention_cases.check("compiled", case, "triton", device)


@pytest.mark.parametrize("deterministic", [False])
def test_attention_grad_in_one_pass_matches_reference(deterministic, device):
    with fastattn.use_kernels("triton", deterministic=deterministic):
        attention_cases.check("compiled", ATTENTION[1], "triton", device)


@pytest.mark.parametrize("case", NORM, ids=lambda case: case.id)
def test_norm_grad_matches_reference(case, device):
    norm_cases.check("compiled", case, "triton", device)


@pytest.mark.parametrize("case", ADDITIVE, ids=lambda case: case.id)
def test_additive_grad_matches_reference(case, device):
    test_additive_parity.check(case, "triton", torch.device(device))
