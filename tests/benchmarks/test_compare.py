"""Comparing two runs: verdicts on samples with known answers, exit codes, and files that are no runs."""

import dataclasses
import json
import random

import pytest

from benchmarks.measure.spread import Spread
from benchmarks.reporting.compare import compare, main

CASE, PEER = "norm-rms-m8-n64-forward-float32", "eager"
REPEATS = 200


def spread(values):
    return dataclasses.asdict(Spread.of(values))


def row(variant, wall, ratio=None, **more):
    """A timed row of these samples; where there are none, one that was not timed."""
    return {
        "case": CASE,
        "family": "norm",
        "dtype": "float32",
        "device": "cpu",
        "variant": variant,
        "status": "ok",
        "reason": "",
        "wall_ms": spread(wall) if wall else None,
        "ratio": spread(ratio) if ratio else None,
        "best": None,
        "best_ratio": None,
        "rounds": len(wall) or None,
        "contended": False,
        "others": 0.0,
        "peak_mib": None,
        **more,
    }


def draw(rng, *, rounds=20, sigma=0.05, ours=1.0, peer=1.0, machine=1.0):
    """Rows of one run: ours and the peer in turn, log-normal around these factors, two in twenty disturbed."""

    def sample(factor):
        disturbed = 1 + (rng.random() < 0.1) * rng.random()
        return machine * factor * rng.lognormvariate(0.0, sigma) * disturbed

    pairs = [(sample(ours), sample(peer)) for _ in range(rounds)]
    return [
        row("fastattn", [own for own, _ in pairs], [own / other for own, other in pairs]),
        row(PEER, [other for _, other in pairs]),
    ]


@pytest.fixture
def write(tmp_path):
    def write(name, rows, **environment):
        path = tmp_path / f"{name}.json"
        facts = {"torch": "2.13.0", "threads": 1, **environment}
        rest = {"state": "complete", "settings": {"seed": 0}, "ceilings": {}, "left_out": [], "seconds": 1.0}
        path.write_text(json.dumps({"schema": 3, "environment": facts, "results": rows, **rest}))
        return path

    return write


def verdicts(write, a, b):
    return {change.variant: change.verdict for change in compare(write("a", a), write("b", b)).changes}


def counted(write, seed, before, after, **more):
    """How often each verdict on ours comes out of as many repeats."""
    rng, counts = random.Random(seed), {}
    for _ in range(REPEATS):
        verdict = verdicts(write, draw(rng, **before, **more), draw(rng, **after, **more))["fastattn"]
        counts[verdict] = counts.get(verdict, 0) + 1
    return counts


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("rounds", [5, 8, 20])
def test_compare_gives_no_false_alarm(write, rounds, sigma):
    """At most one in a hundred where there are eight rounds or more, three in a hundred where there are five."""
    counts = counted(write, 1, {}, {}, rounds=rounds, sigma=sigma)
    alarms = counts.get("slower", 0) + counts.get("faster", 0)
    assert alarms <= REPEATS * (0.03 if rounds < 8 else 0.01), counts


@pytest.mark.parametrize(("factor", "verdict"), [(1.2, "slower"), (1 / 1.2, "faster")])
def test_compare_finds_a_fifth(write, factor, verdict):
    """Nine times of ten at 20 rounds with 5 % of noise, and every time without it."""
    assert counted(write, 2, {}, {"ours": factor}).get(verdict, 0) >= 0.9 * REPEATS
    a, b = (row("fastattn", [x] * 5, [x] * 5) for x in (1.0, factor))
    assert verdicts(write, [a], [b])["fastattn"] == verdict


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_compare_knows_another_machine(write, factor):
    """All is twice as slow, or as fast: the peer, which has no ratio of its own, is not to blame either."""
    counts = counted(write, 3, {}, {"machine": factor})
    assert counts.get("machine", 0) >= 0.98 * REPEATS, counts
    rng = random.Random(4)
    assert verdicts(write, draw(rng), draw(rng, machine=factor)) == {"fastattn": "machine", PEER: "machine"}


def test_compare_finds_a_fifth_on_another_machine(write):
    counts = counted(write, 5, {}, {"machine": 2.0, "ours": 1.2}, sigma=0.02, rounds=40)
    assert counts.get("slower", 0) >= 0.9 * REPEATS, counts


def test_compare_ratio_that_only_the_peer_moved_is_no_regression(write):
    rng = random.Random(6)
    found = verdicts(write, draw(rng), draw(rng, peer=0.5))
    assert found == {"fastattn": "same", PEER: "faster"}


def test_compare_without_a_peer_holds_rows_against_each_other(write):
    """Cases that the peer refuses: what all of their rows do is the machine's, what one does is its own."""
    before = [row(name, [1.0] * 20) for name in ("fastattn", "naive", "flex")]
    slow = [row(name, [2.0] * 20) for name in ("fastattn", "naive", "flex")]
    assert set(verdicts(write, before, slow).values()) == {"machine"}
    assert verdicts(write, before, [slow[0], *before[1:]]) == {"fastattn": "slower", "naive": "same", "flex": "same"}
    assert verdicts(write, before[:1], slow[:1]) == {"fastattn": "slower"}


def test_compare_threshold_is_respected(write):
    a, b = (write(name, [row("fastattn", [x] * 20, [x] * 20)]) for name, x in (("a", 1.0), ("b", 1.08)))
    assert compare(a, b).changes[0].verdict == "slower"
    assert compare(a, b, threshold=0.1).changes[0].verdict == "same"
    assert main([str(a), str(b), "--threshold", "0.1"]) == 0


def test_compare_same_run_exits_0(write, capsys):
    path = write("a", draw(random.Random(7)))
    assert main([str(path), str(path)]) == 0
    assert (
        "0 slower, 0 faster, 0 machine, 2 same, 0 of fastattn began to fail or are missing, 0 take more memory"
        in capsys.readouterr().out
    )


