"""Reports of a made-up run: Markdown and CSV, what they say of runs that ended early, and the command line."""

import csv
import sys

import pytest

from benchmarks.reporting import readme
from benchmarks.reporting.report import main, report
from benchmarks.reporting.tables import all_tables
from benchmarks.reporting.text import as_markdown
from tests.benchmarks.documents import document, module, refused, row, write


@pytest.fixture
def without_matplotlib(monkeypatch):
    """As where the extra ``bench`` is not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("pictures", "curves", "looks"):
        monkeypatch.delitem(sys.modules, f"benchmarks.reporting.{name}", raising=False)
    monkeypatch.delattr(sys.modules["benchmarks.reporting"], "pictures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def text(tmp_path, without_matplotlib):
    """The report of a document."""

    def text(content):
        return report(write(tmp_path / "run.json", content), tmp_path / "out")[0].read_text()

    return text


def test_report_has_every_table_and_sentence(text):
    content = document(left_out=["module-b9"])
    written = text(content)
    for table in all_tables(content):
        assert f"## {table.title[0].upper()}{table.title[1:]}\n" in written
        assert as_markdown(table) in written
    assert "| torch | 2.13.0 |" in written
    assert "- Evaluation, L = 16: causal-conv" in written
    assert written.index("## Environment") < written.index("## Findings") < written.index("## Sequence")
    assert written.endswith("## Left out\n\n- module-b9\n")


def test_report_shows_each_picture_in_its_section(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    paths = report(write(tmp_path / "run.json", document()), tmp_path / "out")
    written = paths[0].read_text()
    assert [path.name for path in paths[:2]] == ["report.md", "results.csv"]
    assert {path.name for path in paths} == {path.name for path in (tmp_path / "out").iterdir()}
    sections = {
        section.split("\n")[0].split(":")[0].split(",")[0].lower(): section for section in written.split("\n## ")
    }
    svgs = [path.name for path in paths if path.suffix == ".svg"]
    assert len(svgs) == 9
    for name in svgs:
        family = name.split("-")[0]
        assert f"]({name})" in sections[{"quality": "accuracy on sequences not trained on"}.get(family, family)]
    assert "No pictures" not in written


def test_report_is_the_same_twice(tmp_path):
    run = write(tmp_path / "run.json", document())
    first, second = report(run, tmp_path / "first"), report(run, tmp_path / "second")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_report_without_matplotlib_says_so_and_writes_the_rest(tmp_path, without_matplotlib):
    paths = report(write(tmp_path / "run.json", document()), tmp_path / "out")
    assert [path.name for path in paths] == ["report.md", "results.csv"]
    written = paths[0].read_text()
    assert "No pictures: matplotlib is not installed." in written
    assert "![" not in written


@pytest.mark.parametrize(
    ("state", "said"), [("complete", None), ("interrupted", "was interrupted"), ("running", "is not finished")]
)
def test_report_says_what_became_of_the_run(text, state, said):
    written = text(document(state=state))
    assert [phrase for phrase in ("was interrupted", "is not finished") if phrase in written] == (
        [said] if said else []
    )


def test_report_of_an_empty_run(text):
    written = text(document([], state="interrupted", left_out=["ceilings"]))
    assert "was interrupted" in written
    assert "How to read" not in written
    assert "## Left out\n\n- ceilings" in written


def test_csv_reads_back(tmp_path, without_matplotlib):
    """Every row, refused ones too, and every figure."""
    content = document([*document()["results"], row("layer-b2", "fastattn", status="wrong", error=float("nan"))])
    (_, table) = report(write(tmp_path / "run.json", content), tmp_path / "out")
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(content["results"])
    spreads = ("wall_ms", "process_ms", "ratio", "process_ratio", "best_ratio", "warm_ms", "graph_ms", "host_ms")
    for got, expected in zip(rows, content["results"]):
        assert None not in got  # no more cells than columns
        for name, value in expected.items():
            if name in spreads:
                for part in ("median", "p20", "p80", "low", "high"):
                    assert got[f"{name}_{part}"] == ("" if value is None else repr(value[part]))
            else:
                assert got[name] == ("" if value is None else str(value))
    assert {r["size"] for r in rows if r["family"] != "norm"} == {""}
    assert "needs a | pipe" in {r["reason"] for r in rows}


def test_command_line_writes_beside_the_run(tmp_path, capsys, without_matplotlib):
    """Into its folder where that is the run's own, else into one of its name."""
    own, other = write(tmp_path / "bench" / "run.json", document()), write(tmp_path / "quick.json", document())
    assert main([str(own), str(other)]) == 0
    written = capsys.readouterr().out.split()
    assert written == [
        str(folder / name) for folder in (own.parent, tmp_path / "quick") for name in ("report.md", "results.csv")
    ]
    assert all((tmp_path / path).exists() for path in written)


def test_command_line_out(tmp_path, capsys, without_matplotlib):
    runs = [str(write(tmp_path / name / "run.json", document())) for name in ("a", "b")]
    assert main([runs[0], "--out", str(tmp_path / "one")]) == 0
    assert (tmp_path / "one" / "report.md").exists()
    assert main([*runs, "--out", str(tmp_path / "two")]) == 0
    assert all((tmp_path / "two" / name / "report.md").exists() for name in ("a", "b"))
    clash = write(tmp_path / "c" / "a" / "run.json", document())
    assert main([runs[0], str(clash), "--out", str(tmp_path / "three")]) == 2
    assert "several runs are called alike: a, a" in capsys.readouterr().err


def test_command_line_wants_something_to_do(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "expected RUN.json, --committed, --readme or --check" in capsys.readouterr().err


def test_unreadable_file_exits_2(tmp_path, capsys):
    path = write(tmp_path / "old.json", {"schema": 2, "results": []})
    assert main([str(path), "--out", str(tmp_path / "out")]) == 2
    assert f"{path}: expected a run of schema 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_committed_runs_are_reported_and_fill_the_blocks(tmp_path, monkeypatch, capsys, without_matplotlib):
    run = write(tmp_path / "benchmarks" / "results" / "cpu" / "run.json", document(list(module())))
    block = "<!-- measured: module-headline from benchmarks/results/cpu/run.json -->\n<!-- end -->\n"
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"# A title\n\n{block}\nThe rest.\n")
    (tmp_path / "docs" / "performance.md").write_text("nothing\n")
    (tmp_path / "docs" / "lecture.md").write_text("nothing\n")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    assert main(["--check"]) == 1
    assert "README.md: module-headline: out of date" in capsys.readouterr().err
    assert not (run.parent / "report.md").exists()
    assert main(["--committed"]) == 0
    names = [run.parent / "report.md", run.parent / "results.csv", tmp_path / "README.md"]
    assert capsys.readouterr().out.split() == [str(name) for name in names]
    assert "| B8 H2 L64 D4, no weights | 0.50 [0.49 0.51] |" in (tmp_path / "README.md").read_text()
    assert main(["--check"]) == 0


def test_report_of_refusals_alone(text):
    """A family that nobody took is named all the same."""
    written = text(document([refused("norm-m8", "quack", "needs a | pipe")]))
    assert "## Norm\n\n- 1 row was refused: results.csv and --list say why\n" in written
