"""The error budget bites, the inputs lie as they say, and the error table counts right."""

import math

import pytest
import torch

from fastattn import testing
from fastattn.testing import (
    LAYOUTS,
    alibi_slopes,
    assert_within_budget,
    attention_inputs,
    attention_mask,
    attention_sinks,
    document_ids,
    key_padding_mask,
    prefix_lengths,
)
from tests.pairwise import coverage, pairwise

TRUTH = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
EPS = torch.finfo(torch.float32).eps


def off_by(error):
    return TRUTH.float() + torch.tensor([0.0, 0.0, error, 0.0])


# ------------------------------------------------------------------------------------------------------------- budget


def test_budget_is_twice_the_peer_and_an_ulp():
    peer = off_by(1e-3)
    assert_within_budget(off_by(1.9e-3), truth=TRUTH, peer=peer, name="x")
    with pytest.raises(AssertionError, match="outside its error budget"):
        assert_within_budget(off_by(2.1e-3), truth=TRUTH, peer=peer, name="x")


def test_budget_of_an_exact_peer_is_one_ulp_of_the_largest():
    exact = TRUTH.float()
    assert_within_budget(off_by(2 * EPS), truth=TRUTH, peer=exact, name="x")  # the ulp of 3 is 2 eps
    with pytest.raises(AssertionError, match="outside its error budget"):
        assert_within_budget(off_by(4 * EPS), truth=TRUTH, peer=exact, name="x")
    assert_within_budget(off_by(4 * EPS), truth=TRUTH, peer=exact, name="x", allowance=3 * EPS)


def test_budget_looks_at_the_rms_too():
    """Every element as wrong as the peer's worst: the maximum is within budget, the RMS is not."""
    truth = torch.ones(1000, dtype=torch.float64)
    peer = truth.float()
    peer[0] += 0.1
    with pytest.raises(AssertionError, match=r"rms error 1\.0"):
        assert_within_budget(truth.float() + 0.1, truth=truth, peer=peer, name="x")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_budget_never_allows_nan_or_inf(bad):
    with pytest.raises(AssertionError, match="1 elements are not finite"):
        assert_within_budget(off_by(bad), truth=TRUTH, peer=off_by(1e6), name="x")


def test_budget_wants_infinities_exactly():
    truth = torch.tensor([1.0, -math.inf], dtype=torch.float64)
    assert_within_budget(truth.float(), truth=truth, peer=truth.float(), name="x")
    for wrong in (0.0, math.inf, math.nan):
        with pytest.raises(AssertionError, match="1 of 1 infinities are wrong"):
            assert_within_budget(torch.tensor([1.0, wrong]), truth=truth, peer=truth.float(), name="x")


def test_budget_message_shows_both_errors_the_worst_element_and_the_shape():
    truth = TRUTH.view(2, 2)
    with pytest.raises(AssertionError) as caught:
        assert_within_budget(off_by(0.5).view(2, 2), truth=truth, peer=off_by(0.125).view(2, 2), name="d_query")
    for words in ("d_query (2, 2) float32", "max error 5.000e-01", "peer 1.250e-01", "worst at [1, 0]", "got 3.5"):
        assert words in str(caught.value)


def test_budget_refuses_shapes_and_peers_that_prove_nothing():
    with pytest.raises(AssertionError, match=r"truth is \(4,\), the peer \(1,\)"):
        assert_within_budget(TRUTH.float(), truth=TRUTH, peer=torch.ones(1), name="x")
    with pytest.raises(ValueError, match="no budget to derive"):
        assert_within_budget(TRUTH.float(), truth=TRUTH, peer=off_by(math.nan), name="x")


def test_budget_of_nothing_passes():
    empty = torch.zeros(0, 3)
    assert_within_budget(empty, truth=empty.double(), peer=empty, name="x")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("magnitude", [1.0, 1.5, 3.0, 100.0, 1e-3])
def test_ulp_is_the_distance_to_the_next_number(magnitude, dtype):
    number = torch.tensor(magnitude, dtype=dtype)
    following = torch.nextafter(number, torch.tensor(math.inf, dtype=dtype))
    assert testing.ulp(number.item(), dtype) == (following.double() - number.double()).item()


