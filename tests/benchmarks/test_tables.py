"""Tables and sentences of a made-up run: each figure is where it belongs, and both renderers say the same."""

import builtins
import json
import re
import subprocess
import sys

import pytest

from benchmarks.reporting.document import SCHEMA, peer_of, read_run, short_names, verdict, write_run
from benchmarks.reporting.findings import findings
from benchmarks.reporting.tables import all_tables, family_table, memory_table, quality_tables, summary
from benchmarks.reporting.text import _FIRST_TO_GO, Table, as_markdown, number, rate, show, table_of
from tests.benchmarks.documents import attention, document, module, norm, refused, row, sequence, spread, write


def line_of(table, *, case=None, variant):
    """The cells by column of a variant below the heading of a case, or of any."""
    below = None
    for line in table.lines:
        if not any(line[1:]):
            below = line[0]
        elif case in (below, None) and line[0].strip() == variant:
            return dict(zip(table.header, line))
    raise AssertionError(f"{table.title} has no {variant} of {case}")


# ----------------------------------------------------------------------------------------------------------- documents


def test_run_that_was_written_reads_back(tmp_path):
    """NaN and all; nothing else is left in the folder."""
    path = tmp_path / "new" / "run.json"
    content = document([row("norm-m8-n64", "fastattn", 1.0, error=float("nan"))])
    write_run(path, content)
    assert str(read_run(path)) == str(content)
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_run_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "run.json"
    write_run(path, document())
    before = path.read_text()
    with pytest.raises(TypeError):
        write_run(path, document(bad={1, 2}))
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        ("{", "Expecting"),
        ("[]", "it has no schema"),
        ('{"schema": 2, "results": []}', "it has schema 2: run it again"),
        ('{"schema": 3}', "it has no ceilings, environment, left_out"),
    ],
)
def test_file_that_is_no_run_is_refused(tmp_path, content, reason):
    path = tmp_path / "old.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"old.json: expected a run of schema {SCHEMA}.*{reason}"):
        read_run(path)


def test_short_names_lose_what_all_share():
    names = ["norm-layer-n64-float32", "norm-rms-n64-float32"]
    assert short_names(names) == (dict(zip(names, ("layer", "rms"))), "norm-n64-float32")
    assert short_names(["a-b"]) == ({"a-b": "a-b"}, "a-b")
    assert short_names([]) == ({}, "")


def test_verdict_goes_by_the_confidence_interval():
    """Not by the spread of the samples, which is wide here, and not by the median alone."""
    assert verdict(spread(0.97, 0.95, 0.99)) == "faster"
    assert verdict(spread(0.97, 0.95, 1.01)) == "level"
    assert verdict(spread(1.03, 1.01, 1.05)) == "slower"


def test_peer_is_who_has_no_ratio():
    assert peer_of(module()) == "nn.MultiheadAttention"
    assert peer_of(norm()) == "eager"
    assert peer_of([row("norm-m8", "fastattn", 1.0), row("norm-m8", "eager", 1.0)]) is None


@pytest.mark.parametrize(
    ("value", "written"), [(None, ""), (0.0286532, "0.0287"), (7.0, "7"), (1234.5, "1234"), (float("nan"), "nan")]
)
def test_number_keeps_three_digits(value, written):
    assert number(value) == written


def test_rate_takes_the_unit_that_fits():
    assert (rate(0.045, "B/s"), rate(3.35, "B/s"), rate(None, "B/s")) == ("45 GB/s", "3.35 TB/s", "")


# -------------------------------------------------------------------------------------------------------------- tables


def test_family_table_has_every_figure():
    table = family_table(document(), "module")
    assert table.title == "module: b8-h2-l64-d4-float32, ratio to nn.MultiheadAttention"
    ours = line_of(table, case="train-weights", variant="fastattn")
    assert ours["ms [p20 p80]"] == "3 [2.7 3.6]"
    assert ours["ratio [95 %]"] == "1.50 [1.47 1.53]"
    assert ours["error/budget"] == "1e-7/1e-6"
    assert (ours["peak MiB"], ours["saved MiB"]) == ("10", "5")


def test_family_table_names_the_best_other_where_it_is_not_the_peer():
    table = family_table(document(), "module")
    ours = line_of(table, case="eval", variant="fastattn")
    assert (ours["best other"], ours["ratio to it"]) == ("qkv+sdpa", "0.80 [0.70 0.90]")
    assert line_of(table, case="eval-weights", variant="fastattn")["best other"] == ""
    assert line_of(table, case="eval", variant="nn.MultiheadAttention")["best other"] == ""


