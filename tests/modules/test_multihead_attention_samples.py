"""PyTorch's own sample inputs for ``nn.MultiheadAttention``, driven through ours."""

import collections
import copy
import inspect

import pytest
import torch

import fastattn
from fastattn.testing import assert_within_budget

pytest.importorskip("expecttest", reason="torch.testing._internal needs the expecttest package")

from torch.testing._internal.common_modules import module_db

(INFO,) = (info for info in module_db if info.module_cls is torch.nn.MultiheadAttention)


def run(module, sample, dtype):
    """Output, weights and every gradient, by name, of one sample in ``dtype``."""
    module = copy.deepcopy(module).to(dtype)
    inputs = [t.detach().to(dtype, copy=True).requires_grad_() for t in sample.forward_input.args]
    output, weights = module(*inputs, **sample.forward_input.kwargs)
    (output.square().sum() + weights.square().sum()).backward()
    leaves = {**dict(zip(("query", "key", "value"), inputs)), **dict(module.named_parameters())}
    return {"output": output, "weights": weights, **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def sampled(dtype, training):
    """Each of PyTorch's samples with torch's module and ours, which share their weights."""
    samples = INFO.module_inputs_func(INFO, "cpu", dtype, True, training)
    assert len(samples) >= 64
    for sample in samples:
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        theirs = INFO.module_cls(*args, **kwargs, dtype=dtype).train(training)
        ours = fastattn.MultiheadAttention(*args, **kwargs, dtype=dtype, backend="torch").train(training)
        ours.load_state_dict(theirs.state_dict())
        yield sample, theirs, ours


@pytest.mark.parametrize("training", [True, False])
def test_sample_inputs_match_torch(training):
    for sample, theirs, ours in sampled(torch.float64, training):
        expected = run(theirs, sample, torch.float64)
        torch.testing.assert_close(run(ours, sample, torch.float64), expected)


@pytest.mark.parametrize("training", [True, False])
def test_sample_inputs_in_float32_are_as_exact_as_torchs(training):
    """All samples together: one has few elements, and on some versions torch's own error there is zero by luck."""
    torch.manual_seed(0)
    pooled = collections.defaultdict(list)
    for sample, theirs, ours in sampled(torch.float32, training):
        truth, peer = (run(theirs, sample, dtype) for dtype in (torch.float64, torch.float32))
        for name, actual in run(ours, sample, torch.float32).items():
            pooled[name].append([tensor.flatten() for tensor in (actual, truth[name], peer[name])])
    assert len(pooled) >= 9
    for name, samples in pooled.items():
        actual, truth, peer = map(torch.cat, zip(*samples))
        assert_within_budget(actual, truth=truth, peer=peer, name=name)


@pytest.mark.parametrize("training", [True, False])
def test_sample_inputs_match_torchs_reference(training):
    """Without a batch, as with a batch of one: the reference function that PyTorch's own suite compares with."""
    for sample in INFO.module_inputs_func(INFO, "cpu", torch.float64, False, training):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        module = fastattn.MultiheadAttention(*args, **kwargs, dtype=torch.float64).train(training)
        actual = module(*sample.forward_input.args, **sample.forward_input.kwargs)
        expected = sample.reference_fn(module, *sample.forward_input.args, **sample.forward_input.kwargs)
        torch.testing.assert_close(actual, expected)


def test_every_argument_of_torchs_forward_is_sampled_or_tested_elsewhere():
    """A new argument in a later torch should not go unnoticed."""
    known = {"self", "query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights"}
    assert set(inspect.signature(INFO.module_cls.forward).parameters) == known | {"is_causal"}
