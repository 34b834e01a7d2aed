"""First launches: what each of ours becomes on a small problem, and what a run makes of those that fail."""

import dataclasses
import json

import pytest
import torch

import fastattn
from benchmarks import selection
from benchmarks.cases import AttentionCase, KernelCase, NormCase
from benchmarks.families import attention, kernels
from benchmarks.gpu import first_launches, pool
from benchmarks.gpu.first_launches import Outcome, barred, carry_out, launch_of, sentences, tasks_of
from benchmarks.gpu.pool import Report, Task
from benchmarks.jobs import new_document
from benchmarks.selection import Settings
from benchmarks.variants import Refused, Variant
from tests.benchmarks import stub_tasks as stubs

CASE = KernelCase("kernels", 8, 16, 4096, 128, mask="causal", dtype=torch.bfloat16)
BACKWARD = dataclasses.replace(CASE, backward=True)
TINY = KernelCase("kernels", 1, 1, 9, 4)


@pytest.fixture(autouse=True)
def _compiled_code():
    with fastattn.use_backend("torch"):
        yield


# ------------------------------------------------------------------------------------------------------- small problems


def test_small_problem_is_of_the_same_kind_and_compiled_alike():
    small = kernels.small(CASE)
    assert (small.head_dim, small.mask, small.dtype, small.backward) == (128, "causal", torch.bfloat16, False)
    assert small.seqlen % 16 == CASE.seqlen % 16 == 0
    assert small.batch * small.heads * small.seqlen**2 < 1 << 21
    assert kernels.small(dataclasses.replace(CASE, seqlen=16384)) == small
    assert kernels.small(CASE, backward=True) == kernels.small(BACKWARD)


@pytest.mark.parametrize("mask", ["none", "causal", "window", "padding", "bias", "boolean", "sparse"])
def test_ragged_problem_has_the_same_strides_but_for_its_length(mask):
    """Where a stride of a mask is the length, another kernel would be compiled for it."""
    small = kernels.small(dataclasses.replace(CASE, mask=mask))
    ragged = kernels.ragged(small)
    if mask in ("none", "causal", "window"):
        assert ragged is not None
        assert ragged.seqlen % 16
        assert dataclasses.replace(ragged, seqlen=small.seqlen) == small
    else:
        assert ragged is None


def test_tasks_are_one_for_each_variant_and_kind_and_what_the_package_picks_comes_last():
    entries = [
        (dataclasses.replace(CASE, seqlen=seqlen), ("fastattn", "fastattn-triton", "sdpa")) for seqlen in (4096, 512)
    ]
    entries += [(BACKWARD, ("fastattn", "fastattn-gluon-pair", "flex"))]
    entries += [(AttentionCase("attention", 1, 1, 64, 64), ("fastattn",))]
    tasks = tasks_of(entries)
    assert [task.arguments for task in tasks] == [
        ("fastattn-triton", kernels.small(CASE)),
        ("fastattn-gluon-pair", kernels.small(BACKWARD)),
        ("fastattn", kernels.small(CASE)),
        ("fastattn", kernels.small(BACKWARD)),
    ]
    assert tasks[1].group == "fastattn-gluon-pair backward"
    assert len({task.key for task in tasks}) == len(tasks)


# ------------------------------------------------------------------------------------------------------------- a launch


def outcome_of(build=None, **options):
    """Of a variant that is built so; by default, of ours."""
    ours = attention.FAMILY.variant("fastattn").build
    family = dataclasses.replace(kernels.FAMILY, variants=(Variant("it", build or ours, **options),))
    return launch_of(family, "it", TINY)


def test_launch_that_is_right_has_its_worst_error():
    outcome = outcome_of()
    assert outcome.status == "ok"
    assert outcome.error is not None
    assert outcome.error_budget is not None
    assert 0.0 < outcome.error <= outcome.error_budget


