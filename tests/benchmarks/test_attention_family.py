"""The family of attention, and of the module and the layer around it: masks, the work that a step is, our backends."""

import dataclasses
import re
from typing import get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from benchmarks.cases import AttentionCase, Mask
from benchmarks.families import attention, layer, masks, module
from benchmarks.measure.accuracy import Gate
from fastattn import reference
from fastattn.ops.attention.call import make_call
from fastattn.reference import visibility

CASE = AttentionCase("attention", 3, 2, 37, 8)
EVERY_MASK = pytest.mark.parametrize("mask", get_args(Mask))
DIRECTIONS = pytest.mark.parametrize("backward", [False, True], ids=["eval", "train"])


@pytest.fixture(scope="module", autouse=True)
def _compiled_code():
    """What is tested is the suite: Triton's interpreter would take minutes over it."""
    with fastattn.use_backend("torch"):
        yield


# ------------------------------------------------------------------------------------------------------- visible pairs


def _counted(case):
    """Ones of the whole matrix that the definition makes of the case's mask."""
    call = make_call(*masks.inputs(case, torch.float32)[:3], **masks.masks(case, torch.float32))
    names = ("lower", "upper", "mask", "key_padding_mask", "query_documents", "key_documents")
    visible = visibility(case.seqlen, case.seqlen, **{name: getattr(call, name) for name in names})
    return int(visible.expand(case.batch, 1, case.seqlen, case.seqlen).sum())


@EVERY_MASK
@pytest.mark.parametrize("seqlen", [1, 5, 37, 97, 301])
@pytest.mark.parametrize("batch", [1, 3])
def test_visible_pairs_are_those_of_the_matrix(mask, seqlen, batch):
    case = dataclasses.replace(CASE, mask=mask, seqlen=seqlen, batch=batch, seed=seqlen)
    assert masks.visible_pairs(case) == _counted(case)


def test_visible_pairs_by_hand():
    def pairs(mask, seqlen=16):
        return masks.visible_pairs(AttentionCase("attention", 2, 1, seqlen, 4, mask=mask))

    assert pairs("none") == pairs("bias") == 2 * 256
    assert pairs("causal") == pairs("alibi") == pairs("softcap") == 2 * 136
    assert pairs("window") == 2 * (1 + 2 + 14 * 3)  # two keys before its own, and its own
    assert pairs("padding") == 16 * (8 + 15)


@pytest.mark.parametrize("mask", [mask for mask in get_args(Mask) if mask not in ("boolean", "sparse")])
def test_visible_pairs_of_a_long_sequence_need_no_matrix(mask):
    """Of 2^20 tokens it would take a terabyte."""
    case = dataclasses.replace(CASE, mask=mask, seqlen=2**20)
    assert 0 < masks.visible_pairs(case) <= 3 * 2**40


# ------------------------------------------------------------------------------------------------------------ the work


def test_attention_work_by_hand():
    def work(backward=False, **options):
        found = attention.work(AttentionCase("attention", 2, 4, 64, 32, backward=backward, **options), "sdpa")
        return found.flops, found.moved_bytes

    operations, tensor = 4 * 2 * 4 * 64 * 64 * 32, 2 * 4 * 64 * 32 * 4
    assert work() == (operations, 4 * tensor)
    assert work(True) == (3.5 * operations, 12 * tensor)
    assert work(True, dtype=torch.bfloat16) == (3.5 * operations, 6 * tensor)
    assert work(mask="causal") == (operations * 65 / 128, 4 * tensor)
    assert work(mask="bias") == (operations, 4 * tensor + 4 * 64 * 64 * 4)
    assert work(True, mask="bias") == (3.5 * operations, 12 * tensor + 2 * 4 * 64 * 64 * 4)
    assert work(mask="sparse")[1] == 4 * tensor + 64 * 64
    assert work(True, mask="boolean")[1] == 12 * tensor + 2 * 64 * 64
    assert work(weights=True) == (operations, 4 * tensor + 2 * 64 * 64 * 4)


