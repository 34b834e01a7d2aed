"""The operator over a cache: its schema, its fake, what it says of itself and what it refuses."""

import pytest
import torch

from fastattn.ops.attention.kvcache.contract import KVCacheCall, KVCacheInputs, KVCacheOptions
from fastattn.reference import attention_with_kvcache as reference
from fastattn.testing import random_tensor

pytest.importorskip("triton", reason="triton is not installed")

from fastattn.ops.attention.kvcache import launch, on_triton, operator
from fastattn.ops.common import backends

OPERATOR = torch.ops.fastattn.attention_with_kvcache.default
OPTIONS = KVCacheOptions(False, None, 0, None, 0.25, num_splits=2)


def draw(device, *, is_new=True) -> KVCacheInputs:
    def normal(*shape: int) -> torch.Tensor:
        return random_tensor(*shape, seed=sum(shape), device=device)

    return KVCacheInputs(
        query=normal(2, 2, 4, 16).transpose(1, 2),
        key_cache=normal(2, 2, 40, 16),
        value_cache=normal(2, 2, 40, 32),
        key=normal(2, 2, 2, 16) if is_new else None,
        value=normal(2, 2, 2, 32) if is_new else None,
        cache_seqlens=torch.tensor([3, 16], dtype=torch.int32, device=device),
        **dict.fromkeys(KVCacheInputs._fields[6:]),
    )


def expected_of(inputs: KVCacheInputs):
    return reference(*inputs[:5], cache_seqlens=inputs.cache_seqlens, scale=OPTIONS.scale)


@pytest.mark.usefixtures("poisoned")
def test_operator_matches_reference_and_its_plan_does_too(device):
    """Three calls of one signature, the last of them by a plan; of each, autograd is told that it writes."""
    launch.forward.plans.clear()
    for _ in range(3):
        inputs = draw(device)
        expected, versions = expected_of(inputs), [cache._version for cache in inputs[1:3]]
        output, lse = on_triton.run(KVCacheCall(inputs, OPTIONS, True))
        torch.testing.assert_close(output, expected.output, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, expected.lse, rtol=1e-5, atol=1e-6)
        assert torch.equal(inputs.key_cache, expected.key_cache)
        assert torch.equal(inputs.value_cache, expected.value_cache)
        assert all(cache._version > version for cache, version in zip(inputs[1:3], versions))
        assert output.transpose(1, 2).is_contiguous()
    assert [plan.launches for plan in launch.forward.plans.known()] == [3]


def test_operator_passes_the_checks_of_torch(device):
    torch.library.opcheck(OPERATOR, (*draw(device), *OPTIONS))


def test_operator_without_a_new_key_writes_nothing(device):
    inputs = draw(device, is_new=False)
    versions = [cache._version for cache in inputs[1:3]]
    output, lse = on_triton.run(KVCacheCall(inputs, OPTIONS, False))
    assert lse is None
    torch.testing.assert_close(output, expected_of(inputs).output, rtol=1e-5, atol=1e-6)
    assert [cache._version for cache in inputs[1:3]] == versions


def test_operator_runs_in_inference_mode(device):
    with torch.inference_mode():
        inputs = draw(device)
        output, _ = on_triton.run(KVCacheCall(inputs, OPTIONS, False))
    torch.testing.assert_close(output, expected_of(inputs).output, rtol=1e-5, atol=1e-6)


def test_operator_in_a_graph_writes_into_the_caches(device):
    def call(*tensors):
        output, _ = operator.ATTENTION_WITH_KVCACHE(*tensors, *OPTIONS)
        return output + 1.0

    inputs = draw(device)
    expected = expected_of(inputs)
    output = torch.compile(call, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(output, expected.output + 1.0, rtol=1e-5, atol=1e-6)
    assert torch.equal(inputs.key_cache, expected.key_cache)


def test_kernels_over_a_cache_say_how_they_run(device):
    assert on_triton.describe(KVCacheCall(draw(device), OPTIONS, False)).startswith(backends.WHERE)
    assert launch.describe(draw(device), OPTIONS) == "append, attention, merge; slots divided by 2"
    alone = draw(device, is_new=False), OPTIONS._replace(num_splits=1)
    assert launch.describe(*alone) == "attention; slots divided by 1"


def test_kernels_over_a_cache_refuse_gradients_and_what_they_do_not_take(device):
    inputs = draw(device)
    assert on_triton.refusals(KVCacheCall(inputs, OPTIONS, False)) == []
    needing = inputs._replace(query=inputs.query.detach().requires_grad_())
    (reason,) = on_triton.refusals(KVCacheCall(needing, OPTIONS, False))
    assert "gradients are asked for (query)" in reason
    with torch.no_grad():
        assert on_triton.refusals(KVCacheCall(needing, OPTIONS, False)) == []
    double = inputs._replace(query=inputs.query.double(), sinks=torch.zeros(1, 4, dtype=torch.float64, device=device))
    reasons = on_triton.refusals(KVCacheCall(double, OPTIONS, False))
    assert [reason.partition(" ")[0] for reason in reasons] == ["query", "sinks"]
    wide = inputs._replace(value_cache=torch.zeros(2, 2, 40, 640, device=device))
    assert on_triton.refusals(KVCacheCall(wide, OPTIONS, False)) == ["value head_dim=640: it takes 1 to 512"]
