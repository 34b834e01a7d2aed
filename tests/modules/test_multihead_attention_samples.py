"""PyTorch's own sample inputs for ``nn.MultiheadAttention``, driven through ours."""

import inspect

import pytest
import torch
from torch.testing._internal.common_modules import module_db

import fastattn

(INFO,) = (info for info in module_db if info.module_cls is torch.nn.MultiheadAttention)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sample_inputs_match_torch(dtype, training):
    samples = INFO.module_inputs_func(INFO, "cpu", dtype, True, training)
    assert len(samples) >= 64
    for sample in samples:
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        theirs = INFO.module_cls(*args, **kwargs, dtype=dtype).train(training)
        ours = fastattn.MultiheadAttention(*args, **kwargs, dtype=dtype, backend="torch").train(training)
        ours.load_state_dict(theirs.state_dict())
        results = []
        for module in (theirs, ours):
            inputs = [t.detach().clone().requires_grad_() for t in sample.forward_input.args]
            output, weights = module(*inputs, **sample.forward_input.kwargs)
            (output.square().sum() + weights.square().sum()).backward()
            results.append((output, weights, [t.grad for t in (*inputs, *module.parameters())]))
        torch.testing.assert_close(results[1], results[0])


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