# -------------------------------------------------------------------------------------------------------- error table


def test_error_table_sums_up_by_feature_and_direction():
    with testing.record_errors() as records:
        for name, error in (("output", 0.01), ("lse", 0.03), ("d_query", 0.2)):
            assert_within_budget(off_by(error), truth=TRUTH, peer=off_by(0.5), name=name, feature="f", backend="b")
    assert_within_budget(TRUTH.float(), truth=TRUTH, peer=TRUTH.float(), name="after")
    assert [r.name for r in records] == ["output", "lse", "d_query"]
    forward, gradients = testing.error_rows(records)
    assert (forward["backend"], forward["feature"], forward["dtype"]) == ("b", "f", "float32")
    assert (forward["pass"], forward["tensors"]) == ("forward", 2)
    assert forward["max_error"] == pytest.approx(0.03, rel=1e-4)
    assert forward["rms_error"] == pytest.approx(math.sqrt((0.01**2 + 0.03**2) / 8), rel=1e-4)
    assert gradients["max_error"] == pytest.approx(0.2, rel=1e-4)
    assert gradients["peer_max_error"] == 0.5
    line = testing.error_table(records).splitlines()[-1]
    assert line.split() == ["b", "f", "float32", "3.00e-02", "5.00e-01", "1.12e-02", "2.50e-01",
                            "2.00e-01", "5.00e-01", "1.00e-01", "2.50e-01"]  # fmt: skip


def test_error_table_without_records_says_so():
    assert testing.error_table([]) == "no errors were recorded"


# ------------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_inputs_have_their_shapes_and_repeat(layout):
    first, again, other = (
        attention_inputs(2, 4, 5, 7, 8, kv_heads=2, value_dim=3, dtype=torch.bfloat16, layout=layout, seed=seed)
        for seed in (1, 1, 2)
    )
    assert [tuple(t.shape) for t in first] == [(2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3)]
    for a, b, c in zip(first, again, other):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert not torch.equal(first[0][:, :2, :, :3], first[1][:, :, :5, :3])


def test_attention_inputs_lie_as_they_say():
    def query(layout):
        return attention_inputs(2, 4, 5, 5, 8, layout=layout)[0]

    assert query("dense").is_contiguous()
    assert query("heads_inside").transpose(1, 2).is_contiguous()
    assert query("feature_map").transpose(2, 3).is_contiguous()
    assert query("broadcast").stride(0) == 0
    assert attention_inputs(2, 4, 5, 5, 8, layout="broadcast")[1].stride(1) == 0
    assert query("every_other").stride(3) == 2
    assert query("every_other").storage_offset() == 1
    packed = attention_inputs(2, 4, 5, 5, 8, layout="packed")
    assert len({t.untyped_storage().data_ptr() for t in packed}) == 1
    assert packed[0].stride() == (5 * 96, 8, 96, 1)


