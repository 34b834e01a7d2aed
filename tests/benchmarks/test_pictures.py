"""Pictures of a made-up run: which are drawn, and what is in them. How they look is a matter for eyes."""

import itertools
import re

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from benchmarks.reporting import curves, lengths, looks, pictures
from benchmarks.reporting.document import by_family
from tests.benchmarks.documents import attention, document, module, norm, row, sequence, spread

ALL = {
    "sequence": ["sequence-length", "sequence-ratio"],
    "attention": ["attention-ratio"],
    "norm": ["norm-ratio", "norm-size"],
    "layer": ["layer-ratio"],
    "module": ["module-ratio", "module-memory"],
    "quality": ["quality-learning"],
}


@pytest.fixture(autouse=True)
def _style():
    with matplotlib.rc_context(looks.STYLE):
        yield


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return pictures.draw(document(), tmp_path_factory.mktemp("drawn"))


def axes_of(figure):
    """Of a picture that is expected to be drawn."""
    assert figure is not None
    return figure.axes


def lines_of(axes):
    """By label, the points of each line that has one."""
    return {line.get_label(): list(zip(*line.get_data())) for line in axes.get_lines() if line.get_label()[0] != "_"}


def test_every_picture_that_the_run_holds_is_drawn(drawn):
    found = {}
    for picture in drawn:
        svg, png = picture.files
        assert svg.stem == png.stem
        assert svg.read_bytes().startswith(b"<?xml")
        assert png.read_bytes().startswith(b"\x89PNG")
        assert picture.caption.startswith(f"{picture.section}: ")
        found.setdefault(picture.section, []).append(svg.stem)
    assert found == ALL


def test_pictures_are_the_same_twice(drawn, tmp_path):
    again = pictures.draw(document(), tmp_path)
    for first, second in zip(drawn, again):
        assert [path.read_bytes() for path in first.files] == [path.read_bytes() for path in second.files]


def test_pictures_fit_a_page(drawn):
    """Of 800 dots in width, which is in bytes 16 to 20 of a PNG, and nothing beyond the edge."""
    for picture in drawn:
        assert int.from_bytes(picture.files[1].read_bytes()[16:20]) == 800, picture


def test_nothing_runs_over_the_edge(monkeypatch, tmp_path):
    """Titles and labels are as long as names are: measured where the layout has put them."""
    figures = {}
    save = pictures._save

    def saved(figure, stem):
        figures[stem.name] = figure
        return save(figure, stem)

    monkeypatch.setattr(pictures, "_save", saved)
    pictures.draw(document(), tmp_path)
    assert len(figures) == sum(map(len, ALL.values()))
    for name, figure in figures.items():
        box = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())
        width, height = figure.get_size_inches()
        assert min(box.x0, box.y0) > -0.01 and box.x1 < width + 0.01 and box.y1 < height + 0.01, (name, box)


def test_pictures_without_data_are_not_drawn(tmp_path):
    """One length and one size: nothing to draw a line through; and no one to compare with."""
    ours = [r for r in [*sequence(), *norm()] if r["variant"] == "fastattn" and 64 in (r.get("seqlen"), r.get("size"))]
    assert pictures.draw(document([{**r, "ratio": None, "best_ratio": None} for r in ours]), tmp_path) == []
    assert pictures.draw(document([]), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_ratio_is_coloured_by_its_interval():
    """Its samples lie on either side of 1 in each of the three."""
    intervals = {"faster": (0.95, 0.9, 0.99), "level": (1.0, 0.99, 1.01), "slower": (1.05, 1.01, 1.1)}
    rows = [row(f"norm-{name}", "fastattn", 1.0, ratio=1.0) | {"ratio": spread(*r)} for name, r in intervals.items()]
    rows += [row(f"norm-{name}", "eager", 1.0) for name in intervals]
    (axes,) = axes_of(pictures.ratios(rows))
    markers = [line for line in axes.get_lines() if len(line.get_data()[0]) == 1]
    assert [line.get_color() for line in markers] == [looks.BLUE, looks.GREY, looks.RED]
    bars = [
        line.get_data()[0] for line in axes.get_lines() if len(line.get_data()[0]) == 2 and line.get_linewidth() == 5
    ]
    assert [tuple(bar) for bar in bars] == [r[1:] for r in intervals.values()]
    low, high = axes.get_xlim()
    assert low < 0.9 * 0.95 and high > 1.2 * 1.05  # the percentiles, which reach farther


def test_ratio_has_a_ring_for_the_fastest_other_where_it_is_not_the_peer():
    (axes,) = axes_of(pictures.ratios(list(module())))
    rings = [
        tuple(line.get_xydata()[0])
        for line in axes.get_lines()
        if line.get_fillstyle() == "none" and len(line.get_xdata())
    ]
    assert rings == [(0.8, 0), (1.0, 1)]


def test_ratio_of_a_case_without_the_peer_is_to_the_fastest_other():
    alone = row("attention-b1-h2-l1024-d4-eval-weights-float32", "fastattn", 1.0, best=("naive", 0.5))
    (axes,) = axes_of(pictures.ratios([*attention(), alone]))
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0].endswith("window")
    assert labels[1].endswith("weights (beside naive)")


