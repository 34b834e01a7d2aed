"""The suite itself: names, the accuracy gate, the command lines. No time decides a verdict here."""

import dataclasses
import json
import math
from typing import get_args

import pytest
import torch

import fastattn
from benchmarks import __main__ as command_line
from benchmarks import gpu, tiles
from benchmarks.accuracy import Gate
from benchmarks.cases import AttentionCase, Mask
from benchmarks.registry import Variant, all_cases, families, quick_cases
from benchmarks.report import row_as_json, write_json
from benchmarks.runner import run_case
from benchmarks.timing import Spread, time_on_cpu

TINY = AttentionCase("module", 2, 2, 5, 4, backward=True, mask="causal", weights=True)


@pytest.fixture(scope="module", autouse=True)
def _compiled_code():
    """What is tested is the suite: Triton's interpreter would take minutes over it."""
    with fastattn.use_backend("torch"):
        yield


@pytest.fixture(scope="module")
def tiny_rows():
    return run_case(families()["module"], TINY, seconds=0.0)


def test_registry_names_are_unique():
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)
    for family in families().values():
        variants = [variant.name for variant in family.variants]
        assert len(set(variants)) == len(variants)
        assert family.peer in variants


def test_registry_every_case_has_a_variant_of_ours_that_applies():
    for case in quick_cases():
        assert families()[case.family].variant("fastattn").applies(case) is None, case.name


@pytest.mark.parametrize("family", ["attention", "layer", "module", "sequence"])
def test_variants_agree_with_float64(family):
    case = dataclasses.replace(TINY, family=family, weights=False)
    rows = run_case(families()[family], case, seconds=0.0)
    assert {row.status for row in rows} <= {"ok", "refused"}, [(row.variant, row.reason) for row in rows]
    assert all((row.timing is not None) == (row.status == "ok") for row in rows)


@pytest.mark.parametrize("mask", get_args(Mask))
@pytest.mark.parametrize("weights", [False, True], ids=["", "weights"])
def test_attention_masks_agree_with_float64(mask, weights):
    case = AttentionCase("attention", 2, 2, 20, 4, backward=True, mask=mask, weights=weights)
    rows = {row.variant: row for row in run_case(families()["attention"], case, seconds=0.0)}
    assert rows["fastattn"].status == rows["naive"].status == "ok", rows["fastattn"]
    refuses = weights or mask == "softcap"
    assert rows["sdpa"].status == ("refused" if refuses else "ok"), rows["sdpa"]
    assert bool(rows["sdpa"].reason) == refuses


def test_tiles_visited_are_counted():
    """A causal call of 8 x 16 tiles: 2 i + 2 tiles of keys for the i-th tile of rows, the last two of them in part."""
    pytest.importorskip("triton", reason="triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = tiles.count(AttentionCase("attention", 1, 1, 1024, 64, mask="causal", device=device))
    assert found == {"mask": "causal", "tiles": 128, "whole": 56, "in_part": 16}


def _family_with(build):
    family = families()["module"]
    return dataclasses.replace(family, variants=(*family.variants, Variant("other", build)))


def test_gate_stops_a_wrong_variant_before_it_is_timed():
    """A variant that is off by one part in ten thousand, in one gradient only, gets no time."""
    right = families()["module"].variant("fastattn")
    calls = []

    def build(case, dtype):
        step = right.build(case, dtype)

        def wrong():
            calls.append(1)
            *results, last = step()
            return *results, last * 1.0001

        return wrong

    rows = {row.variant: row for row in run_case(_family_with(build), TINY, seconds=0.0)}
    assert rows["other"].status == "wrong"
    assert rows["other"].timing is None
    accuracy = rows["other"].accuracy
    assert accuracy is not None
    assert accuracy.error > accuracy.budget
    assert len(calls) == 1
    assert rows["fastattn"].status == "ok"


def test_gate_stops_nan():
    right = families()["module"].variant("fastattn")

    def build(case, dtype):
        step = right.build(case, dtype)
        return lambda: tuple(torch.full_like(t, math.nan) for t in step())

    accuracy = Gate(families()["module"], TINY).check(build(TINY, TINY.dtype), Variant("nan", build))
    assert not accuracy.passed


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (RuntimeError("boom"), "error"),
    ],
    ids=["cuda-oom", "cpu-oom", "other"],
)
def test_failure_is_a_row(error, status):
    def build(case, dtype):
        def step():
            raise error

        return step

    rows = {row.variant: row for row in run_case(_family_with(build), TINY, seconds=0.0)}
    assert rows["other"].status == status
    assert rows["other"].reason
    assert rows["fastattn"].status == "ok"


def test_timing_is_paired_with_the_peer():
    timings = time_on_cpu({"a": lambda: None, "b": lambda: None}, "b", seconds=0.0, minimum_rounds=3)
    assert timings["a"].rounds == timings["b"].rounds == 3
    assert timings["a"].ratio is not None
    assert timings["b"].ratio is None


def test_spread_of_known_numbers():
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == Spread(3.5, 2.0, 5.0)


def test_json_holds_environment_and_rows(tiny_rows, tmp_path):
    write_json(tmp_path / "a" / "b.json", tiny_rows, {"torch": torch.__version__})
    document = json.loads((tmp_path / "a" / "b.json").read_text())
    assert set(document) == {"schema", "environment", "results"}
    assert [set(result) for result in document["results"]] == [set(row_as_json(tiny_rows[0]))] * len(tiny_rows)
    ours = next(r for r in document["results"] if r["variant"] == "fastattn")
    assert ours["status"] == "ok"
    assert set(ours["wall_ms"]) == set(ours["ratio"]) == {"median", "p20", "p80"}


def test_list_says_why_a_variant_refuses(capsys):
    assert command_line.main(["--list", "--quick", "--only", "module-b1-h2-l16-d32-eval-weights"]) == 0
    output = capsys.readouterr().out.split("\n")
    assert output[0] == "module-b1-h2-l16-d32-eval-weights-float32"
    assert "    fastattn" in output
    assert "    qkv+sdpa  refuses: returns no weights" in output


def test_unknown_case_is_an_error(capsys):
    assert command_line.main(["--only", "nothing-like-it"]) == 2
    assert "nothing-like-it" in capsys.readouterr().err


def test_command_line_writes_json(capsys, tmp_path):
    threads = torch.get_num_threads()
    only = "module-b1-h2-l16-d32-eval-causal-float32"
    try:
        status = command_line.main(
            ["--quick", "--only", only, "--seconds", "0.01", "--json", str(tmp_path / "results.json")]
        )
    finally:
        torch.set_num_threads(threads)
    assert status == 0
    assert "nn.MultiheadAttention" in capsys.readouterr().out
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["environment"]["threads"] == 1
    assert {r["case"] for r in document["results"]} == {only}


def test_gpu_matrix_is_consistent():
    cases = gpu.matrix()
    assert len({case.name for case, _ in cases}) == len(cases)
    for case, names in cases:
        known = {variant.name for variant in families()[case.family].variants}
        assert set(names) <= known
        assert case.device == "cuda"


def test_gpu_dry_run_writes_every_case(capsys, tmp_path):
    with fastattn.use_backend("auto"):  # the kernels, in the interpreter where there is no GPU
        assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "benchmarks.json").read_text())
    assert {r["case"] for r in document["results"]} == {case.name for case, _ in gpu.dry_matrix()}
    assert all(r["status"] in ("ok", "refused") for r in document["results"])
    assert "fastattn beside the fastest" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_gpu_without_a_gpu_writes_nothing(capsys, tmp_path):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
