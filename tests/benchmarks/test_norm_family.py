"""The family of norms: how many bytes a case moves, the gate, the ceiling, what refuses and why."""

import dataclasses
import importlib.util
from typing import get_args

import pytest
import torch

import fastattn
from benchmarks.cases import Kind, NormCase
from benchmarks.families import all_cases, norm
from benchmarks.gpu.matrix import matrix
from benchmarks.measure.accuracy import Gate
from benchmarks.measure.timing import time_on_cpu
from benchmarks.run_case import run_case
from benchmarks.variants import Variant

BF16 = torch.bfloat16
TINY = NormCase("norm", "layer", 5, 12, backward=True)


@pytest.fixture(scope="module", autouse=True)
def _compiled_code():
    """What is tested is the suite: Triton's interpreter would take minutes over it."""
    with fastattn.use_backend("torch"):
        yield


@pytest.mark.parametrize(
    ("options", "forward", "backward"),
    [
        ({"dtype": BF16}, 8, 8),
        ({"dtype": torch.float16}, 8, 8),
        ({"dtype": torch.float32}, 16, 16),
        ({"dtype": BF16, "wide_residual": True}, 12, 16),
        ({"dtype": BF16, "dropout_p": 0.1}, 8, 10),
        ({"dtype": torch.float32, "wide_residual": True}, 16, 16),
        ({"dtype": BF16, "alone": True}, 4, 6),
    ],
    ids=["bf16", "fp16", "fp32", "bf16-residual32", "bf16-dropout", "fp32-residual32", "bf16-alone"],
)
def test_norm_bytes_are_known(options, forward, backward):
    """Bytes an element, by hand: with a residual of its own dtype, or with dropout, ``dx`` is one more tensor."""
    rows, size, vector = 7, 100, 100 * options["dtype"].itemsize
    for kind, vectors in (("layer", 2), ("rms", 1)):
        case = NormCase("norm", kind, rows, size, **options)
        work = norm.work(case, "eager")
        assert work.moved_bytes == forward * rows * size + vectors * vector
        assert work.formula == f"bytes {forward} M N + {vectors * options['dtype'].itemsize} N"
        assert work.flops is None
        case = dataclasses.replace(case, backward=True)
        assert norm.work(case, "eager").moved_bytes == backward * rows * size + (vectors + 1) * vector


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": BF16},
        {"dtype": BF16, "wide_residual": True},
        {"dropout_p": 0.5},
        {"dtype": BF16, "dropout_p": 0.1},
        {"alone": True},
    ],
    ids=["fp32", "bf16", "residual32", "dropout", "bf16-dropout", "alone"],
)
def test_norm_variants_agree_with_float64(kind, backward, options):
    case = NormCase("norm", kind, 5, 12, backward=backward, **options)
    rows = {row.variant: row for row in run_case(norm.FAMILY, case, seconds=0.0, only=("fastattn", "eager"))}
    assert [rows[name].status for name in ("fastattn", "eager")] == ["ok", "ok"], rows


@pytest.mark.parametrize("result", range(6), ids=["y", "r", "dx", "dresidual", "dweight", "dbias"])
def test_norm_gate_stops_one_wrong_result(result):
    right = norm.FAMILY.variant("eager")

    def build(case, dtype):
        step = right.build(case, dtype)
        return lambda: tuple(t * 1.0001 if i == result else t for i, t in enumerate(step()))

    family = dataclasses.replace(norm.FAMILY, variants=(right, Variant("off", build)))
    rows = {row.variant: row for row in run_case(family, TINY, seconds=0.0)}
    assert rows["eager"].status == "ok"
    assert rows["off"].status == "wrong"
    assert rows["off"].timing is None


def test_norm_gate_stops_dropout_of_other_elements_in_the_backward():
    """A backward that drew its mask anew: each result alone looks like dropout, but not all of them together."""
    case = dataclasses.replace(TINY, rows=64, dropout_p=0.5)
    right = norm.FAMILY.variant("eager")
    step, other = right.build(case, case.dtype), right.build(case, case.dtype)
    gate = Gate(norm.FAMILY, case)
    assert gate.check(step, right).passed
    with pytest.raises(ValueError, match="dropout keeps"):
        gate.check(lambda: (*step()[:2], *other()[2:]), right)