def test_unknown_layouts_and_broadcasts_are_refused():
    with pytest.raises(ValueError, match=r"layout='rows'.*'dense'"):
        attention_inputs(1, 1, 2, 2, 2, layout="rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"broadcast='rows'.*'batch_head'"):
        attention_mask(1, 1, 2, 2, broadcast="rows")  # type: ignore[arg-type]


def test_masks_hide_something_and_broadcast():
    assert attention_mask(2, 4, 50, 70).double().mean().item() == pytest.approx(0.75, abs=0.02)
    bias = attention_mask(2, 4, 50, 70, dtype=torch.float16)
    assert bias.dtype == torch.float16
    assert bias.isinf().double().mean().item() == pytest.approx(0.25, abs=0.02)
    shapes = {"batch": (1, 4, 5, 7), "head": (2, 1, 5, 7), "query": (2, 4, 1, 7), "key": (2, 4, 5, 1)}
    for broadcast, shape in {**shapes, "none": (2, 4, 5, 7), "batch_head": (5, 7)}.items():
        assert attention_mask(2, 4, 5, 7, broadcast=broadcast).shape == shape  # type: ignore[arg-type]
    padding = key_padding_mask(100, 7)
    assert not padding[:, 0].any()
    assert padding[:, -1].any() and not padding[:, -1].all()
    assert (padding[:, 1:] >= padding[:, :-1]).all()


def test_masks_hide_whole_blocks():
    mask = attention_mask(2, 4, 97, 130, block=64, hidden=0.5)
    assert mask.shape == (2, 4, 97, 130)
    for rows in mask.split(64, dim=2):
        for block in rows.split(64, dim=3):
            assert torch.equal(block, block[:, :, :1, :1].expand_as(block))
    assert mask.any() and not mask.all()
    bias = attention_mask(2, 4, 97, 130, dtype=torch.float32, broadcast="batch_head", block=40)
    assert torch.equal(bias[:40, :40].isinf(), bias[0, 0].isinf().expand(40, 40))


def test_document_ids_count_runs_of_their_lengths():
    ids = document_ids(3, 1000, shortest=20, longest=50, seed=3)
    assert ids.shape == (3, 1000)
    assert torch.equal(ids, document_ids(3, 1000, shortest=20, longest=50, seed=3))
    for entry in ids:
        names, lengths = entry.unique_consecutive(return_counts=True)
        assert names.tolist() == list(range(len(names)))
        assert lengths[:-1].min() >= 20 and lengths.max() <= 50
    assert not torch.equal(ids[0], ids[1])


def test_prefixes_slopes_and_sinks_have_their_shapes_and_repeat():
    prefixes = prefix_lengths(200, 7)
    assert prefixes.shape == (200,)
    assert set(prefixes.tolist()) == set(range(8))
    assert alibi_slopes(4).shape == attention_sinks(4).shape == (4,)
    slopes = alibi_slopes(4, batch=50, dtype=torch.float16)
    assert slopes.shape == (50, 4)
    assert slopes.dtype == attention_sinks(4, dtype=torch.float16).dtype == torch.float16
    assert slopes.min() >= 2**-8 and slopes.max() <= 0.5
    assert torch.equal(attention_sinks(4, seed=1), attention_sinks(4, seed=1))
    assert not torch.equal(attention_sinks(4, seed=1), attention_sinks(4, seed=2))


# ------------------------------------------------------------------------------------------------- what the tests use


def test_pairwise_covers_every_pair_and_little_more():
    axes = {"a": [1, 2, 3], "b": "xyzw", "c": [True, False], "d": [0, 1, 2]}
    cases = pairwise(axes)
    for first in axes:
        for second in axes:
            if first < second:
                wanted = {(x, y) for x in axes[first] for y in axes[second]}
                assert {(case[first], case[second]) for case in cases} == wanted
    assert len(cases) < 20  # of 72
    assert pairwise(axes) == cases


def test_pairwise_leaves_out_what_makes_no_sense():
    cases = pairwise({"a": [0, 1], "b": [0, 1], "c": [0, 1]}, allowed=lambda case: not (case["a"] and case["b"]))
    assert {(case["a"], case["b"]) for case in cases} == {(0, 0), (0, 1), (1, 0)}


def test_coverage_counts_pairs_and_names_what_is_missing():
    axes = {"a": [0, 1], "b": ["x", "y"], "c": [None, 2.0]}
    assert coverage(axes, pairwise(axes)) == "12 of 12 met"
    cases = [{"a": 0, "b": "x", "c": None}, {"a": 0, "b": "x", "c": 2.0}, {"a": 5, "b": "y", "c": None}]
    sentence = coverage(axes, cases)
    assert sentence.startswith("6 of 12 met; not met: a 0 with b y, ")
    assert coverage(axes, []).endswith(" and 4 more")


@pytest.mark.usefixtures("poisoned")
def test_poison_reaches_every_way_of_allocating():
    like = torch.ones(2, 3)
    for tensor in (
        torch.empty(2, 3),
        torch.empty_like(like),
        torch.empty_strided((2, 3), (3, 1)),
        torch.empty_permuted((2, 3), (1, 0)),
        like.new_empty(2, 3),
        like.new_empty_strided((2, 3), (3, 1)),
    ):
        assert tensor.isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()