def test_family_table_sets_the_fastest_of_a_case_off():
    table = family_table(document(), "module")
    assert [table.lines[i][0].strip() for i in sorted(table.strong)] == ["fastattn"] * 2 + ["nn.MultiheadAttention"] * 2


def test_family_table_leaves_refusals_out_and_counts_them():
    table = family_table(document(), "module")
    assert "2 rows were refused" in table.note
    text = as_markdown(table)
    assert "returns no weights" not in text
    alone = family_table(document([refused("module-b1", "fastattn", "a reason")]), "module")
    assert alone.lines == ()
    assert "1 row was refused" in alone.note


@pytest.mark.parametrize("status", ["wrong", "timed out", "out of memory", "error"])
def test_family_table_says_what_failed_and_why(status):
    failed = [row(f"module-b{n}", "fastattn", status=status, reason="its reason", error=2e-6) for n in (1, 2)]
    table = family_table(document(failed), "module")
    assert line_of(table, variant="fastattn")["ms [p20 p80]"] == status
    assert table.note == f"fastattn: {status}: its reason (2 cases)"


def test_family_table_marks_contended_rows_and_shows_their_other_clock():
    """The processor's time only says something new where the clocks differ."""
    rows = list(module())
    rows[0] |= {"contended": True, "others": 1.3}
    quiet, disturbed = family_table(document(list(module())), "module"), family_table(document(rows), "module")
    assert "cpu ms" not in quiet.header
    assert "trust" not in quiet.note
    ours = line_of(disturbed, case="eval", variant="fastattn")
    assert ours["ms [p20 p80]"] == "1* [0.9 1.2]"
    assert (ours["cpu ms"], ours["cpu ratio"]) == ("1", "0.50 [0.49 0.51]")
    assert line_of(disturbed, case="eval", variant="qkv+sdpa")["cpu ms"] == ""
    assert "* others kept up to 1.3 cores busy meanwhile: trust the cpu ratio" in disturbed.note.split("\n")
    rows[0]["process_ms"] = spread(0.9)
    rows[0]["contended"] = False
    assert line_of(family_table(document(rows), "module"), case="eval", variant="fastattn")["cpu ms"] == "0.9"


def test_family_table_shows_the_rate_that_makes_the_floor():
    """Bytes where moving them at the copy's rate takes longer than the operations."""
    both = {"flops": 1e6, "moved_bytes": 80_000_000, "tflops": 0.02, "tb_per_s": 0.03, "of_floor": 0.5}
    rows = [
        row("attention-b1", "fastattn", 4.0, floor_ms=2.0, **both),  # 80e6 bytes at 0.04 TB/s: 2 ms
        row("attention-b2", "fastattn", 4.0, floor_ms=3.0, **both),
    ]
    table = family_table(document(rows, ceilings={"copy_tb_per_s": 0.04}), "attention")
    assert line_of(table, case="b1", variant="fastattn")["rate"] == "30 GB/s"
    assert line_of(table, case="b2", variant="fastattn")["rate"] == "20 GF/s"


def test_family_table_prints_each_formula_once_with_what_it_is_of():
    notes = family_table(document(), "sequence").note.split("\n")
    assert notes == [
        f"floor of {name}: flops of {name}" for name in ("fastattn", "nn.MultiheadAttention", "nn.LSTM", "causal-conv")
    ]
    assert family_table(document(), "norm").note.split("\n")[-1] == "floor: bytes 16 M N"
    rows = [row(f"attention-{way}-float32", "fastattn", 1.0, formula=way) for way in ("eval", "train")]
    notes = family_table(document(rows), "attention").note.split("\n")
    assert notes == ["floor of eval: eval", "floor of train: train"]


def test_family_table_has_columns_of_cuda():
    rows = [row("norm-m8", "fastattn", 1.0, warm_ms=spread(0.5), graph_ms=spread(0.25), host_ms=spread(0.125))]
    ours = line_of(family_table(document(rows), "norm"), variant="fastattn")
    assert (ours["warm ms"], ours["graph ms"], ours["host ms"]) == ("0.5", "0.25", "0.125")


def test_memory_table_sets_ours_beside_the_peer():
    lines = {line[0]: dict(zip(memory_table(document()).header, line)) for line in memory_table(document()).lines}
    line = lines["module-b8-h2-l64-d4-train-weights-float32"]
    assert line["other"] == "nn.MultiheadAttention"
    assert [line[name] for name in ("peak MiB", "its peak", "ours / its")] == ["10", "40", "0.25"]
    assert [line[name] for name in ("saved MiB", "its saved", "saved / its")] == ["5", "20", "0.25"]
    assert not any(case.startswith("norm") for case in lines)