def test_ratio_marks_contended_cases():
    rows = list(attention())
    rows[0]["contended"] = True
    (axes,) = axes_of(pictures.ratios(rows))
    assert axes.get_yticklabels()[0].get_text().endswith("*")


def test_lengths_show_time_and_memory_of_a_token():
    """64 tokens a step; dotted is what theory says of the growth, through the longest."""
    found = axes_of(lengths.lengths(document()))
    assert [axes.get_ylabel() for axes in found] == ["time per token, µs", "", "peak memory per token, KiB", ""]
    time, _, memory, trained = found
    assert lines_of(time)["fastattn"] == [(16, 1e3 * 2 / 64), (64, 1e3 * 4 / 64)]
    assert lines_of(memory)["nn.LSTM"] == [(16, 1024 * 2 / 64), (64, 1024 * 2 / 64)]
    dotted = [list(zip(*line.get_data())) for line in memory.get_lines() if line.get_linestyle() == ":"]
    assert [(16, 32.0), (64, 32.0)] in dotted  # of all that hold no pairs
    assert [(16, 512.0), (64, 2048.0)] in dotted  # of nn.MultiheadAttention, which does in evaluation
    dotted = [list(zip(*line.get_data())) for line in trained.get_lines() if line.get_linestyle() == ":"]
    assert [(16, 3 * 2048.0), (64, 3 * 2048.0)] in dotted  # and not in training


def test_lengths_without_memory_show_time_alone():
    rows = [{**r, "peak_mib": None} for r in sequence()]
    assert len(axes_of(lengths.lengths(document(rows)))) == 2
    assert len(axes_of(lengths.lengths(document(list(sequence()))))) == 4


def test_ways_in_front_are_ours_and_the_fastest_of_each_kind_that_reach_all():
    """At the longest sequence that a kind took; a convolution that reaches three tokens solves another problem."""
    rows = [r for r in sequence() if not r["backward"]]
    loop = [{**r, "variant": "naive-rnn", "wall_ms": spread(0.1)} for r in rows if r["variant"] == "nn.LSTM"][:1]
    front = lengths.in_front([*rows, *loop], {"causal-conv": 3})
    assert front == {"fastattn": "fastattn", "nn.MultiheadAttention": "attention", "nn.LSTM": "recurrence"}
    assert lengths.in_front(rows, {})["causal-conv"] == "convolution"


def test_lengths_name_every_line_once_and_apart():
    figure = lengths.lengths(document())
    assert figure is not None
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    for axes in figure.axes:
        names = [text.get_text() for text in axes.texts]
        assert sorted(names) == ["causal-conv, reaches 3", "fastattn", "nn.LSTM", "nn.MultiheadAttention"]
        # Of the words alone: an annotation's own box holds the line that leads to it.
        boxes = sorted((Text.get_window_extent(text, renderer) for text in axes.texts), key=lambda box: box.y0)
        assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))


@pytest.mark.parametrize(
    ("wanted", "placed"),
    [
        ([0.2, 0.5, 0.9], [0.2, 0.5, 0.9]),
        ([0.5, 0.5, 0.5], [0.4, 0.5, 0.6]),  # around where all want to be
        ([0.1, 0.5, 0.52], [0.1, 0.46, 0.56]),
        ([0.0, 0.01, 1.0], [0.0, 0.1, 1.0]),  # not below the panel
        ([0.99, 0.99, 1.0], [0.8, 0.9, 1.0]),
        ([], []),
    ],
)
def test_labels_are_placed_apart_and_near_to_where_they_belong(wanted, placed):
    assert lengths.apart(wanted, 0.1) == pytest.approx(placed)


