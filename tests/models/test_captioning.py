"""The captioner: what its decoder reads of an image, learning, decoding, both backends."""

import pytest
import torch

import fastattn
from fastattn.models import ImageCaptioner
from fastattn.testing import assert_within_budget

WORDS, START, END = 6, 0, 1
ATTENTION = pytest.mark.parametrize("attention_dim", [None, 5], ids=["without", "attention"])


def captioner(attention_dim, dtype=torch.float64):
    torch.manual_seed(1)
    return ImageCaptioner(2, WORDS, (8, 12), channels=4, hidden=8, embedding=6, attention_dim=attention_dim).to(dtype)


def images(count=3, dtype=torch.float64):
    return torch.randn(count, 2, 8, 12, generator=torch.Generator().manual_seed(2)).to(dtype)


def captions(*shape):
    return torch.randint(WORDS, shape, generator=torch.Generator().manual_seed(3))


@ATTENTION
def test_shapes_and_weights(attention_dim):
    model = captioner(attention_dim)
    assert model.grid == (2, 3)
    logits, weights = model(images(), captions(3, 5), need_weights=True)
    assert logits.shape == (3, 5, WORDS)
    assert model(images(), captions(3, 5))[1] is None
    if attention_dim is None:
        assert weights is None
    else:
        assert weights.shape == (3, 5, 2 * 3)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 5, dtype=torch.float64), rtol=0, atol=1e-13)


def test_decoder_reads_the_grid_row_by_row():
    """Each cell's features, in the order in which a picture of the weights is drawn, and where the cell is."""
    model = captioner(5).eval()
    grid, memory = model.features(images()), model.encode(images())
    assert grid.shape == (3, 4, 2, 3)
    assert memory.vectors.shape == (3, 6, 4)
    for y in range(2):
        for x in range(3):
            expected = grid[:, :, y, x] + model.positions.weight[3 * y + x]
            torch.testing.assert_close(memory.vectors[:, 3 * y + x], expected, rtol=0, atol=1e-14)


def test_grid_is_read_as_a_view():
    """The vectors lie as the CNN laid its features out, channel by channel: they are never rearranged."""
    model = captioner(5)
    assert model.encode(images()).vectors.stride() == (4 * 6, 1, 6)


@ATTENTION
def test_gradients_reach_every_parameter(attention_dim):
    model = captioner(attention_dim)
    model.loss(images(), captions(3, 6)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-12, name


@ATTENTION
def test_every_pixel_counts(attention_dim):
    model, image = captioner(attention_dim).eval(), images(1).requires_grad_()
    model(image, captions(1, 4))[0].square().sum().backward()
    assert image.grad is not None
    assert (image.grad.abs().amax((0, 1)) > 0).double().mean() > 0.8  # max pooling passes most of them on


@ATTENTION
def test_padding_of_a_caption_changes_nothing(attention_dim):
    model, caption = captioner(attention_dim).eval(), captions(3, 6)
    padding = torch.arange(6) >= torch.tensor([[4], [4], [4]])
    other = torch.where(padding, (caption + 1) % WORDS, caption)
    torch.testing.assert_close(
        model.loss(images(), other, padding), model.loss(images(), caption[:, :4]), rtol=0, atol=1e-13
    )


@ATTENTION
def test_model_learns_a_few_captions_by_heart(attention_dim):
    model, shown = captioner(attention_dim, torch.float32), images(dtype=torch.float32)
    target = torch.tensor([[START, 2, 3, END, END], [START, 5, 4, 2, END], [START, 3, END, END, END]])
    padding = (target == END).cumsum(1) > 1
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss = model.loss(shown, target, padding)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    model.eval()
    for beam in (1, 3):
        first = model.generate(shown, 8, start=START, end=END, beam=beam)
        assert torch.equal(first.tokens, target)
        torch.manual_seed(beam)
        assert torch.equal(model.generate(shown, 8, start=START, end=END, beam=beam).tokens, first.tokens)


@pytest.mark.parametrize("size", [(8, 10), (0, 8), (7, 8)])
def test_size_that_is_no_multiple_of_four_is_refused(size):
    with pytest.raises(ValueError, match=r"expected positive multiples of 4"):
        ImageCaptioner(1, WORDS, size)


def test_training_step_on_kernels_matches_torch():
    """The loss and every gradient; what the kernels may lose is what eager torch loses, twice."""
    pytest.importorskip("triton", reason="triton is not installed")

    def step(backend, dtype):
        model = captioner(5, torch.float32).to(dtype)
        with fastattn.use_backend(backend):
            loss = model.loss(images(dtype=torch.float32).to(dtype), captions(3, 4))
            loss.backward()
        return loss.detach()[None], torch.cat(
            [torch.as_tensor(parameter.grad).flatten() for parameter in model.parameters()]
        )

    actual, peer, truth = step("triton", torch.float32), step("torch", torch.float32), step("torch", torch.float64)
    for name, ours, theirs, exact in zip(("loss", "gradients"), actual, peer, truth):
        # Sums of some hundred terms, as many as a batch norm has pixels, in another order
        allowance = 100 * torch.finfo(torch.float32).eps * exact.abs().max().item()
        assert_within_budget(ours, truth=exact, peer=theirs, name=name, allowance=allowance)