def test_quality_tables_name_the_best_and_its_ties():
    """Of accuracies nearer than the noise none is called the better one."""
    shared = {"task": "parity 4 bits", "chance": 0.5, "parameters": 100_000, "steps": 50, "seconds": 1.25}
    accuracies = {"attention": 0.61, "gru": 0.991, "lstm": 1.0}
    rows = [{**shared, "model": model, "accuracy": accuracy} for model, accuracy in accuracies.items()]
    (accuracy, cost) = quality_tables({"quality": rows})
    assert accuracy.lines == (("parity 4 bits", "0.500", "0.610", "0.991", "1.000", "gru, lstm"),)
    assert cost.lines[0] == ("parity 4 bits", "attention", "100.0k", "50", "1.2")
    assert quality_tables(document())[-1].lines == (("attention", "3.0e-16"),)


def test_summary_has_a_line_for_each_case_of_ours():
    table = summary(document())
    lines = {line[0]: dict(zip(table.header, line)) for line in table.lines}
    assert len(lines) == 4 + 1 + 4 + 1 + 4
    plain = lines["module-b8-h2-l64-d4-eval"]
    assert (plain["other"], plain["ratio to it [95 %]"]) == ("qkv+sdpa", "0.80 [0.70 0.90]")
    assert lines["module-b8-h2-l64-d4-eval-weights"]["MiB ours / its"] == "10 / 40"
    assert lines["norm-layer-m512-n64-forward"]["of floor"] == "0.75"
    assert lines["sequence-b1-l64-eval"]["other"] == "nn.MultiheadAttention"


def test_summary_says_where_ours_failed():
    table = summary(document([row("module-b7", "fastattn", status="wrong", reason="off"), *attention()]))
    assert table.lines[0][1] == "wrong"
    assert table.note == "module-b7: wrong: off"


def test_all_tables_are_those_that_have_something_to_show():
    titles = [table.title.split(":")[0].split(",")[0] for table in all_tables(document())]
    families = ["sequence", "attention", "norm", "layer", "module"]
    assert titles[:6] == ["ceilings", *families]
    assert len(titles) == 6 + len(["memory", "tiles", "theory"]) + 3
    assert all_tables(document([])) == []


# ----------------------------------------------------------------------------------------------------------- renderers


def test_markdown_tables_are_rectangular():
    tables = all_tables(document())
    tables.append(Table("pipes", ("a", "b"), (("x | y", "*z*"), ("<p>", "\\"))))
    for table in tables:
        rows = [line for line in as_markdown(table).split("\n") if line.startswith("|")]
        assert len(rows) == len(table.lines) + 2
        counts = {len(re.findall(r"(?<!\\)\|", line.replace("\\\\", ""))) for line in rows}
        assert counts == {len(table.header) + 1}, table.title


def test_columns_that_are_empty_throughout_are_dropped():
    assert table_of("t", ("a", "b", "c"), [("1", "", "2"), ("", "", "3")]).header == ("a", "c")


def test_terminal_without_rich_gets_what_markdown_says(capsys, monkeypatch):
    found = builtins.__import__

    def without_rich(name, *arguments, **more):
        if name.startswith("rich"):
            raise ImportError(name)
        return found(name, *arguments, **more)

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(builtins, "__import__", without_rich)
    for table in all_tables(document()):
        show(table)
        printed = capsys.readouterr().out.split("\n")
        assert printed[1] == table.title
        start = printed[2].rindex(table.header[-1])
        for line, cells in zip(printed[3:], table.lines):
            assert line[start:] == cells[-1].rstrip()
            assert all(cell in line for cell in cells)
        assert "\n".join(printed).rstrip("\n").endswith(table.note)


def test_terminal_with_rich_breaks_no_cell(capsys, monkeypatch):
    """Brackets are no markup, and a table that is wider than the terminal keeps its lines."""
    pytest.importorskip("rich", reason="rich is not installed")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    table = family_table(document(), "module")
    show(table)
    printed = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    kept = [i for i, name in enumerate(table.header) if name not in _FIRST_TO_GO]
    assert 2 < len(kept) < len(table.header)
    for cell in (line[i] for line in (table.header, *table.lines) for i in kept):
        assert cell in printed
    assert "…" not in printed


# ------------------------------------------------------------------------------------------------------------ findings


def test_findings_count_by_the_interval():
    found = findings(document())
    (sentence,) = [s for s in found if s.startswith("module:")]
    assert "in 4 cases fastattn is faster than the fastest other in 1, level in 1, slower in 2" in sentence
    assert "at worst 1.50 times as long as nn.MultiheadAttention (module-b8-h2-l64-d4-eval-weights-float32)" in sentence