def test_legend_is_read_line_by_line():
    """Matplotlib fills its columns one after another: two of them, and three entries, would read a, c, b."""
    figure = Figure(layout="constrained")
    looks.legend_of(figure, {name: Line2D([], []) for name in "abc"}, columns=2)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "c", "b"]


def test_sizes_that_are_no_power_of_two_are_beside_the_line():
    rows = by_family(document())["norm"]
    strange = [{**row, "size": 100} for row in rows if row["size"] == 64]
    axes = axes_of(curves.sizes([*rows, *strange]))[0]
    assert lines_of(axes)["fastattn"] == [(64, 0.75), (4096, 0.75)]
    assert lines_of(axes)["no power of two"] == [(100, 0.75)]


def test_sizes_leave_other_dtypes_and_features_out():
    rows = by_family(document())["norm"]
    strange = [{**rows[0], "size": 999, "dtype": "bfloat16"}, {**rows[0], "size": 998, "dropout_p": 0.1}]
    strange += [{**rows[0], "size": 997, "wide_residual": True}, {**rows[0], "size": 996, "alone": True}]
    strange.append({**rows[0], "size": 995, "rows": 4})  # so few that it says nothing of the copy rate
    assert lines_of(axes_of(curves.sizes([*rows, *strange]))[0])["fastattn"] == [(64, 0.75), (4096, 0.75)]


def test_memory_draws_the_largest_cases_and_what_is_kept():
    def case(peak):
        for variant, factor in (("fastattn", 1), ("nn.MultiheadAttention", 4)):
            yield row(f"module-b{peak}", variant, 1.0, peak_mib=factor * float(peak), saved_mib=0.5 * peak)

    (axes,) = axes_of(pictures.memory([r for peak in range(1, 12) for r in case(peak)]))
    widths = [patch.get_width() for patch in axes.patches]
    assert sorted(widths)[-1] == 44.0
    assert len(widths) == 2 * 2 * 8
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"b{peak}" for peak in range(4, 12)]


def test_learning_has_a_panel_for_each_task():
    found = axes_of(curves.learning(document()))
    assert [axes.get_title(loc="left") for axes in found] == ["recall 8 pairs", "parity 32 bits"]
    recall, parity = (lines_of(axes) for axes in found)
    assert recall["attention"] == [(0, 0.1), (25, 0.99)]
    assert {y for _, y in recall["chance"]} == {0.03}
    assert {y for _, y in parity["chance"]} == {0.5}
    assert curves.learning(document([])) is None


def test_nobody_else_has_our_colour():
    found = looks.variants_looks(["eager", "fastattn", *(f"peer {i}" for i in range(12))])
    assert [name for name, look in found.items() if look["color"] == looks.BLUE] == ["fastattn"]
    assert len({look["color"] for look in found.values()}) >= 9


def test_ways_have_colours_of_their_own():
    found = looks.ways_looks(["nn.LSTM", "causal-conv", "qkv+sdpa", "fastattn", "of-its-own-kind", "nn.GRU"])
    assert {name: look["color"] for name, look in found.items()} == {
        "fastattn": looks.BLUE,
        "qkv+sdpa": looks.SKY,
        "nn.LSTM": looks.RED,
        "nn.GRU": looks.RED,
        "causal-conv": looks.GREEN,
        "of-its-own-kind": looks.GREY,
    }
    assert found["nn.LSTM"]["marker"] != found["nn.GRU"]["marker"]


@pytest.mark.parametrize(("low", "high"), [(0.97, 1.02), (0.3, 1.2), (0.01, 3.0)])
def test_ratio_axis_has_numbers_to_read_off(low, high):
    axes = Figure().subplots()
    looks.ratio_axis(axes, low, high)
    ticks = axes.get_xticks()
    assert len(ticks) >= 4
    assert 1.0 in ticks
    assert axes.get_xlim()[0] < low and axes.get_xlim()[1] > high


def test_doubling_axis_keeps_its_numbers_apart():
    axes = Figure().subplots()
    looks.doubling_axis(axes, [2**power for power in range(6, 19)])
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert len(labels) == 7
    assert labels[-1] == "256K"
    assert all(re.fullmatch(r"\d+K?", label) for label in labels)
    looks.doubling_axis(axes, [64, 769, 1024, 4096, 4097])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["64", "1K", "4K"]
