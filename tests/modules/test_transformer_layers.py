"""Drop-in equality with torch's transformer layers: outputs, every gradient, training, dropout."""

import math
import zlib

import pytest
import torch
from torch import nn

from fastattn.testing import assert_within_budget, measure_error, random_tensor, ulp
from tests.modules.transformer_cases import AXES, OURS, THEIRS, Case, make_arguments, make_layer, makes_sense, run
from tests.pairwise import pairwise

GRID = [Case(**levels) for levels in pairwise(AXES, makes_sense)]
# Every combination of what decides which code runs in torch and in ours.
CORE = [
    Case(kind=kind, norm_first=norm_first, layout=layout, mask=mask, padding=padding, mode=mode)
    for kind in AXES["kind"]
    for norm_first in AXES["norm_first"]
    for layout in AXES["layout"]
    for mask in ("none", "causal_bool", "causal_hint")
    for padding in ("none", "bool")
    for mode in AXES["mode"]
]
KERNELS = [
    Case(),
    Case(norm_first=True, activation="gelu", padding="bool", dtype=torch.bfloat16),
    Case(kind="decoder", mask="causal_hint", layout="sequence_first", activation="gelu"),
    Case(kind="decoder", norm_first=True, bias=False, size=(15, 3), padding="bool"),
    Case(layout="unbatched", mask="causal_float", mode="eval_no_grad", bias=False),
]


def check(case, backend):
    arguments = make_arguments(case, zlib.crc32(str(case).encode()) % 10**6)
    theirs, ours = make_layer(case, THEIRS), make_layer(case, OURS, backend=backend)
    truth = run(make_layer(case, THEIRS), case, arguments, torch.float64)
    peer = run(theirs, case, arguments, case.dtype)
    actual = run(ours, case, arguments, case.dtype)
    assert actual.keys() == peer.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == peer[name].dtype
        if case.dtype == torch.float64:
            # The peer is the truth itself, to the bit: room for another order of sums of some 36 terms.
            allowance = 36 * ulp(truth[name].abs().max().item(), torch.float64)
        else:
            # The peer's error is a sample of as many as there are elements, and strays from what eager roundings lose
            # on average by one part in sqrt(2 n); three such parts are allowed.
            peer_error = measure_error(peer[name], truth[name]).maximum
            allowance = 2 * peer_error * 3 / math.sqrt(2 * tensor.numel())
        assert_within_budget(
            tensor,
            truth=truth[name],
            peer=peer[name],
            name=name,
            allowance=allowance,
            feature="layers",
            backend=backend,
        )


@pytest.mark.parity
@pytest.mark.parametrize("case", GRID, ids=str)
def test_layer_matches_torch(case):
    check(case, "torch")


@pytest.mark.parity
@pytest.mark.parametrize("case", CORE, ids=str)
def test_layer_core_matches_torch(case):
    check(case, "torch")


@pytest.mark.parity
@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_layer_on_kernels_matches_torch(case):
    check(case, "triton")


def train(layer, case, dtype, steps):
    """The losses of a few steps that make the layer keep its first input."""
    arguments = make_arguments(case, 4)
    optimizer = torch.optim.AdamW(layer.to(dtype).parameters(), lr=3e-3)
    arguments = {name: tensor.to(dtype) for name, tensor in arguments.items()}
    target = next(iter(arguments.values())).flip(-1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (layer(**arguments) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", AXES["kind"])
def test_training_steps_have_torchs_losses(backend, kind, norm_first):
    case = Case(kind=kind, norm_first=norm_first)
    steps = 3 if backend == "triton" and kind == "decoder" else 20  # an interpreter takes its time
    truth = train(make_layer(case, THEIRS), case, torch.float64, steps)
    peer = train(make_layer(case, THEIRS), case, torch.float32, steps)
    actual = train(make_layer(case, OURS, backend=backend), case, torch.float32, steps)
    assert_within_budget(actual, truth=truth, peer=peer, name="losses", backend=backend)
    assert steps < 20 or truth[-1] < 0.8 * truth[0]


# ------------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", AXES["kind"])
def test_dropout_under_one_seed_is_torchs(kind, norm_first):
    """With the sequence first: with the batch first torch's attention gives a transposed view, which it drops from in
    another order."""
    case = Case(kind=kind, norm_first=norm_first, layout="sequence_first", dtype=torch.float64)
    arguments, results = make_arguments(case, 3), []
    for kinds, more in ((THEIRS, {}), (OURS, {"backend": "torch"})):
        layer = make_layer(case, kinds, 0.3, **more)
        torch.manual_seed(11)
        results.append(run(layer, case, arguments, torch.float64))
    without = run(make_layer(case, THEIRS), case, arguments, torch.float64)
    assert not torch.allclose(results[0]["output"], without["output"])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", AXES["kind"])
def test_dropout_of_one_leaves_the_residuals(backend, kind, norm_first):
    case = Case(kind=kind, norm_first=norm_first)
    layer, arguments = make_layer(case, OURS, 1.0, backend=backend), make_arguments(case, 1)
    expected = next(iter(arguments.values()))
    if not norm_first:
        for norm in (layer.norm1, layer.norm2, layer.norm3) if kind == "decoder" else (layer.norm1, layer.norm2):
            expected = norm(expected)
    torch.testing.assert_close(layer(**arguments), expected)


def test_dropout_keeps_a_share_of_the_block_and_scales_it(backend):
    """A pre-norm layer whose feed-forward block gives nothing: what it adds is the attention's output, or 0."""
    case, p = Case(norm_first=True, size=(32, 2)), 0.25
    layer = make_layer(case, OURS, backend=backend)
    nn.init.zeros_(layer.linear2.weight)
    nn.init.zeros_(layer.linear2.bias)
    x = random_tensor(4, 40, 32, seed=2)
    with torch.no_grad():
        added = layer(x) - x
        layer.dropout1.p = p
        dropped = layer(x) - x
        again = layer(x) - x
        kept = dropped != 0
        torch.testing.assert_close(dropped, torch.where(kept, added / (1 - p), 0.0), rtol=1e-4, atol=1e-5)
        assert not torch.equal(dropped, again)
        layer.eval()
        torch.testing.assert_close(layer(x) - x, added)
    share, deviation = kept.float().mean().item(), (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(share - (1 - p)) < 5 * deviation


class Halving(nn.Module):
    def forward(self, x):
        return x / 2


@pytest.mark.parametrize("norm_first", [False, True])
def test_other_modules_in_the_place_of_dropout_and_norm_are_called(norm_first):
    case = Case(kind="decoder", norm_first=norm_first)
    layers = make_layer(case, THEIRS), make_layer(case, OURS, backend="torch")
    for layer in layers:
        layer.dropout1, layer.dropout3 = Halving(), nn.Identity()
        layer.dropout2.p = 0.9  # and in evaluation, so that nothing is dropped
        layer.dropout2.eval()
        layer.norm2 = nn.Identity()
    results = [run(layer, case, make_arguments(case, 6), torch.float64) for layer in layers]
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)
