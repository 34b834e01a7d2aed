"""The CNN with self-attention: who sees whom, equal parameters, learning, both backends."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn.models.cnn import ConvNet
from fastattn.modules.self_attention_2d import SelfAttention2d
from fastattn.testing import assert_within_budget, random_tensor

SIZE = (12, 48)
BETWEEN = ["attention", "pointwise", "nothing"]
every_net = pytest.mark.parametrize("between", BETWEEN)


def make(between: Any = "attention", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(4)
    return ConvNet(1, 3, width=8, between=between, **options).to(dtype)


@every_net
@pytest.mark.parametrize("size", [None, SIZE], ids=["without-positions", "with-positions"])
def test_conv_net_gradients_reach_every_parameter(between, size, seed):
    model = make(between, torch.float64, size=size)
    logits = model(random_tensor(4, 1, *SIZE, seed=seed, dtype=torch.float64))
    assert logits.shape == (4, 3)
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    for name, parameter in model.named_parameters():
        if name != "between.key.bias":  # adds the same to all scores of a row: softmax sees nothing
            assert parameter.grad.abs().max() > 1e-12, name


def test_attention_and_its_stand_in_have_the_same_parameters():
    """But for as many as there are channels: otherwise the larger one's win would say nothing."""
    counts = [sum(p.numel() for p in ConvNet(1, 10, between=b).parameters()) for b in ("attention", "pointwise")]
    assert counts[0] - counts[1] == 32


@every_net
def test_conv_net_reaches_as_far_as_it_says(between, seed):
    """By gradient: one vector of the last feature map sees 18 pixels; with attention in between, all of them."""
    model = make(between, torch.float64, size=(4, 48)).eval()
    image = random_tensor(1, 1, 4, 48, seed=seed, dtype=torch.float64).requires_grad_()
    last = model.conv3(model.between(model.features(image)))
    (gradient,) = torch.autograd.grad(last[0, :, :, 5].square().sum(), image)
    seen = gradient[0, 0].any(0).nonzero()[:, 0]
    if between == "attention":
        assert (seen[0], seen[-1]) == (0, 47)
    else:
        # Cell 5 of 4 pixels, one more on either side, and 3 pixels beyond by the two convolutions in front
        assert seen[0] >= 20 - 4 - 3
        assert seen[-1] <= 23 + 4 + 3
        assert seen[-1] - seen[0] < 18


def test_positions_are_one_vector_for_each_cell(seed):
    model = make("nothing", torch.float64, size=SIZE).eval()
    x = random_tensor(2, 1, *SIZE, seed=seed, dtype=torch.float64)
    with_positions = model.features(x)
    table, model.positions = model.positions.weight, None
    expected = table.view(3, 12, 8).permute(2, 0, 1).expand(2, -1, -1, -1)
    torch.testing.assert_close(with_positions - model.features(x), expected, rtol=0, atol=1e-12)


def test_attention_map_is_the_layers(seed):
    model, x = make(num_heads=2).eval(), random_tensor(2, 1, *SIZE, seed=seed)
    assert isinstance(model.between, SelfAttention2d)
    weights = model.attention_map(x)
    assert weights.shape == (2, 3, 12, 3, 12)
    assert torch.equal(weights, model.between(model.features(x), need_weights=True)[1])
    torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(2, 3, 12))


@every_net
def test_conv_net_learns_a_few_images_by_heart(between):
    model, x = make(between), random_tensor(6, 1, *SIZE, seed=3)
    targets = torch.arange(6) % 3
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2, fused=True)
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), targets)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_conv_net_training_step_on_kernels_matches_torch():
    pytest.importorskip("triton", reason="triton is not installed")
    x = random_tensor(4, 1, 8, 16, seed=6)

    def step(backend, dtype):
        model = make().to(dtype)
        with fastattn.use_backend(backend):
            loss = F.cross_entropy(model(x.to(dtype)), torch.tensor([0, 1, 2, 0]))
            loss.backward()
        return loss.detach()[None], torch.cat([p.grad.flatten() for p in model.parameters()])

    actual, peer, truth = step("triton", torch.float32), step("torch", torch.float32), step("torch", torch.float64)
    for name, ours, theirs, exact in zip(("loss", "gradients"), actual, peer, truth):
        # Sums of some 150 terms, through the batch norms, in another order
        allowance = 150 * torch.finfo(torch.float32).eps * exact.abs().max().item()
        assert_within_budget(ours, truth=exact, peer=theirs, name=name, allowance=allowance)


def test_conv_net_refuses():
    with pytest.raises(ValueError, match="between='pooling': expected one of 'attention'"):
        ConvNet(1, 2, between="pooling")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"size=\(10, 48\): expected positive multiples of 4"):
        ConvNet(1, 2, size=(10, 48))
    with pytest.raises(ValueError, match="has no attention map"):
        make("pointwise").attention_map(torch.zeros(1, 1, *SIZE))