def test_launch_that_is_wrong_now_and_then_is_wrong():
    """The third time: a race need not show at once."""
    calls = []

    def build(case, dtype):
        step = attention.FAMILY.variant("fastattn").build(case, dtype)

        def spoiled():
            calls.append(case.seqlen)
            (output,) = step()
            return (output + (len(calls) == 3),)

        return spoiled

    outcome = outcome_of(build)
    assert outcome.status == "wrong"
    assert outcome.reason.endswith("from float64 at L = 9")
    assert calls == [9, 9, 9]


def test_launch_is_tried_on_a_ragged_length_too():
    lengths = []

    def build(case, dtype):
        lengths.append(case.seqlen)
        return attention.FAMILY.variant("fastattn").build(case, dtype)

    assert outcome_of(build).status == "ok"
    assert lengths == [9, 2]


def test_launch_that_raises_or_refuses_says_why():
    def broken(case, dtype):
        raise ZeroDivisionError("of nought")

    def refuses(case, dtype):
        raise Refused("not today")

    assert outcome_of(broken) == Outcome("error", "ZeroDivisionError: of nought")
    assert outcome_of(refuses) == Outcome("refused", "not today")
    assert outcome_of(applies=lambda case: "never") == Outcome("refused", "never")


def test_launch_that_ruins_its_process_gives_it_up(monkeypatch):
    """After an illegal access nothing works, which the next launch would be blamed for."""

    def broken(case):
        raise RuntimeError("an illegal memory access")

    def lost():
        raise RuntimeError("lost")

    family = dataclasses.replace(kernels.FAMILY, variants=(Variant("it", lambda *_: tuple, applies=broken),))
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(pool.Unusable, match="RuntimeError: an illegal memory access"):
        launch_of(family, "it", dataclasses.replace(TINY, device="cuda"))


# --------------------------------------------------------------------------------------------------------- all of them


def call(variant, case, name, arguments):
    """What a task of :func:`stub` does, in its own process."""
    return getattr(stubs, name)(*arguments)


def stub(variant, name, *arguments):
    """A task whose row is of this variant, and which calls that function of the stubs."""
    return Task(f"{variant}: here", variant, call, (variant, TINY, name, arguments))


def test_file_has_what_became_of_each(tmp_path):
    ok, wrong = Outcome("ok", "", 1e-3, 2e-3), Outcome("wrong", "1.0e+00 from float64", None, 2e-3)
    tasks = [stub("right", "right", ok), stub("wrong", "right", wrong), stub("raises", "raises")]
    path = tmp_path / "first_launches.json"
    document = carry_out([*tasks, stub("sleeps", "sleeps")], path, budget=60.0, limit=1.0, workers=1)
    assert json.loads(path.read_text()) == document
    found = {row["variant"]: row for row in document["launches"]}
    assert {name: row["status"] for name, row in found.items()} == {
        "right": "ok",
        "wrong": "wrong",
        "raises": "error",
        "sleeps": "timed out",
    }
    assert found["right"]["error"] == 1e-3
    assert found["raises"]["reason"] == "ZeroDivisionError: of nought"
    assert "no sign of life for 1 s" in found["sleeps"]["reason"]
    assert {row["case"] for row in found.values()} == {TINY.name}
    assert document["left_out"] == []


def rows(*statuses, variant="fastattn-gluon", case=CASE):
    return [
        {"variant": variant, "case": kernels.small(case).name, "status": status, "reason": "so", "seconds": 1.0}
        for status in statuses
    ]


def test_sentences_count_and_name_what_is_not_timed():
    several = rows("timed out") + rows("timed out", case=dataclasses.replace(CASE, mask="none"))
    document = {"launches": [*rows("ok", "ok", "refused"), *several], "left_out": ["a"]}
    assert sentences(document) == [
        "first launches: 2 ok, 1 refused, 2 timed out; 1 left out, for which the watchdog of the timed run is there",
        "not timed: fastattn-gluon in kernels-b2-h2-l512-d128-forward-causal-bfloat16 and 1 more: timed out: so",
    ]
    assert sentences({"launches": [], "left_out": []}) == ["first launches: none"]


# ------------------------------------------------------------------------------------------------- what follows of them


@pytest.fixture
def launched(tmp_path):
    """The path of a file with these rows."""

    def write(launches):
        first_launches._read.cache_clear()
        path = tmp_path / "first_launches.json"
        path.write_text(json.dumps({"launches": launches}))
        return str(path)

    return write