def test_findings_begin_with_failures_of_ours():
    rows = [*attention(), row("sequence-b9", "fastattn", status="wrong"), row("sequence-b9", "sdpa", status="error")]
    first, second, *_ = findings(document([*rows, refused("norm-m8", "fastattn", "a reason")]))
    assert first == "fastattn failed: wrong in sequence-b9."
    assert "in 1 case fastattn is faster than the fastest other in 1, level in 0, slower in 0" in second


def test_findings_say_where_others_beat_attention():
    found = findings(document())
    limited = "causal-conv (a convolution) is fastest, but reaches 3 tokens; of the ways that reach every token "
    for direction in ("Evaluation", "Training"):
        short, long = [s for s in found if s.startswith(direction)]
        assert short == (
            f"{direction}, L = 16: {limited}nn.LSTM (a recurrence) is, in 0.50 of the time of the fastest attention "
            "(fastattn)."
        )
        assert long == f"{direction}, L = 64: {limited}fastattn is; the fastest recurrence takes 1.50 times as long."


def test_findings_take_lengths_of_one_order_together():
    rows = [r for r in sequence() if r["variant"] in ("fastattn", "nn.LSTM") and not r["backward"]]
    for r in rows:
        r["wall_ms"] = spread({"fastattn": 1.0, "nn.LSTM": r["seqlen"] / 8}[r["variant"]])
    assert findings(document(rows))[0] == (
        "Evaluation, L = 16 to 64: fastattn is fastest; the fastest recurrence takes 2.00 to 8.00 times as long."
    )


def test_findings_say_who_learns_what():
    sentences = [s for s in findings(document()) if s.startswith("recall")]
    learned = "recall 8 pairs: attention learns it best, to an accuracy of 0.99, the others to 0.10 to 0.25"
    assert sentences == [f"{learned}; a guess has 0.03."]
    rows = [{"task": "t", "model": m, "accuracy": 1.0, "chance": 0.5} for m in ("gru", "lstm")]
    both = findings(document([], quality=rows))
    seeds = "Each was trained once, from one seed."
    assert both == [f"t: gru and lstm learn it best, to an accuracy of 1.00; a guess has 0.50. {seeds}"]


def test_findings_of_a_single_model_are_none():
    """A run that was cut short after the first of them has no best one."""
    rows = [{"task": "t", "model": "attention", "accuracy": 0.6, "chance": 0.5}]
    assert findings(document([], quality=rows)) == []


def test_findings_name_what_is_above_the_ceilings():
    rows = list(attention())
    rows[0]["of_floor"], rows[1]["of_floor"] = 1.04, 0.5
    assert not any("ceilings" in sentence for sentence in findings(document(rows)))
    rows[1]["of_floor"] = 1.5
    (sentence,) = [sentence for sentence in findings(document(rows)) if "ceilings" in sentence]
    assert sentence.startswith("1 rows are faster than the measured ceilings allow, at most 1.50 times as fast")
    assert rows[1]["variant"] in sentence


def test_findings_count_contended_rows():
    rows = list(attention())
    rows[0]["others"], rows[1]["others"] = 0.26, 0.1
    beside = "other processes kept up to 0.3 cores busy beside them."
    assert findings(document(rows))[-1] == f"None of the 2 timed rows waited for a core; {beside}"
    rows[0]["contended"] = True
    assert findings(document(rows))[-1] == f"1 of the 2 timed rows waited for a core: trust their cpu ratio; {beside}"
    assert len(findings(document([{**r, "others": None} for r in rows]))) == 1  # nobody watched


def test_findings_of_an_empty_run_are_none():
    assert findings(document([])) == []


def test_reading_runs_needs_no_torch(tmp_path):
    """Reports are instant: torch alone takes seconds to import."""
    path = write(tmp_path / "run.json", document())
    code = "import sys; from benchmarks.__main__ import main; main(['report', sys.argv[1]]); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True)
    assert json.loads(path.read_text())["schema"] == SCHEMA
    assert (tmp_path / "report.md").exists()


def test_narrow_terminal_does_without_some_columns(capsys, monkeypatch):
    pytest.importorskip("rich", reason="rich is not installed")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    table = family_table(document(), "attention")
    shown = {}
    for width in (250, 80):
        monkeypatch.setenv("COLUMNS", str(width))
        show(table)
        shown[width] = capsys.readouterr().out
    assert "error/budget" in shown[250]
    assert "in a wider terminal" not in shown[250]
    note = next(line for line in shown[80].split("\n") if line.startswith("in a wider terminal, and in the report: "))
    assert "error/budget" in note
    assert shown[80].count("error/budget") == 1
    assert max(map(len, shown[80].split("\n"))) < max(map(len, shown[250].split("\n")))
