"""The pipelined order of the forward, which only sm_90 has in its tables: the same results in the same budgets."""

import pytest

import fastattn
from fastattn_kernels.attention import forward
from fastattn_kernels.common.config import Config
from tests.ops.attention_cases import Case, check


@pytest.fixture
def pipelined(monkeypatch):
    """Every forward is in plain Triton, on Hopper too, and has small tiles in the pipelined order; counts them."""
    tiles = []

    def forward_config(*_):
        tiles.append(Config(64, 32, 4, 1, pipelined=True))
        return tiles[-1]

    monkeypatch.setattr(forward, "forward_config", forward_config)
    with fastattn.use_kernels("triton"):
        yield tiles


CASES = [
    Case(dtype="bf16", heads=(4, 2)),
    Case(dtype="fp16", causal=True, heads=(1, 1), seqlen_k=257),
    Case(causal=True, alignment="bottom_right", seqlen_q=130, seqlen_k=97),  # rows, and tiles of rows, that see nothing
    Case(window=(70, 90), heads=(1, 1), value="smaller"),
    Case(mask="bool-blocks", batch=2, heads=(1, 1), seqlen_q=200, seqlen_k=257),  # has a tile map
    Case(mask="additive-ragged", softcap=30.0, sinks="own", heads=(1, 1)),
    Case(dropout=0.3, layout="every_other", head_dim=59),
    Case(causal=True, prefix="tensor", batch=2, heads=(1, 1)),
    Case(scale=-0.2, heads=(1, 1)),  # falls back
    Case(scale=0.0, causal=True, heads=(1, 1)),
    Case(seqlen_q=1, seqlen_k=3),  # no tile is seen whole
]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
@pytest.mark.usefixtures("poisoned")
def test_attention_pipelined_matches_reference(case, device, pipelined):
    check("pipelined", case, "triton", device)
    assert pipelined
