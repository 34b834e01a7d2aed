"""Pictures of attention weights: which panels there are, what they show and how they are labelled; bad arguments."""

import subprocess
import sys
from typing import Any

import pytest
import torch

import fastattn

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.figure import Figure

WORDS = ["the", "cat", "sat"]


def weights(*shape):
    return torch.randn(shape).softmax(-1)


def maps(figure):
    """The visible panels that show an image, without the scale of colours."""
    return [axes for axes in figure.axes if axes.images and axes.get_visible()]


def shown(axes):
    return torch.tensor(axes.images[-1].get_array().data)


def x_labels(axes):
    return [label.get_text() for label in axes.get_xticklabels()]


def y_labels(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


@pytest.mark.parametrize(("shape", "count"), [((3, 3), 1), ((4, 3, 3), 4), ((2, 4, 3, 3), 4)])
def test_there_is_a_map_for_each_head(shape, count):
    of_all = weights(*shape)
    figure = fastattn.plot_attention(of_all, tokens=WORDS)
    assert isinstance(figure, Figure)
    expected = of_all[0] if len(shape) == 4 else of_all.view(-1, 3, 3)
    drawn = maps(figure)
    assert len(drawn) == count
    assert all(torch.equal(shown(axes), one) for axes, one in zip(drawn, expected))
    assert [axes.get_title(loc="left") for axes in drawn] == (
        [f"head {i}" for i in range(count)] if count > 1 else [""]
    )


def test_layers_stand_below_each_other_and_may_have_other_numbers_of_heads():
    layers = [weights(2, 3, 4), weights(1, 3, 4), weights(3, 4)]
    figure = fastattn.plot_attention(layers, tokens=(WORDS, list("abcd")))
    drawn = maps(figure)
    assert len(drawn) == 4
    assert [axes.get_ylabel() for axes in drawn] == ["layer 0\nquery", "", "layer 1\nquery", "layer 2\nquery"]
    assert y_labels(drawn[0]) == WORDS
    assert y_labels(drawn[1]) == x_labels(drawn[0]) == []
    assert x_labels(drawn[3]) == list("abcd")


def test_all_maps_share_one_scale_from_zero():
    of_all = torch.stack((torch.eye(3), torch.full((3, 3), 1 / 3)))
    figure = fastattn.plot_attention(of_all)
    assert {axes.images[0].get_clim() for axes in maps(figure)} == {(0.0, 1.0)}


def test_batch_says_which_sequence_is_drawn():
    of_all = weights(3, 1, 2, 2)
    assert torch.equal(shown(maps(fastattn.plot_attention(of_all, batch=2))[0]), of_all[2, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_a_layer_in_training_are_drawn(dtype):
    layer = fastattn.MultiheadAttention(8, 2, batch_first=True, dtype=dtype)
    x = torch.randn(2, 3, 8, dtype=dtype)
    _, found = layer(x, x, x, average_attn_weights=False)
    assert found.requires_grad
    drawn = maps(fastattn.plot_attention(found, tokens=WORDS))
    torch.testing.assert_close(shown(drawn[1]), found[0, 1].float().detach())


def test_whitespace_and_dollars_are_labels_as_they_are():
    axes = maps(fastattn.plot_attention(weights(4, 4), tokens=[" a", "\n", "$x$", "a b"], title="in $ and $"))[0]
    assert y_labels(axes) == ["␣a", "↵", "$x$", "a b"]
    assert not any(label.get_parse_math() for label in axes.get_yticklabels())


def test_of_many_tokens_some_have_labels():
    axes = maps(fastattn.plot_attention(weights(500, 500), tokens=[f"t{i}" for i in range(500)]))[0]
    labels = y_labels(axes)
    assert 10 < len(labels) < 150
    assert labels[0] == "t0"
    assert set(labels) <= {f"t{i}" for i in range(500)}
    numbers = [int(label) for label in x_labels(maps(fastattn.plot_attention(weights(500, 500)))[0])]
    assert 5 < len(numbers) < 30
    assert numbers == list(range(0, 500, numbers[1]))


def test_over_an_image_each_query_has_a_map():
    of_all, image = weights(2, 3, 6), torch.rand(1, 4, 6)
    figure = fastattn.plot_attention(of_all, image=image, grid=(2, 3), tokens=WORDS)
    drawn = maps(figure)
    assert [axes.get_title() for axes in drawn] == 2 * WORDS
    assert [axes.get_ylabel() for axes in drawn] == ["head 0", "", "", "head 1", "", ""]
    for axes, one in zip(drawn, of_all.flatten(0, 1)):
        picture, light = axes.images
        assert picture.get_extent() == light.get_extent() == [0, 6, 4, 0]
        opaque = torch.as_tensor(light.get_alpha())
        torch.testing.assert_close(opaque / opaque.max(), (one / one.max()).view(2, 3))


def test_over_a_grid_heads_of_one_query_stand_side_by_side():
    drawn = maps(fastattn.plot_attention([weights(3, 1, 6)] * 2, grid=(2, 3)))
    assert [axes.get_title() for axes in drawn] == 2 * ["head 0", "head 1", "head 2"]
    assert [axes.get_ylabel() for axes in drawn] == ["layer 0", "", "", "layer 1", "", ""]


def test_many_queries_over_an_image_go_on_in_the_next_row():
    figure = fastattn.plot_attention(weights(10, 4), grid=(2, 2))
    assert len(maps(figure)) == 10
    assert len(figure.axes) == 16


def test_it_draws_into_a_part_of_a_figure_and_savefig_works(tmp_path):
    figure = Figure()
    parts: Any = figure.subfigures(2, 1)
    above, below = parts
    assert fastattn.plot_attention(weights(3, 3), tokens=WORDS, figure=above, title="above") is above
    fastattn.plot_attention(weights(1, 4), grid=(2, 2), image=torch.zeros(4, 4, dtype=torch.uint8), figure=below)
    assert len(maps(above)) == len(maps(below)) == 1
    figure.savefig(tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 1000


MAP, ROWS = torch.full((3, 3), 1 / 3), torch.full((2, 4), 1 / 4)


@pytest.mark.parametrize(
    ("given", "words", "error", "message"),
    [
        ([[0.5, 0.5]], {}, TypeError, r"weights\[0\] is list: expected a torch.Tensor"),
        ("abc", {}, TypeError, "weights is str: expected a torch.Tensor"),
        (MAP.long(), {}, TypeError, "weights is torch.int64: expected a floating dtype"),
        (MAP[0], {}, ValueError, r"weights has shape \(3,\): expected \[L, S\]"),
        (MAP[:0], {}, ValueError, r"shape \(0, 3\).*not empty"),
        ([], {}, ValueError, "weights is empty"),
        ([MAP, ROWS], {}, ValueError, r"weights\[1\] has shape \(2, 4\): expected \[3, 3\]"),
        (-MAP, {}, ValueError, "negative or not finite"),
        (MAP * torch.nan, {}, ValueError, "negative or not finite"),
        (MAP[None, None], {"batch": 1}, ValueError, "batch=1: expected 0 to 0"),
        (MAP, {"tokens": "the"}, TypeError, r"tokens is str: expected a list of str \(list\(text\)"),
        (MAP, {"tokens": 3}, TypeError, "tokens is int"),
        (MAP, {"tokens": ["a", 1, "c"]}, TypeError, r"tokens\[1\] is int: expected a str"),
        (MAP, {"tokens": ["a", "b"]}, ValueError, "tokens has 2 labels: expected 3, the number of keys"),
        (MAP, {"tokens": (WORDS, ["a"])}, ValueError, r"tokens\[1\] has 1 labels: expected 3, the number of keys"),
        (ROWS, {"tokens": list("abcd")}, ValueError, r"2 queries and 4 keys: expected a pair \(queries, keys\)"),
        (ROWS, {"grid": (2, 3)}, ValueError, r"grid=\(2, 3\): expected h \* w = 4"),
        (ROWS, {"grid": 4}, TypeError, "grid=4: expected a pair of ints"),
        (ROWS, {"image": torch.rand(4, 4)}, ValueError, "image without grid"),
        (ROWS, {"grid": (2, 2), "tokens": list("abcd")}, ValueError, "4 labels: expected 2, the number of queries"),
        (ROWS, {"grid": (2, 2), "image": [[1.0]]}, TypeError, "image is list"),
        (ROWS, {"grid": (2, 2), "image": torch.rand(4, 4, 3)}, ValueError, r"image has shape \(4, 4, 3\)"),
        (ROWS, {"grid": (2, 2), "image": torch.rand(4, 4) - 3}, ValueError, "image is from -.*expected 0 to 1"),
        (ROWS, {"grid": (2, 2), "image": torch.ones(4, 4).long()}, TypeError, "image is torch.int64"),
        (torch.full((300, 4), 0.25), {"grid": (2, 2)}, ValueError, "300 maps: expected at most 256"),
    ],
)
def test_bad_arguments_are_named(given, words, error, message):
    with pytest.raises(error, match=message):
        fastattn.plot_attention(given, **words)


def test_without_matplotlib_an_error_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None; import torch, fastattn\n"
        "try: fastattn.plot_attention(torch.eye(2))\nexcept ImportError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    assert said == "matplotlib is not installed: pip install 'fastattn[plot]'\n"
