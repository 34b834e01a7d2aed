"""Reports: tables and pictures of a tiny synthetic run. How the pictures look is a matter for eyes."""

import csv
import json

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from benchmarks.pictures import main, report

SEQUENCE = {"family": "sequence", "heads": 2, "head_dim": 4, "mask": "causal"}
NORM = {"family": "norm", "kind": "layer", "wide_residual": False, "dropout_p": 0.0}


def row(case, variant, milliseconds, *, ratio=None, **more):
    def spread(value):
        return None if value is None else {"median": value, "p20": 0.9 * value, "p80": 1.2 * value}

    return {
        "case": case,
        "dtype": "float32",
        "backward": False,
        "device": "cpu",
        "variant": variant,
        "status": "ok",
        "reason": "",
        "error": 1e-7,
        "error_budget": 1e-6,
        "wall_ms": spread(milliseconds),
        "process_ms": spread(milliseconds),
        "ratio": spread(ratio),
        "process_ratio": spread(ratio),
        "rounds": 9,
        "tflops": None,
        "tb_per_s": None,
        "of_floor": None,
        "peak_mib": None,
        **more,
    }


def sequence(seqlen):
    name, size = f"sequence-b1-l{seqlen}-eval", {**SEQUENCE, "batch": 1, "seqlen": seqlen}
    yield row(name, "fastattn", 2.0 * seqlen, ratio=0.8, **size)
    yield row(name, "nn.MultiheadAttention", 2.5 * seqlen, **size)
    yield row(name, "causal-conv", 1.0 * seqlen, ratio=0.4, **size)
    yield row(name, "of-its-own-kind", 3.0 * seqlen, ratio=1.2, **size)


def norm(size):
    for backward in (False, True):
        name, more = f"norm-m8-n{size}-{backward}", {**NORM, "size": size, "rows": 8, "backward": backward}
        rate = {"tb_per_s": 1.5, "of_floor": 0.75, "moved_bytes": 10}
        yield row(name, "fastattn", 1.0, ratio=1.5, **rate, **more)
        yield row(name, "eager", 1.6, **rate, **more)
        yield row(name, "quack", None, status="refused", reason="needs a | pipe", error=None, **more)


def memory():
    for variant, peak in (("fastattn", 10.0), ("nn.MultiheadAttention", 40.0)):
        yield row("module-b1-l64", variant, None, family="module", error=None, error_budget=None, peak_mib=peak)


RESULTS = [*sequence(8), *sequence(16), *norm(64), *norm(128), *memory()]


def write(path, results):
    document = {
        "schema": 2,
        "environment": {"torch": "2.13.0", "threads": 1},
        "results": results,
        "ceilings": {"copy_tb_per_s": 2.0},
        "tiles": [{"mask": "causal", "tiles": 128, "whole": 56, "in_part": 16}],
        "left_out": ["module-b9"],
    }
    path.write_text(json.dumps(document))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write(tmp_path_factory.mktemp("run") / "run.json", RESULTS)


@pytest.fixture(scope="module")
def written(run):
    return report(run, run.with_name("first"))


def test_report_draws_what_the_run_holds(written):
    stems = ["sequence-ratio", "sequence-length", "norm-ratio", "norm-size", "module-memory"]
    pictures = [f"{stem}.{suffix}" for stem in stems for suffix in ("svg", "png")]
    assert [path.name for path in written] == ["report.md", "results.csv", *pictures]
    for path in written[2:]:
        start = path.read_bytes()[:8]
        assert start.startswith(b"<?xml" if path.suffix == ".svg" else b"\x89PNG"), path
    assert {path.name for path in written[0].parent.iterdir()} == {path.name for path in written}


def test_report_is_the_same_twice(run, written):
    again = report(run, run.with_name("second"))
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in again]


def test_report_pictures_fit_a_page(written):
    """Of 800 dots in width; the width is in bytes 16 to 20 of a PNG."""
    for path in written:
        if path.suffix == ".png":
            assert int.from_bytes(path.read_bytes()[16:20]) == 800, path


def test_report_has_every_table(written):
    text = written[0].read_text()
    assert "| torch | 2.13.0 |" in text
    assert "| copy_tb_per_s | 2 |" in text
    assert "## sequence, ratio to nn.MultiheadAttention" in text
    assert "| sequence-b1-l8-eval | causal-conv | **8** | 7.2 | 9.6 |" in text
    assert "| sequence-b1-l8-eval | fastattn | 16 |" in text
    assert "0.80 [0.72 0.96]" in text
    assert "| module-b1-l64 | nn.MultiheadAttention | 40 | 0.25 |" in text
    assert "| causal | 128 | 56 | 16 | 0.56 |" in text
    assert "- module-b9" in text
    assert "4 rows refused" in text
    for path in written:
        if path.suffix == ".svg":
            assert f"]({path.name})" in text


def test_report_tables_are_rectangular(written):
    """Each block of lines that begin with a pipe has one number of cells."""
    tables = [block for block in written[0].read_text().split("\n\n") if block.startswith("|")]
    assert tables
    for table in tables:
        cells = {line.replace("\\|", "").count("|") for line in table.strip().split("\n") if line.startswith("|")}
        assert len(cells) == 1, table


def test_report_csv_reads_back(written):
    with written[1].open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(RESULTS)
    for got, expected in zip(rows, RESULTS):
        assert None not in got
        assert (got["case"], got["variant"], got["status"]) == tuple(expected[k] for k in ("case", "variant", "status"))
        assert got["reason"] == expected["reason"]
        for name in ("wall_ms", "ratio"):
            for part in ("median", "p20", "p80"):
                value = expected[name]
                assert got[f"{name}_{part}"] == ("" if value is None else repr(value[part]))
    assert {row["size"] for row in rows if row["family"] != "norm"} == {""}


def test_report_without_data_for_a_picture_draws_none(tmp_path):
    """One length and one size: nothing to draw a line through, and no peer to compare with."""
    ours = [r for r in [*sequence(8), *norm(64)] if r["variant"] == "fastattn"]
    paths = report(write(tmp_path / "run.json", [{**r, "ratio": None} for r in ours]), tmp_path / "out")
    assert [path.name for path in paths] == ["report.md", "results.csv"]
    assert "![" not in paths[0].read_text()


def test_report_without_measured_ratios_takes_the_fastest_other(tmp_path):
    """A GPU's matrix leaves out the peer of some families."""
    results = [{**r, "ratio": None} for r in sequence(8)]
    paths = report(write(tmp_path / "run.json", results), tmp_path / "out")
    assert [path.name for path in paths[2:]] == ["sequence-ratio.svg", "sequence-ratio.png"]
    assert "## sequence\n" in paths[0].read_text()


def test_report_of_an_empty_run(tmp_path):
    assert len(report(write(tmp_path / "run.json", []), tmp_path / "out")) == 2


def test_report_command_line(run, capsys):
    assert main([str(run)]) == 0
    out = run.with_suffix("")
    assert capsys.readouterr().out.split("\n")[0] == str(out / "report.md")
    assert (out / "sequence-length.svg").exists()


def test_report_unreadable_file_exits_2(tmp_path, capsys):
    path = tmp_path / "old.json"
    path.write_text('{"schema": 1}')
    assert main([str(path), "--out", str(tmp_path / "out")]) == 2
    assert f"{path}: expected a run of schema 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
