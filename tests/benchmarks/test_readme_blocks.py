"""The measured blocks: those of this repository say what its runs say; marks and blocks of a made-up one."""

import json

import pytest

from benchmarks.reporting import readme
from benchmarks.reporting.readme import BLOCKS, fill, outdated
from tests.benchmarks.documents import (
    decode,
    document,
    functions,
    hugging_face,
    module,
    norm,
    row,
    sequence,
    varlen,
    write,
)

RUN = "benchmarks/results/cpu/run.json"


def test_blocks_of_this_repository_are_up_to_date():
    assert outdated(readme.ROOT) == [], "`make report` writes them anew"


@pytest.fixture
def root(tmp_path):
    """A repository with one run and one block in each file."""
    write(tmp_path / RUN, document())
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"# Title\n\n{block('quality')}\nAfter.\n")
    (tmp_path / "docs" / "performance.md").write_text(f"{block('tiles')}Between.\n\n{block('layer-ratios')}")
    (tmp_path / "docs" / "lecture.md").write_text("# Lecture\n")
    return tmp_path


def block(name, inside="old\n", run=RUN):
    return f"<!-- measured: {name} from {run} -->\n{inside}<!-- end -->\n"


# --------------------------------------------------------------------------------------------------------------- marks


def test_fill_writes_blocks_and_nothing_else(root):
    assert fill(root) == [root / "README.md", root / "docs" / "performance.md"]
    readme_text, docs = (root / "README.md").read_text(), (root / "docs" / "performance.md").read_text()
    mark = f"<!-- measured: quality from {RUN} -->"
    assert readme_text == f"# Title\n\n{mark}\n\n{BLOCKS['quality'](document())}\n<!-- end -->\n\nAfter.\n"
    assert docs.count("<!-- end -->") == 2
    assert "<!-- end -->\nBetween.\n\n<!-- measured: layer-ratios" in docs
    assert "old" not in readme_text + docs


def test_fill_writes_an_experiment(root):
    """Its claims, and its table below them."""
    run = "benchmarks/results/lecture/dates.json"
    (root / run).parent.mkdir(parents=True)
    claims = [{"text": "more than half", "value": 0.75, "bound": 0.5, "holds": True}]
    rows = [{"letters": 12.0, "right": 0.123456}, {"letters": 24.0, "note": "long"}]
    (root / run).write_text(json.dumps({"claims": claims, "rows": rows}))
    (root / "docs" / "lecture.md").write_text(block("experiment", run=run))
    assert root / "docs" / "lecture.md" in fill(root)
    lines = (root / "docs" / "lecture.md").read_text().split("\n")
    assert "| more than half | 0.75 | 0.5 | yes |" in lines
    assert lines[lines.index("| letters | right | note |") + 2 :][:2] == ["| 12 | 0.123 |  |", "| 24 |  | long |"]
    (root / run).write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match=r"lecture\.md:1: experiment: .*dates\.json: expected what .* writes"):
        fill(root)


def test_fill_twice_changes_nothing(root):
    fill(root)
    before = (root / "README.md").read_text()
    assert fill(root) == []
    assert (root / "README.md").read_text() == before
    assert outdated(root) == []


def test_tampered_block_is_named(root):
    fill(root)
    path = root / "docs" / "performance.md"
    path.write_text(path.read_text().replace("1.10 [", "0.90 ["))
    assert outdated(root) == ["docs/performance.md: layer-ratios"]
    assert "0.90 [" in path.read_text()  # a look changes nothing


