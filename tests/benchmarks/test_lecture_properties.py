"""S4 to S7: the properties hold for several seeds, and each test of them would notice if it did not."""

import json
import math

import pytest
import torch

import fastattn
from benchmarks.lecture import properties
from benchmarks.lecture.properties import (
    EXPERIMENT,
    LENGTH,
    WIDTH,
    dependence,
    self_attention,
    self_attention_of_exact_sums,
)


@pytest.fixture(autouse=True)
def _compiled_code():
    with fastattn.use_backend("torch"):
        yield


@pytest.mark.parametrize("run_seed", [0, 1, 2])
@pytest.mark.parametrize("quick", [True, False])
def test_properties_hold(quick, run_seed):
    state = torch.get_rng_state()
    result = EXPERIMENT.run(quick, run_seed, lambda line: None)
    assert [claim for claim in result["claims"] if not claim["holds"]] == []
    assert {row["system"] for row in result["rows"]} == {"S4", "S5", "S6", "S7"} == set(EXPERIMENT.systems)
    assert json.loads(json.dumps(result)) == result == EXPERIMENT.run(quick, run_seed, lambda line: None)
    assert torch.equal(torch.get_rng_state(), state)


def test_exact_sums_are_the_references_formula(seed):
    """And its deviations under permutations, none, are not those of something else."""
    torch.manual_seed(seed)
    x, weights = torch.randn(LENGTH, WIDTH).double(), torch.randn(3, WIDTH, WIDTH).double()
    exact = torch.tensor(self_attention_of_exact_sums(x.tolist(), weights.tolist()), dtype=torch.float64)
    torch.testing.assert_close(exact, self_attention(x, weights), rtol=0, atol=1e-13)


def test_order_of_keys_moves_the_last_bits_of_plain_sums():
    """Why "to the last bit" needs sums that are exact: over enough draws the plain ones differ."""
    apart = {row["ulp apart"] for seed in range(8) for row in properties.equivariance(seed)[:1]}
    assert max(apart) > 0


def test_dependence_is_the_derivative():
    """Of an average over the inputs so far, in which each counts 1 / (i + 1)."""
    average = torch.ones(4, 4, dtype=torch.float64).tril()
    average = average / average.sum(1, keepdim=True)
    found = dependence(lambda x: average @ x, torch.randn(4, 3, dtype=torch.float64))
    torch.testing.assert_close(found, average * 3**0.5)


def test_heads_that_are_mixed_up_are_noticed(monkeypatch):
    """Heads in another order are other heads: the output's projection knows which is which."""
    chunks = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda tensor, size: chunks(tensor, size)[::-1])
    assert min(row["ulp apart"] for row in properties.heads(0)) > 1000


def test_entropy_is_of_the_weights():
    """Of one number a vector the scale is 1: both are the same. And by hand, for the last row."""
    rows = properties.entropies(0)
    assert rows[0][properties.SCALED] == rows[0][properties.UNSCALED]
    assert [row[properties.UNSCALED] for row in rows] == sorted(
        (row[properties.UNSCALED] for row in rows), reverse=True
    )
    torch.manual_seed(0)
    *_, (query, key) = (torch.randn(2, properties.KEYS, head_dim).double() for head_dim in properties.HEAD_DIMS)
    p = (query @ key.T / query.shape[1] ** 0.5).softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean().item() / math.log(properties.KEYS)
    assert rows[-1][properties.SCALED] == pytest.approx(entropy, rel=1e-5)


def test_properties_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figure = EXPERIMENT.draw(EXPERIMENT.run(True, 0, lambda line: None))
    figure.savefig(tmp_path / "properties.svg")
    panels = [axes for axes in figure.axes if axes.get_images()]
    assert [axes.get_title(loc="left") or axes.get_title() for axes in panels] == [
        "self-attention", "masked self-attention", "two causal blocks",
    ]  # fmt: skip
    titles = [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes]
    assert [title[:2] for title in titles if title.startswith("S")] == ["S4", "S5"]
