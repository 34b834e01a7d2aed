"""Faults that other attention kernels had, each told in its docstring, so that these do not have them."""

import inspect

import pytest
import torch

from fastattn.reference import attention as reference
from fastattn.testing import assert_within_budget, attention_inputs, attention_mask, random_tensor
from tests.ops.attention_cases import attend

pytestmark = pytest.mark.usefixtures("poisoned")


def check(query, key, value, backend, bias):
    """Output, LSE and gradients under an additive mask, against the reference."""
    d_output = random_tensor(*query.shape[:3], value.shape[3], seed=99, dtype=query.dtype, device=query.device)

    def run(attend, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (query, key, value)]
        output, lse = attend(*leaves)
        return (output, lse, *torch.autograd.grad(output, leaves, d_output.to(dtype)))

    def ours(*leaves):
        return attend(*leaves, attn_mask=bias, return_lse=True, backend=backend)

    def plain(*leaves):
        found = reference(*leaves, bias=bias.to(leaves[0].dtype))
        return found.output, found.lse

    actual, truth, peer = run(ours, query.dtype), run(plain, torch.float64), run(plain, query.dtype)
    names = ("output", "lse", "d_query", "d_key", "d_value")
    for name, found, exact, eager in zip(names, actual, truth, peer):
        assert_within_budget(found, truth=exact, peer=eager, name=name)


@pytest.mark.parametrize("length", [64, 192])
def test_attention_grad_with_a_half_filled_tile_and_very_negative_lse(length, backend, device, seed):
    """L % 128 == 64 and scores near -300 (pytorch#196678).

    The rows that pad the last tile of 128 had LSE 0, so that exp(score - lse) of a score of 0 in the padding was 1: the
    gradients of half-filled tiles were wrong, but only where the LSE was very negative.
    """
    query, key, value = attention_inputs(1, 1, length, 64, 16, dtype=torch.float16, device=device, seed=seed)
    bias = torch.full((1, 1, 1, 64), -300.0, dtype=torch.float16, device=device)
    check(query, key, value, backend, bias)


def test_attention_of_a_single_query_with_negative_lse(backend, device, seed):
    """One query, a negative LSE (cudnn-frontend#1072): the rows that pad the tile must not take part in dK and dV."""
    query, key, value = attention_inputs(2, 2, 1, 97, 16, device=device, seed=seed)
    bias = torch.full((1, 1, 1, 1), -40.0, device=device)
    check(query, key, value, backend, bias)


@pytest.mark.parametrize("magnitude", [30.0, -30.0, 1e4], ids=["large", "negative", "overflowing_exp"])
def test_attention_of_large_scores(magnitude, backend, device, seed):
    """Scores whose exponential overflows float32: only differences from the row's maximum may be exponentiated."""
    query, key, value = attention_inputs(1, 2, 33, 70, 16, device=device, seed=seed)
    bias = torch.full((1, 1, 1, 70), magnitude, device=device)
    bias[..., ::3] = 0
    check(query, key, value, backend, bias)


@pytest.mark.parametrize("axis", ["batch", "seqlen_q", "seqlen_k"])
def test_attention_of_zero_length(axis, backend, device):
    """Empty batches and sequences (flash-attention#2568, #2421): right shapes, zero gradients."""
    sizes = {"batch": 2, "seqlen_q": 5, "seqlen_k": 7, axis: 0}
    batch, seqlen_q, seqlen_k = sizes.values()
    leaves = [t.requires_grad_() for t in attention_inputs(batch, 4, seqlen_q, seqlen_k, 8, kv_heads=2, device=device)]
    for arguments in ({}, {"is_causal": True}, {"is_causal": True, "causal_alignment": "bottom_right"}):
        for average in (True, False):
            output, weights, lse = attend(
                *leaves,
                **arguments,
                need_weights=True,
                average_attn_weights=average,
                return_lse=True,
                backend=backend,
            )
            plain = attend(*leaves, **arguments, backend=backend)
            assert output.shape == plain.shape == (batch, 4, seqlen_q, 8)
            assert weights.shape == ((batch,) if average else (batch, 4)) + (seqlen_q, seqlen_k)
            assert lse.shape == (batch, 4, seqlen_q)
            assert (lse == -torch.inf).all()  # no keys, or no rows
            assert not output.any() and not plain.any()
            gradients = torch.autograd.grad([output.sum() + plain.sum() + weights.sum()], leaves)
            for leaf, gradient in zip(leaves, gradients):
                assert gradient.shape == leaf.shape
                assert not gradient.any()


def test_attention_with_padding_past_the_last_sequence(backend, device, seed):
    """Padding behind every sequence and a whole sequence of it (flash-attention#2324): nothing in it counts."""
    query, key, value = attention_inputs(3, 2, 33, 70, 16, device=device, seed=seed)
    lengths = torch.tensor([50, 1, 0])
    padding = (torch.arange(70) >= lengths[:, None]).to(device)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    output = attend(*leaves, key_padding_mask=padding, backend=backend)
    gradients = torch.autograd.grad(output, leaves, torch.ones_like(output))
    for entry, length in enumerate(lengths.tolist()):
        cut = [t[entry : entry + 1, :, :n].detach().requires_grad_() for t, n in zip(leaves, (33, length, length))]
        expected = attend(*cut, backend=backend)
        torch.testing.assert_close(output[entry : entry + 1], expected)
        for found, wanted in zip(gradients, torch.autograd.grad(expected, cut, torch.ones_like(expected))):
            found = found[entry : entry + 1]
            torch.testing.assert_close(found[:, :, : wanted.shape[2]], wanted)
            assert not found[:, :, wanted.shape[2] :].any()