def test_block_of_another_run_is_out_of_date(root):
    fill(root)
    write(root / RUN, document(tiles=[{"mask": "causal", "tiles": 128, "whole": 57, "in_part": 15}]))
    assert outdated(root) == ["docs/performance.md: tiles"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (block("module-hedline"), "README.md:3: no block is called module-hedline: there are run-facts, module-ratios"),
        (block("tiles", run="no/run.json"), "README.md:3: tiles: .*no/run.json: expected a run.*No such file"),
        ("<!-- measured: tiles from run.json -->\n", "README.md:3: the block tiles has no end mark"),
        (f"<!-- measured: tiles from {RUN} -->\n{block('tiles')}", "README.md:3: the block tiles has no end mark"),
        ("text\n<!-- end -->\n", "README.md:4: an end mark without a block"),
        ("<!-- measured: tiles -->\n<!-- end -->\n", "README.md:3: expected <!-- measured: BLOCK from RUN.json -->"),
        ("<!-- measured tiles from run.json -->\n<!-- end -->\n", "README.md:3: expected <!-- measured: BLOCK"),
    ],
    ids=["unknown-block", "no-run", "no-end", "no-end-before-the-next", "end-alone", "no-run-named", "no-colon"],
)
def test_wrong_mark_is_a_clear_error(root, text, message):
    (root / "README.md").write_text(f"# Title\n\n{text}")
    for look in (fill, outdated):
        with pytest.raises(ValueError, match=message):
            look(root)
    assert (root / "README.md").read_text() == f"# Title\n\n{text}"


def test_missing_file_is_a_clear_error(root):
    (root / "README.md").unlink()
    with pytest.raises(ValueError, match=r"README.md: expected a file with measured blocks"):
        outdated(root)


def test_run_of_an_older_schema_is_a_clear_error(root):
    write(root / RUN, {"schema": 2, "results": []})
    with pytest.raises(ValueError, match=r"README.md:3: quality: .*it has schema 2: run it again"):
        outdated(root)


# -------------------------------------------------------------------------------------------------------------- blocks


def cells(text):
    """The lines of the one table in a block, by their first cells' text."""
    lines = [line.strip("| ").split(" | ") for line in text.split("\n") if line.startswith("|")]
    header, _, *rest = lines
    assert {len(line) for line in rest} == {len(header)}, text
    return header, rest


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "run-facts"])
def test_block_without_any_data_is_an_error(name):
    with pytest.raises(ValueError, match="the run has no"):
        BLOCKS[name](document([]))


def test_run_facts_are_one_line_without_a_date():
    facts = BLOCKS["run-facts"](document(list(module())))
    assert facts == (
        "a processor of 2 cores, 1 thread, torch 2.13.0, commit 0123456789, 0.3 s a case; 10 rows timed.\n"
    )
    on_gpu = document([])
    on_gpu["environment"] |= {"gpu": "a GPU", "triton": "3.7.1", "modified": True}
    assert BLOCKS["run-facts"](on_gpu).startswith("a GPU, torch 2.13.0, triton 3.7.1, commit 0123456789 and changes")


def test_module_ratios_have_a_dash_for_what_is_missing():
    masked = {**next(module()), "case": "module-b8-h2-l64-d4-eval-causal-float32", "mask": "causal"}
    header, lines = cells(BLOCKS["module-ratios"](document([*module(), masked])))
    assert header == ["shape", "direction", "plain", "causal", "plain, weights"]
    assert lines == [
        ["B8 H2 L64 D4", "evaluation", "0.50 [0.49 0.51]", "0.50 [0.49 0.51]", "1.50 [1.47 1.53]"],
        ["B8 H2 L64 D4", "training", "0.50 [0.49 0.51]", "-", "1.50 [1.47 1.53]"],
    ]


def test_module_ratios_are_of_the_dtype_of_most():
    other = {**next(module()), "dtype": "bfloat16", "batch": 99}
    assert "B99" not in BLOCKS["module-ratios"](document([*module(), other]))


def test_module_headline_takes_plain_cases_whatever_they_say():
    masked = {**next(module()), "case": "module-causal", "mask": "causal", "ratio": None}
    _, lines = cells(BLOCKS["module-headline"](document([masked, *module()])))
    assert lines == [
        ["B8 H2 L64 D4, no weights", "0.50 [0.49 0.51]", "0.50 [0.49 0.51]"],
        ["B8 H2 L64 D4, averaged weights", "1.50 [1.47 1.53]", "1.50 [1.47 1.53]"],
    ]


