"""The gradient of weights that may be zeros: kernels that find that out on the device, and then do nothing."""

import math

import pytest
import torch

from fastattn_kernels.attention.backward import launch_attention_bwd
from fastattn_kernels.attention.forward import launch_attention_fwd
from fastattn_kernels.attention.weights import launch_attention_weights_delta
from fastattn_kernels.common.delta import launch_delta
from fastattn_kernels.common.gradients import Gradients, WeightsGradient
from fastattn_kernels.common.problem import Problem


@pytest.fixture
def forward(device):
    """A causal problem, what its forward left, and a gradient of its averaged weights."""
    torch.manual_seed(0)
    query, key, value, d_out = (torch.randn(1, 2, length, 16, device=device) for length in (20, 35, 35, 20))
    problem = Problem(query, key, value, scale=0.25, upper=0)
    output, lse = torch.empty_like(query), torch.empty(1, 2, 20, device=device)
    statistics = torch.empty(1, 2, 2, 20, device=device)
    launch_attention_fwd(problem, output, lse, statistics, None)
    return problem, output, statistics, d_out, torch.randn(1, 20, 35, device=device)


def backward(forward, d_weights, only_if=None):
    """delta, dQ, dK and dV, which are NaN where nothing wrote them."""
    problem, output, statistics, d_out, _ = forward
    delta = launch_delta(output, d_out, None)
    if d_weights is not None:
        launch_attention_weights_delta(problem, statistics, d_weights, delta)
    dq, dk, dv = (torch.full_like(t, math.nan) for t in (problem.query, problem.key, problem.value))
    launch_attention_bwd(problem, d_out, statistics, delta, d_weights, Gradients(dq, dk, dv), only_if=only_if)
    return delta, dq, dk, dv


@pytest.mark.parametrize("is_used", [True, False])
def test_conditional_backward_runs_where_the_device_says_so(forward, device, is_used):
    """Delta stays what it was without the weights, and gradients what they were, if there is nothing to add."""
    given = forward[-1]
    d_weights = WeightsGradient(given, 2, torch.tensor(is_used, device=device))
    delta, *gradients = backward(forward, d_weights, d_weights.only_if_used())
    expected_delta, *expected = backward(forward, WeightsGradient(given, 2) if is_used else None)
    assert torch.equal(delta, expected_delta)
    for gradient, other in zip(gradients, expected):
        assert torch.equal(gradient, other) if is_used else gradient.isnan().all()


@pytest.mark.parametrize("is_used", [True, False])
def test_conditional_backward_without_weights_is_the_other_way_round(forward, device, is_used):
    d_weights = WeightsGradient(forward[-1], 2, torch.tensor(is_used, device=device))
    _, *gradients = backward(forward, None, d_weights.only_if_used(False))
    for gradient, other in zip(gradients, backward(forward, None)[1:]):
        assert gradient.isnan().all() if is_used else torch.equal(gradient, other)


def test_gradient_that_is_known_to_be_used_has_no_condition(forward):
    assert WeightsGradient(forward[-1], 2).only_if_used() is None