def _value(expression, symbols):
    """Of a formula as people write it: a power is ^, and a space between two factors multiplies them."""
    expression = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", expression.replace("^", "**"))
    return eval(expression, dict(symbols))


@DIRECTIONS
@pytest.mark.parametrize("weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("mask", ["none", "causal", "window", "bias"])
@pytest.mark.parametrize("family", [attention, module, layer], ids=lambda family: family.FAMILY.name)
def test_formula_says_what_the_numbers_are(family, mask, weights, backward):
    case = AttentionCase(family.FAMILY.name, 3, 2, 37, 8, mask=mask, weights=weights, backward=backward)
    work = family.FAMILY.work(case, "fastattn")
    symbols = {"B": 3, "H": 2, "L": 37, "D": 8, "E": 16}
    flops, *rest = work.formula.split("; bytes ")
    flops, *definitions = flops.removeprefix("flops ").split(", ")
    for definition in reversed(definitions):  # "P = ... w ..., w = ..."
        name, expression = definition.split(" = ")
        symbols[name] = _value(expression, symbols)
    assert _value(flops, symbols) == work.flops
    assert [_value(expression, symbols) for expression in rest] == (
        [] if work.moved_bytes is None else [work.moved_bytes]
    )


def _reference(family):
    assert family.reference is not None
    return family.reference


def _counted_by_torch(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@DIRECTIONS
@pytest.mark.parametrize(
    ("family", "build"),
    [(attention, attention.FAMILY.variant("naive").build), (module, _reference(module.FAMILY))],
    ids=["attention", "module"],
)
def test_flops_are_those_torch_counts(family, build, backward):
    """Of the formula, and without a mask: it makes what is hidden too.

    In training it takes nothing twice, where fused kernels make the scores again: 3 times a forward, not 3.5.
    """
    case = AttentionCase(family.FAMILY.name, 2, 2, 20, 8, backward=backward)
    scores_again = 4 * 8 * 2 * 2 * 20 * 20 / 2 if backward else 0
    assert _counted_by_torch(build(case, torch.float32)) == family.FAMILY.work(case, "fastattn").flops - scores_again


def test_layer_flops_are_those_torch_counts():
    """All but attention itself, since torch does not count SDPA on a CPU."""
    case = AttentionCase("layer", 2, 2, 20, 8)
    counted = _counted_by_torch(_reference(layer.FAMILY)(case, torch.float32))
    assert counted + attention.flops(case)[0] == layer.FAMILY.work(case, "fastattn").flops


# ------------------------------------------------------------------------------------------------------- our backends


def _refusal(backend, case):
    return attention.FAMILY.variant(f"fastattn-{backend}").applies(case)


def test_backend_that_fastattn_runs_is_not_measured_twice():
    assert _refusal("torch", CASE) == "is what fastattn runs here"
    assert _refusal("triton", CASE) == "needs a GPU: on a CPU only Triton's interpreter runs it, which is no measure"


@EVERY_MASK
def test_backend_by_name_where_another_runs(mask, device, monkeypatch):
    """As on a GPU: the kernels are what runs, torch's backend is measured beside them, until triton refuses."""
    pytest.importorskip("triton", reason="triton is not installed")
    draw = masks.inputs
    drawn = []

    def on_device(case, dtype):
        drawn.append(case)
        return [t.to(device) for t in draw(dataclasses.replace(case, device="cpu"), dtype)]

    monkeypatch.setattr(attention, "inputs", on_device)
    monkeypatch.setattr(
        attention, "masks", lambda case, dtype: masks.masks(dataclasses.replace(case, device=str(device)), dtype)
    )
    case = dataclasses.replace(CASE, device="cuda", mask=mask, seqlen=2**18)
    with fastattn.use_backend("auto"):  # without a GPU, of Triton's interpreter
        assert _refusal("torch", case) is None
        assert _refusal("triton", case) == "is what fastattn runs here"
        wide = dataclasses.replace(case, head_dim=520)
        assert _refusal("torch", wide) == "is what fastattn runs here"
        assert "head_dim=520: it takes 1 to 512" in str(_refusal("triton", wide))
    assert all(case.seqlen < 64 for case in drawn)  # no L x L matrix for a question


def test_backend_by_name_is_the_one_that_runs(monkeypatch):
    asked = []

    def recorded(*qkv, backend, need_weights, **words):
        asked.append(backend)
        return reference.attention(*qkv).output

    monkeypatch.setattr(fastattn, "attention", recorded)
    for name in ("fastattn", "fastattn-triton", "fastattn-torch"):
        attention.FAMILY.variant(name).build(CASE, CASE.dtype)()
    assert asked == [None, "triton", "torch"]


# ---------------------------------------------------------------------------------------------------------------- cases


@DIRECTIONS
def test_cases_show_how_time_grows(backward):
    """One size but for the length, where what makes every score is left out once it would take seconds a step."""
    lengths = {"none": {}, "causal": {}}
    for case in attention.more_cases():
        of_shape = (case.batch, case.heads, case.head_dim, case.weights, case.dtype) == (1, 8, 64, False, torch.float32)
        if case.mask in lengths and of_shape and case.backward == backward:
            lengths[case.mask][case.seqlen] = case
    assert set(lengths["none"]) >= set(lengths["causal"]) >= {128, 512, 1024}
    assert backward or lengths["causal"].keys() >= {2048, 4096}
    long = dataclasses.replace(lengths["none"][2048], mask="causal", seqlen=4096)
    for name in ("naive", "compile", "sdpa-math"):
        applies = attention.FAMILY.variant(name).applies
        assert applies(long) == "makes all 134217728 scores: on cpu only up to 33554432 are taken"
        assert "scores" not in (applies(lengths["none"][2048]) or "")
        assert applies(dataclasses.replace(long, device="cuda")) is None or name == "compile"


@pytest.mark.parametrize("mask", get_args(Mask))
def test_reference_is_of_the_first_and_the_last_head(mask):
    """A long truth fits, and offsets are seen where they begin and where they end; averaged weights take every head."""
    case = dataclasses.replace(CASE, mask=mask, backward=True)
    every = attention.FAMILY.variant("naive").build(case, torch.float64)()
    for ends, whole in zip(_reference(attention.FAMILY)(case, torch.float64)(), every, strict=True):
        torch.testing.assert_close(ends[0, 0], whole[0, 0])
        torch.testing.assert_close(ends[1, 0], whole[-1, -1])
    results = _reference(attention.FAMILY)(dataclasses.replace(case, weights=True), torch.float64)()
    assert results[0].shape == every[0].shape
    assert results[1].shape == (3, 37, 37)


@pytest.mark.parametrize("where", [(1, 0, 3, 2), (0, 0, 36, 0), (2, 1, 0, 5)], ids=str)
def test_gate_stops_nan_and_a_wrong_row(where):
    """NaN anywhere, also in heads that nothing else is compared of; and one row of thousands."""
    right = attention.FAMILY.variant("fastattn")
    step = right.build(CASE, CASE.dtype)
    (out,) = step()
    spoiled = out.clone()
    spoiled[where] = float("nan")
    gate = Gate(attention.FAMILY, CASE)
    assert not gate.check(lambda: (spoiled,), right).passed
    long = AttentionCase("attention", 1, 1, 2048, 8, dtype=torch.bfloat16)
    step = right.build(long, long.dtype)
    (out,) = step()
    gate = Gate(attention.FAMILY, long)
    assert gate.check(lambda: (out,), right).passed
    out[0, 0, 1000] = 0
    assert not gate.check(lambda: (out,), right).passed


@pytest.mark.parametrize("wrong", range(4), ids=["out", "dq", "dk", "dv"])
def test_gate_stops_one_wrong_result(wrong):
    case = dataclasses.replace(CASE, mask="causal", backward=True)
    right = attention.FAMILY.variant("fastattn")
    step = right.build(case, case.dtype)
    gate = Gate(attention.FAMILY, case)
    assert gate.check(step, right).passed
    assert not gate.check(lambda: tuple(t * 1.0001 if i == wrong else t for i, t in enumerate(step())), right).passed