def test_norm_gate_stops_dropout_of_everything():
    case = dataclasses.replace(TINY, rows=64, dropout_p=0.5, backward=False)
    right = norm.FAMILY.variant("eager")
    everything = right.build(dataclasses.replace(case, dropout_p=0.0), case.dtype)
    with pytest.raises(ValueError, match=r"dropout keeps 1\.0000 of the elements, where 0\.5 was asked for"):
        Gate(norm.FAMILY, case).check(everything, right)


def test_a_norm_alone_is_that_and_says_so():
    case = dataclasses.replace(TINY, alone=True)
    assert case.name == "norm-layer-m5-n12-backward-alone-float32"
    assert [t.dim() for t in norm._inputs(case, case.dtype)] == [2, 1, 1]
    assert len(norm.FAMILY.variant("fastattn").build(case, case.dtype)()) == 4  # y, dx, dweight and dbias


def test_norm_backward_is_timed_alone():
    """The graph is made when the step is built; a step only goes back through it."""
    calls = []

    def make(case):
        eager = norm._eager(case)

        def counted(*arguments):
            calls.append(1)
            return eager(*arguments)

        return counted

    step = norm._step(make)(TINY, TINY.dtype)
    time_on_cpu({"counted": step}, "counted", seconds=0.0)
    assert len(calls) == 1


def test_norm_inputs_are_equal_for_every_variant():
    first, second = norm._inputs(TINY, torch.float32), norm._inputs(TINY, torch.float64)
    assert all(torch.equal(a.double(), b) for a, b in zip(first, second))
    halved = dataclasses.replace(TINY, dtype=BF16, wide_residual=True)
    assert [t.dtype for t in norm._inputs(halved, BF16)] == [BF16, torch.float32, BF16, BF16]


def test_norm_peers_say_why_they_refuse(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert norm.FAMILY.variant("liger").applies(TINY) == "liger-kernel is not installed"
    assert norm.FAMILY.variant("quack").applies(TINY) == "quack-kernels is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert norm.FAMILY.variant("liger").applies(TINY) == "needs a CUDA device"
    assert norm.FAMILY.variant("quack").applies(TINY) == "needs a CUDA device"
    on_cuda = dataclasses.replace(TINY, device="cuda")
    liger = norm.FAMILY.variant("liger").applies
    assert liger(on_cuda) is None
    assert liger(dataclasses.replace(on_cuda, size=262144)) == "takes rows of up to 65536 elements"
    assert liger(dataclasses.replace(on_cuda, dropout_p=0.1)) == "has no dropout"
    assert liger(dataclasses.replace(on_cuda, alone=True)) == "is measured with a residual"
    assert liger(dataclasses.replace(on_cuda, wide_residual=True)) == "its residual has the dtype of x"


def test_norm_sizes_reach_from_64_to_262144():
    sizes = {case.size for case in all_cases() if isinstance(case, NormCase)}
    assert sizes >= {4**power for power in range(3, 10)} | {769, 4097}


def test_norm_row_holds_rate_and_share_of_the_floor():
    ceilings = {"copy_tb_per_s": 0.04, "matmul_tflops": {}, "datasheet": None}
    (row,) = run_case(norm.FAMILY, TINY, seconds=0.0, only=["fastattn"])
    assert row.timing is not None
    found, moved = row.as_json(ceilings), norm.work(TINY, "fastattn").moved_bytes
    assert moved is not None
    assert found["tb_per_s"] == pytest.approx(moved / (row.timing.wall_ms.median * 1e-3) / 1e12, rel=1e-5)
    assert found["of_floor"] == pytest.approx(moved / 0.04e12 * 1e3 / row.timing.wall_ms.median, rel=1e-5)
    assert {"kind", "rows", "size", "wide_residual", "dropout_p", "moved_bytes"} <= set(found)
    assert "heads" not in found
    assert found["tflops"] is None


def test_gpu_matrix_has_norms_beyond_the_cache_early():
    cases = [case for case, _ in matrix()]
    norms = [case for case in cases if isinstance(case, NormCase)]
    assert {256, 512, 1024, 2048, 4096, 8192, 16384, 65536, 262144} <= {case.size for case in norms}
    assert all((1 << 27) - case.size < case.rows * case.size <= 1 << 27 for case in norms)
    assert {(case.kind, case.backward) for case in norms} == {(k, b) for k in get_args(Kind) for b in (False, True)}
    assert any(case.wide_residual for case in norms)
    assert any(case.dropout_p for case in norms)
    assert any(case.dtype == torch.float32 for case in norms)
    others = [case for case in cases if case.family != "kernels"]
    assert {"attention", "norm"} <= {case.family for case in others[: len(others) // 3]}