def test_module_memory_is_of_the_longest_with_weights():
    shorter = [{**r, "case": f"{r['case']}-short", "seqlen": 8, "peak_mib": 1.0} for r in module()]
    header, lines = cells(BLOCKS["module-memory"](document([*shorter, *module()])))
    assert header == ["averaged weights", "memory", "fastattn, MiB", "nn.MultiheadAttention, MiB", "ratio"]
    assert lines == [
        ["B8 H2 L64 D4, evaluation", "peak of a step", "10", "40", "0.25"],
        ["B8 H2 L64 D4, training", "peak of a step", "10", "40", "0.25"],
        ["B8 H2 L64 D4, training", "kept for the backward", "5", "20", "0.25"],
    ]


def test_mask_ratios_are_of_long_sequences_to_the_fastest_other():
    header, lines = cells(BLOCKS["mask-ratios"](document()))
    assert header == ["mask", "shape", "evaluation"]
    assert lines == [["window", "B1 H2 L1024 D4", "0.40 [0.39 0.41] of sdpa"]]
    case = "attention-b1-h2-l64-d4-eval-float32"
    short = row(
        case, "fastattn", 1.0, best=("sdpa", 0.5), seqlen=64, batch=1, heads=2, head_dim=4, mask="none", weights=False
    )
    with pytest.raises(ValueError, match="no rows"):
        BLOCKS["mask-ratios"](document([short]))


def test_sequence_blocks_have_a_column_for_each_length():
    text = BLOCKS["sequence-times"](document())
    assert text.startswith("64 tokens of width 8, causal, float32; milliseconds of a step, evaluation / training:\n\n")
    header, lines = cells(text)
    assert header[1:] == ["L = 16", "L = 64"]
    assert ["fastattn", "2 / 6", "4 / 12"] in lines
    assert ["causal-conv (reaches 3 tokens)", "0.5 / 1.5", "0.5 / 1.5"] in lines
    _, lines = cells(BLOCKS["sequence-memory"](document()))
    assert ["nn.MultiheadAttention", "32 / 96", "128 / 384"] in lines


def test_sequence_blocks_have_a_dash_for_what_is_missing():
    rows = [r for r in sequence() if r["variant"] != "nn.LSTM" or r["case"] == "sequence-b1-l64-train-float32"]
    _, lines = cells(BLOCKS["sequence-times"](document(rows)))
    assert ["nn.LSTM", "-", "- / 18"] in lines


def test_norm_ratios_have_the_share_of_the_floor():
    header, lines = cells(BLOCKS["norm-ratios"](document([*norm()][::-1])))
    assert header[0] == "N"
    assert sorted(header[1:]) == ["layer, backward alone", "layer, forward"]
    assert lines == [[size, *["0.50 [0.49 0.51] (0.75)"] * 2] for size in ("64", "4096")]


def test_other_blocks():
    packed, cache = document(list(varlen())), document(list(decode()))
    beside = "1.00 [0.98 1.02] of sdpa-each; 0.33 [0.32 0.34] of sdpa-padded"
    assert cells(BLOCKS["varlen-ratios"](packed))[1] == [["8 sequences of 1 to 64, H2 D4", "plain", beside]]
    header, lines = cells(BLOCKS["decode-ratios"](cache))
    assert header[2:] == ["contiguous, of sdpa", "in pages, of sdpa", "sdpa, pages copied in order, of sdpa"]
    ratios = ["0.70 [0.69 0.71]", "0.80 [0.78 0.82]", "3.00 [2.94 3.06]"]
    assert lines == [["B2 H4 Hk2 S64 D4", "16", *ratios]]
    assert cells(BLOCKS["layer-ratios"](document()))[1] == [["B1 H2 L64 D4", "plain", "1.10 [1.08 1.12]"]]
    header, lines = cells(BLOCKS["quality"](document()))
    assert header == ["task", "a guess", "attention", "gru", "conv x2"]
    assert lines[0] == ["recall 8 pairs", "0.03", "0.99 (25)", "0.25 (25)", "0.10 (25)"]
    assert cells(BLOCKS["tiles"](document()))[1] == [["causal", "128", "56", "16", "0.56"]]
    assert "- recall 8 pairs: attention learns it best" in BLOCKS["findings"](document())