def test_compare_slower_exits_1(write, capsys):
    rng = random.Random(8)
    a, b = write("a", draw(rng)), write("b", draw(rng, ours=2.0))
    assert main([str(a), str(b)]) == 1
    assert "1 slower" in capsys.readouterr().out
    assert main([str(b), str(a)]) == 0


@pytest.mark.parametrize("status", ["wrong", "error", "out of memory", "timed out"])
def test_compare_failure_exits_1(write, capsys, status):
    rows = draw(random.Random(9))
    failed = [row("fastattn", [], status=status, reason="its reason"), rows[1]]
    a, b = write("a", rows), write("b", failed)
    assert main([str(a), str(b)]) == 1
    output = capsys.readouterr().out
    assert "status changed" in output
    assert "its reason" in output
    assert main([str(b), str(b)]) == 0  # no change
    assert main([str(b), str(a)]) == 0  # repaired


def test_compare_rows_that_come_and_go_are_listed(write, capsys):
    rows = draw(random.Random(10))
    a, b = write("a", rows), write("b", [rows[0], row("quack", [], status="refused", reason="not installed")])
    assert main([str(a), str(b)]) == 0
    output = capsys.readouterr().out
    assert output.index("only in A") < output.index(PEER, output.index("only in A")) < output.index("only in B")
    assert "not installed" in output
    new_and_wrong = write("c", [*rows, row("fastattn-torch", [], status="wrong")])
    assert main([str(a), str(new_and_wrong)]) == 1


@pytest.mark.parametrize("becomes", ["refused", "unchecked", "missing"])
def test_compare_ours_without_a_time_exits_1(write, becomes):
    """What is not measured has not become faster."""
    rows = draw(random.Random(10))
    rest = [] if becomes == "missing" else [row("fastattn", [], status=becomes, reason="its reason")]
    a, b = write("a", rows), write("b", [*rest, rows[1]])
    assert main([str(a), str(b)]) == 1
    assert main([str(b), str(a)]) == 0


@pytest.mark.parametrize("status", ["wrong", "slower"])
def test_compare_what_peers_do_is_theirs(write, status):
    rows = draw(random.Random(10))
    peer = row(PEER, [], status="wrong") if status == "wrong" else row(PEER, [50.0] * 20)
    assert main([str(write("a", rows)), str(write("b", [rows[0], peer]))]) == 0


def test_compare_runs_with_nothing_in_common_exit_2(write, capsys):
    rows = draw(random.Random(10))
    others = [{**r, "case": "another"} for r in rows]
    assert main([str(write("a", rows)), str(write("b", others))]) == 2
    assert main([str(write("a", rows)), str(write("b", []))]) == 2
    assert "nothing to compare" in capsys.readouterr().err


def test_compare_shows_the_memory_that_moved(write, capsys):
    """Every row has a peak: those that are alike, or apart by a few pages, say nothing."""
    peaks = {"fastattn": (10.0, 20.0), PEER: (40.0, 40.5), "naive": (0.1, 0.9)}
    a, b = ([row(name, [1.0] * 20, peak_mib=pair[i]) for name, pair in peaks.items()] for i in (0, 1))
    a, b = write("a", a), write("b", b)
    assert compare(a, b).memory == {(CASE, name): pair for name, pair in peaks.items()}
    assert main([str(a), str(b)]) == 0  # 10 MiB more: by so much may one step differ
    lines = capsys.readouterr().out.split("\n")
    start = lines.index("peak memory, MiB, where it moved by 5%")
    assert [line.split() for line in lines[start + 2 : start + 4]] == [[CASE, "fastattn", "10", "20", "2.00"], []]


def test_compare_ours_that_takes_more_memory_exits_1(write):
    a, b, c = (
        write(n, [row("fastattn", [1.0] * 20, peak_mib=mib)]) for n, mib in (("a", 40.0), ("b", 49.0), ("c", 60.0))
    )
    assert main([str(a), str(b)]) == 0
    assert main([str(a), str(c)]) == 1
    assert main([str(c), str(a)]) == 0


def test_compare_warns_of_other_surroundings(write):
    rows = draw(random.Random(12))
    other = [{**r, "device": "cuda"} for r in rows]
    warnings = compare(write("a", rows), write("b", other, torch="2.14.0", threads=2)).warnings
    assert warnings == [
        "torch: 2.13.0 in A, 2.14.0 in B",
        "threads: 1 in A, 2 in B",
        "device of the rows: cpu in A, cuda in B",
    ]


def _document(rows):
    rest = '"state": "complete", "settings": {}, "environment": {}, "ceilings": {}, "left_out": [], "seconds": 1.0'
    return f'{{"schema": 3, {rest}, "results": {rows}}}'


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        ("{", "Expecting"),
        (b"\xff\xfe\x00", "decode"),
        ("[]", "no schema"),
        ('{"results": []}', "no schema"),
        ('{"schema": 2, "results": []}', "schema 2: run it again"),
        ('{"schema": 3}', "it has no ceilings, environment"),
        (_document('[{"case": "x"}]'), "results are not rows with"),
        (_document(json.dumps([{**row("fastattn", [1.0]), "wall_ms": "fast"}])), "is no spread: 'fast'"),
    ],
    ids=["missing", "no-json", "binary", "list", "no-schema", "old-schema", "no-results", "no-rows", "no-spread"],
)
def test_compare_unreadable_file_exits_2(write, tmp_path, capsys, content, reason):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main([str(write("a", draw(random.Random(13)))), str(path)]) == 2
    message = capsys.readouterr().err
    assert str(path) in message
    assert "expected a run of schema 3" in message
    assert reason in message
