"""LearnedPositionalEncoding: added or put behind, from any start; and the order counts behind it."""

import pytest
import torch

import fastattn
from fastattn.modules.positional_encoding import LearnedPositionalEncoding
from fastattn.testing import random_tensor


def test_positions_are_added(seed):
    encoding, x = LearnedPositionalEncoding(7, 4), random_tensor(2, 5, 4, seed=seed)
    assert torch.equal(encoding(x), x + encoding.weight[:5])
    assert torch.equal(encoding(x[0]), encoding(x)[0]), "without a batch"


def test_positions_are_put_behind(seed):
    encoding, x = LearnedPositionalEncoding(7, 3, concatenate=True), random_tensor(2, 5, 4, seed=seed)
    y = encoding(x)
    assert y.shape == (2, 5, 7)
    assert torch.equal(y[..., :4], x)
    assert torch.equal(y[0, :, 4:], encoding.weight[:5])
    assert torch.equal(y[1, :, 4:], encoding.weight[:5])


@pytest.mark.parametrize("concatenate", [False, True])
def test_positions_of_a_part_are_those_of_the_whole(concatenate, seed):
    encoding, x = LearnedPositionalEncoding(7, 4, concatenate=concatenate), random_tensor(2, 7, 4, seed=seed)
    assert torch.equal(torch.cat((encoding(x[:, :3]), encoding(x[:, 3:], start=3)), dim=1), encoding(x))


@pytest.mark.parametrize("concatenate", [False, True])
def test_positions_that_were_seen_learn(concatenate, seed):
    encoding, x = LearnedPositionalEncoding(7, 4, concatenate=concatenate), random_tensor(2, 5, 4, seed=seed)
    (gradient,) = torch.autograd.grad(encoding(x, start=1).square().sum(), encoding.weight)
    assert gradient.any(dim=1).tolist() == [False, *[True] * 5, False]


def test_positions_are_drawn_as_asked():
    torch.manual_seed(0)
    encoding = LearnedPositionalEncoding(100, 100, std=0.5)
    assert encoding.weight.std().item() == pytest.approx(0.5, rel=0.03)
    first = encoding.weight.clone()
    encoding.reset_parameters()
    assert not torch.equal(encoding.weight, first)
    assert LearnedPositionalEncoding(3, 4, dtype=torch.float64).weight.dtype == torch.float64


@pytest.mark.parametrize("concatenate", [False, True])
def test_order_counts_behind_positions_alone(concatenate, seed):
    """Reversed inputs give reversed outputs, until each vector is told where it stands."""
    torch.manual_seed(1)
    encoding = LearnedPositionalEncoding(6, 8, concatenate=concatenate, std=1.0)
    width = 16 if concatenate else 8
    layer = fastattn.MultiheadAttention(width, 2, batch_first=True, backend="torch")
    x = random_tensor(1, 6, 8, seed=seed)

    def attend(x):
        return layer(x, x, x, need_weights=False)[0]

    without = x.repeat(1, 1, width // 8)
    torch.testing.assert_close(attend(without.flip(1)), attend(without).flip(1))
    difference = attend(encoding(x.flip(1))) - attend(encoding(x)).flip(1)
    assert difference.abs().max() > 0.05


@pytest.mark.parametrize(("length", "start"), [(8, 0), (3, 5), (2, -1)])
def test_positions_beyond_the_table_are_refused(length, start):
    with pytest.raises(ValueError, match="the table holds max_length=7"):
        LearnedPositionalEncoding(7, 4)(torch.zeros(1, length, 4), start)


@pytest.mark.parametrize("concatenate", [False, True])
def test_positions_take_the_dtype_of_the_input(concatenate):
    encoding = LearnedPositionalEncoding(7, 4, concatenate=concatenate)
    assert encoding(torch.zeros(1, 5, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"x is torch\.int64: expected a floating dtype"):
        encoding(torch.zeros(1, 5, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x has shape \(4,\): expected \[..., length, size\]"):
        encoding(torch.zeros(4))


def test_positions_of_another_width_are_not_added():
    with pytest.raises(ValueError, match=r"x has shape \(1, 5, 3\): expected \[..., 4\]"):
        LearnedPositionalEncoding(7, 4)(torch.zeros(1, 5, 3))


@pytest.mark.parametrize("sizes", [(0, 4), (7, 0)])
def test_positions_refuse_sizes(sizes):
    with pytest.raises(ValueError, match="=0: expected a positive number"):
        LearnedPositionalEncoding(*sizes)