def test_slower_has_the_cases_in_which_no_form_of_ours_is_level():
    def case(name, ours, compiled, peak):
        return [
            row(name, "fastattn", ours, ratio=ours, best=("compile", ours), peak_mib=peak),
            row(name, "fastattn-compile", compiled, ratio=compiled, best=("compile", compiled), peak_mib=peak),
            row(name, "eager", 1.0, best=("compile", 1.0), peak_mib=20.0),
            row(name, "compile", 1.0, ratio=1.0, best=("eager", 1.0), peak_mib=1.0),
        ]

    level = [*case("norm-a", 1.2, 1.06, 20.9), *case("norm-b", 0.5, 2.0, 21.0)]
    assert BLOCKS["slower"](document(level)) == "None of 2 cases.\n"
    above = [*level, *case("norm-c", 1.2, 1.1, 20.0), *case("norm-d", 1.0, 1.0, 21.1)]
    text = BLOCKS["slower"](document(above))
    assert text.startswith("2 of 4 cases:\n\n")
    assert cells(text)[1] == [
        ["norm-c", "time", "1.10 [1.08 1.12] of compile", "1.1"],
        ["norm-d", "peak of memory", "1.06 of eager", "21.1"],
    ]


def test_errors_are_the_largest_share_of_the_budget():
    worse = {**next(module()), "case": "module-worse", "error": 9e-7, "backward": False}
    header, lines = cells(BLOCKS["errors"](document([*module(), worse])))
    assert header == ["family", "dtype", "evaluation", "training"]
    assert lines == [["module", "float32", "0.90 (3)", "0.10 (2)"]]


def test_hugging_face_ratios_are_beside_what_computes_the_model():
    header, lines = cells(BLOCKS["hugging-face-ratios"](document([*hugging_face()])))
    assert header == ["model", "batch", "beside", "evaluation", "training", "peak MiB of training, ours; beside"]
    ratios = ["0.90 [0.88 0.92]"] * 2
    assert lines == [
        ["llama", "B2 L64, padding", "sdpa", *ratios, "20; 25"],
        ["gemma2", "B2 L64, padding", "eager", *ratios, "20; 30"],
    ]


def test_function_times_have_a_column_for_each_variant():
    """Of the longest; a quick case of an example is another one."""
    shorter = [{**r, "case": f"{r['case']}-short", "seqlen": 8, "backward": False} for r in functions()]
    text = BLOCKS["function-times"](document([*functions(), *shorter]))
    assert text.startswith("B2 H2 L64 D4, float32; milliseconds of a step, evaluation / training:\n\n")
    header, lines = cells(text)
    assert header == ["example", "fastattn", "sdpa", "flex"]
    assert lines == [["`t5_bias`", "1 / 4", "2 / 8", "3 / -"], ["`softcap`", "1 / 4", "-", "3 / -"]]


def test_every_block_ends_with_one_newline():
    """As :func:`fill` sets an empty line before the end mark."""
    more = (*varlen(), *decode(), *hugging_face(), *functions())
    whole = document([*document()["results"], *more], **{n: document()[n] for n in ("tiles", "quality")})
    for name, made in BLOCKS.items():
        assert made(whole).endswith("\n"), name
        assert not made(whole).endswith("\n\n"), name


def test_committed_runs_are_found(root):
    write(root / "benchmarks" / "results" / "gpu" / "run.json", document())
    write(root / "benchmarks" / "results" / "gpu" / "other.json", document())
    assert readme.committed_runs(root) == [root / RUN, root / "benchmarks" / "results" / "gpu" / "run.json"]