def test_what_failed_is_barred_for_every_length_of_its_kind(launched):
    path = launched(rows("timed out", variant="g") + rows("wrong", variant="a") + rows("ok", "refused", variant="b"))
    expected = {"g": ("timed out", "first launch: so"), "a": ("wrong", "first launch: so")}
    assert barred(path, CASE) == barred(path, dataclasses.replace(CASE, seqlen=8192)) == expected
    for other in (BACKWARD, dataclasses.replace(CASE, mask="none"), dataclasses.replace(CASE, head_dim=64)):
        assert barred(path, other) == {}
    assert barred("", CASE) == {}


def test_hang_of_what_the_package_picks_bars_it_in_every_family_of_attention(launched):
    path = launched(rows("timed out", variant="fastattn", case=BACKWARD) + rows("timed out", variant="a"))
    train = AttentionCase("layer", 4, 16, 1024, 128, mask="causal", backward=True, dtype=torch.bfloat16)
    assert barred(path, train) == barred(path, BACKWARD) == {"fastattn": ("timed out", "first launch: so")}
    assert barred(path, dataclasses.replace(train, backward=False)) == {}
    assert barred(path, dataclasses.replace(train, head_dim=64)) == {}
    assert barred(path, NormCase("norm", "layer", 8, 8)) == {}
    assert barred(launched(rows("wrong", variant="fastattn", case=BACKWARD)), train) == {}


def test_backward_hangs_where_its_forward_did(launched):
    train = AttentionCase("layer", 4, 16, 1024, 128, mask="causal", backward=True, dtype=torch.bfloat16)
    path = launched(rows("timed out", variant="fastattn"))
    for case in (train, dataclasses.replace(train, backward=False), CASE, BACKWARD):
        assert set(barred(path, case)) == {"fastattn"}


@pytest.mark.parametrize("case", [CASE, BACKWARD], ids=["forward", "backward"])
def test_hang_of_the_kernels_is_one_of_the_pick_where_that_was_not_launched(launched, case):
    kernel = "fastattn-gluon-pair" if case.backward else "fastattn-gluon"
    hung = rows("timed out", variant=kernel, case=case)
    assert set(barred(launched(hung), case)) == {"fastattn", kernel}
    assert first_launches.hangs({"launches": hung})
    fine = rows("ok", variant="fastattn", case=case)
    assert set(barred(launched(hung + fine), case)) == {kernel}
    assert not first_launches.hangs({"launches": hung + fine})


def test_run_has_rows_of_what_is_barred_and_does_not_run_it(launched, monkeypatch):
    ran = []

    def run_case(family, case, *, only, **options):
        ran.extend(only)
        return []

    monkeypatch.setattr(selection, "run_case", run_case)
    settings = Settings(quick=True, launched=launched(rows("timed out", variant="fastattn-triton")))
    job = selection._of_case(CASE, ("fastattn", "fastattn-triton", "sdpa"), settings)
    (row,) = job.work(new_document({}, {}), [], lambda *_: None)["results"]
    assert ran == ["fastattn", "sdpa"]
    assert (row["variant"], row["status"], row["reason"]) == ("fastattn-triton", "timed out", "first launch: so")


def test_what_hung_in_two_cases_of_a_run_is_not_tried_again():
    """Of the same family and direction; each hang costs the run a watchdog's patience."""
    document = new_document({}, {})
    document["hung"] = {CASE.name: ["a", "b"], dataclasses.replace(CASE, mask="none").name: ["a"], BACKWARD.name: ["b"]}
    found = selection._hung_elsewhere(document, dataclasses.replace(CASE, mask="window"))
    assert found == {"a": ("timed out", "hung in 2 cases before")}
    assert selection._hung_elsewhere(document, BACKWARD) == {}
    assert selection._hung_elsewhere(document, NormCase("norm", "layer", 8, 8)) == {}


def test_skipped_launch_has_hung():
    assert first_launches._outcome(Report("skipped", reason="so")) == Outcome("timed out", "so")