@pytest.mark.parametrize("offset", [0, 1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float16], ids=["bool", "additive"])
def test_attention_mask_of_any_alignment(dtype, offset, backend, device, seed):
    """SDPA wants masks whose rows start at multiples of 8 or 16 elements; here any slice will do, and is not copied."""
    query, key, value = attention_inputs(2, 2, 33, 70, 16, dtype=torch.float16, device=device, seed=seed)
    wide = attention_mask(2, 2, 33, 70 + offset + 5, dtype=dtype, device=device, seed=seed)
    mask = wide[..., offset : offset + 70]
    for view in (mask, mask.contiguous().mT.contiguous().mT):
        output = attend(query, key, value, attn_mask=view, backend=backend)
        expected = attend(query, key, value, attn_mask=mask.contiguous(), backend=backend)
        assert torch.equal(output, expected)


def test_attention_is_deterministic(backend, device, seed):
    """Two runs, bitwise the same, without asking for it; ``deterministic=True`` that is not: flash-attention#2244."""

    def run():
        leaves = attention_inputs(2, 4, 97, 70, 16, kv_heads=2, dtype=torch.bfloat16, device=device, seed=seed)
        leaves = [t.requires_grad_() for t in leaves]
        results = attend(*leaves, need_weights=True, return_lse=True, backend=backend)
        return *results, *torch.autograd.grad([r.sum() for r in results], leaves)

    for first, second in zip(run(), run()):
        assert torch.equal(first, second)


def test_attention_leaves_its_inputs_alone(backend, device, seed):
    query, key, value = attention_inputs(2, 2, 33, 70, 16, device=device, seed=seed)
    mask = attention_mask(2, 2, 33, 70, dtype=torch.float32, device=device, seed=seed)
    copies = [t.clone() for t in (query, key, value, mask)]
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    results = attend(*leaves, attn_mask=mask, need_weights=True, return_lse=True, backend=backend)
    torch.autograd.grad([r.nan_to_num(neginf=0).sum() for r in results], leaves)
    for before, after in zip(copies, (query, key, value, mask)):
        assert torch.equal(before, after)


@pytest.mark.parametrize("layout", ["heads_inside", "feature_map"])
def test_attention_output_lies_as_the_query_does(layout, backend, device, seed):
    """So that merging the heads of a [B, L, H, D] view, or the rows of a feature map, copies nothing."""
    if backend == "torch":
        pytest.skip("F.scaled_dot_product_attention chooses the layout of its output itself")
    query, key, value = attention_inputs(2, 3, 33, 33, 16, device=device, layout=layout, seed=seed)
    output = attend(query, key, value, backend=backend)
    order = sorted(range(4), key=lambda axis: -query.stride(axis))
    assert output.permute(order).is_contiguous()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 12 GiB: tensors of more than 2^31 elements")
@pytest.mark.parametrize("what", ["key", "mask"])
def test_attention_offsets_above_two_to_the_31(what, backend, device, seed):
    """Element offsets beyond int32 (pytorch#190857): the last batch entry has to be read where it is."""
    batch, length = 2, 128
    query, key, value = attention_inputs(batch, 1, length, length, 64, dtype=torch.float16, device=device, seed=seed)
    arguments, far = {}, 2**31 + 64
    if what == "key":
        storage = torch.empty(far + key[0].numel(), dtype=torch.float16, device=device)
        distant = storage.as_strided(key.shape, (far, key.stride(1), key.stride(2), 1))
        distant.copy_(key)
    else:
        mask = attention_mask(batch, 1, length, length, device=device, seed=seed)
        storage = torch.empty(far + mask[0].numel(), dtype=torch.bool, device=device)
        distant = storage.as_strided(mask.shape, (far, mask.stride(1), mask.stride(2), 1))
        distant.copy_(mask)
        arguments = {"attn_mask": distant}
    expected = attend(query, key, value, **({"attn_mask": distant.contiguous()} if arguments else {}), backend=backend)
    output = attend(query, distant if what == "key" else key, value, **arguments, backend=backend)
    assert torch.equal(output, expected)


def kernels():
    """Every @triton.jit kernel of the package, by name."""
    from triton.runtime import JITFunction

    from fastattn.ops import _triton_launch

    found = {}
    for launcher in vars(_triton_launch).values():
        module = inspect.getmodule(launcher)
        if module is not None and module.__name__.startswith("fastattn_kernels."):
            found.update({n: k for n, k in vars(module).items() if isinstance(k, JITFunction)})
    return found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the interpreter compiles nothing")
def test_attention_run_time_values_do_not_recompile(device, seed):
    """Lengths, strides and scale are run-time values: a new shape must not compile anew (flash-attention#2635)."""

    def run(seqlen_q, seqlen_k, scale, layout):
        leaves = attention_inputs(1, 2, seqlen_q, seqlen_k, 64, dtype=torch.float16, device=device, layout=layout)
        leaves = [t.requires_grad_() for t in leaves]
        output = attend(*leaves, scale=scale, is_causal=True, backend="triton")
        torch.autograd.grad(output, leaves, torch.ones_like(output))

    def compiled():
        return sum(len(cache[0]) for kernel in kernels().values() for cache in kernel.device_caches.values())

    for warm_up in (96, 97):  # Triton itself tells multiples of 16 apart
        for other in (160, 161):
            run(warm_up, other, 0.5, "dense")
            run(warm_up, other, 0.5, "heads_inside")
    before = compiled()
    assert before > 0
    for seqlen_q, seqlen_k in ((101, 163), (112, 176), (333, 97), (64, 512)):
        run(seqlen_q, seqlen_k, 0.3, "dense")
        run(seqlen_q, seqlen_k, 0.7, "heads_inside")
    assert compiled() == before
