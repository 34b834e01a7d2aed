"""Faults that other attention kernels had, each told in its docstring, so that these do not have them."""

import inspect
import math
from typing import Any

import pytest
import torch

import fastattn
from fastattn.ops.attention import cutting
from fastattn.reference import attention as reference
from fastattn.testing import (
    alibi_slopes,
    assert_within_budget,
    attention_inputs,
    attention_mask,
    attention_sinks,
    document_ids,
    random_tensor,
)
from tests.ops.attention_cases import attend

pytestmark = pytest.mark.usefixtures("poisoned")


def check(query, key, value, backend, bias):
    """Output, LSE and gradients, those of the additive mask among them, against the reference."""
    d_output = random_tensor(*query.shape[:3], value.shape[3], seed=99, dtype=query.dtype, device=query.device)

    def run(attend, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (query, key, value, bias)]
        output, lse = attend(*leaves)
        return (output, lse, *torch.autograd.grad(output, leaves, d_output.to(dtype)))

    def ours(query, key, value, bias):
        return attend(query, key, value, attn_mask=bias, return_lse=True, backend=backend)

    def plain(query, key, value, bias):
        found = reference(query, key, value, bias=bias)
        return found.output, found.lse

    actual, truth, peer = run(ours, query.dtype), run(plain, torch.float64), run(plain, query.dtype)
    # A score is an exponent: its rounding, a unit of its own size, is a relative error of the weight. Where one query
    # gives a key most of its gradient there is no average over queries, and the peer may be lucky.
    exact = reference(*(t.double() for t in (query, key, value)), bias=bias.double())
    scores = (exact.weights.log() + exact.lse[..., None]).nan_to_num(neginf=0.0)
    rounded = exact.weights * scores.abs() * 2.0**-24 * math.log2(math.e)
    d_weights = d_output.double() @ value.double().mT
    d_scores = d_weights - (d_output.double() * exact.output).sum(dim=3, keepdim=True)
    allowances = {
        "d_value": (rounded.mT @ d_output.double().abs()).max().item(),
        "d_bias": (rounded * d_scores.abs()).sum_to_size(bias.shape).max().item(),
    }
    names = ("output", "lse", "d_query", "d_key", "d_value", "d_bias")
    for name, found, wanted, eager in zip(names, actual, truth, peer):
        assert_within_budget(found, truth=wanted, peer=eager, name=name, allowance=allowances.get(name, 0.0))


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


DETERMINISM: dict[str, dict[str, Any]] = {
    "documents_alibi_and_a_bias_of_keys": {"documents": True, "alibi": True, "bias": (None, 1, 1, None)},
    "window_softcap_and_a_bias_of_heads": {"window": (30, 4), "softcap": 5.0, "bias": (1, None, None, None)},
}


@pytest.mark.parametrize("strict", [False, True], ids=["default", "use_deterministic_algorithms"])
@pytest.mark.parametrize("name", DETERMINISM)
def test_attention_is_deterministic(name, strict, backend, device, seed, monkeypatch):
    """Fifty runs, bitwise the same, without asking for it; ``deterministic=True`` that is not: flash-attention#2244.

    Everything that is added up over programs or blocks at once: dK and dV over the heads of a group, and the gradients
    of the bias, the slopes and the sinks.
    """
    runs, batch, heads, length, keys = 50, 2, 4, 700, 1000
    if device.type == "cpu":
        # so small that the interpreter can run it a few times, and yet with lists of tiles
        batch, heads, length, keys = 1, 2, 70, 40
        if backend == "triton":
            from fastattn_kernels.common import tile_map

            monkeypatch.setattr(tile_map, "FEWEST_GRANULES", 1)
        # on a CPU one program runs after another, and the blocks of the torch backend do
        runs = 3 if strict or name != next(iter(DETERMINISM)) else 10
    chosen = dict(DETERMINISM[name])
    drawn = attention_inputs(
        batch, heads, length, keys, 16, kv_heads=heads // 2, dtype=torch.bfloat16, device=device, seed=seed
    )
    leaves = dict(zip(("query", "key", "value"), drawn), sinks=attention_sinks(heads, device=device))
    shape = [own or size for own, size in zip(chosen.pop("bias"), (batch, heads, length, keys))]
    leaves["attn_mask"] = random_tensor(*shape, seed=seed, device=device)
    if chosen.pop("alibi", False):
        leaves["alibi_slopes"] = alibi_slopes(heads, device=device)
    if chosen.pop("documents", False):
        ids = (document_ids(batch, n, longest=50, device=device, seed=seed) for n in (length, keys))
        chosen["document_ids"] = tuple(ids)

    def run():
        own = {name: t.detach().requires_grad_() for name, t in leaves.items()}
        results = attend(**own, **chosen, return_lse=True, backend=backend)
        return *results, *torch.autograd.grad([r.nan_to_num(neginf=0).sum() for r in results], list(own.values()))

    torch.use_deterministic_algorithms(strict)
    try:
        first = run()
        for _ in range(runs - 1):
            assert all(map(torch.equal, run(), first))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", [(1, 2, 33, 70), (2, 1, 33, 70), (33, 70), (1, 2, 1, 70), (70,)], ids=str)
def test_attention_grad_of_a_bias_is_there_in_its_shape(shape, backend, device, seed):
    """A learned bias without a gradient, or with none where it broadcasts (flash-attention#342, #1219, pytorch#145208).

    In the forward it broadcasts, so in the backward it is summed: to its own shape, every axis.
    """
    query, key, value = attention_inputs(2, 2, 33, 70, 16, device=device, seed=seed)
    check(query, key, value, backend, random_tensor(*shape, seed=seed + 1, device=device))


def test_attention_grad_reaches_a_table_of_relative_positions(backend, device, seed):
    """Biases gathered from a learned table, as T5's: what FlexAttention could not differentiate (pytorch#145208)."""
    query, key, value = attention_inputs(2, 2, 33, 70, 16, device=device, seed=seed)
    table = random_tensor(2, 33 + 70, seed=seed + 1, device=device)
    place = torch.arange(33, device=device)[:, None] - torch.arange(70, device=device) + 69
    d_output = random_tensor(2, 2, 33, 16, seed=seed + 2, device=device)

    def gradient(dtype, own):
        leaf = table.to(dtype).requires_grad_()
        qkv = [t.to(dtype) for t in (query, key, value)]
        bias = leaf[None, :, place]
        output = attend(*qkv, attn_mask=bias, backend=backend) if own else reference(*qkv, bias=bias).output
        return torch.autograd.grad(output, leaf, d_output.to(dtype))[0]

    assert_within_budget(
        gradient(torch.float32, True),
        truth=gradient(torch.float64, False),
        peer=gradient(torch.float32, False),
        name="d_table",
    )


@pytest.mark.parametrize("bias", [False, True], ids=["alone", "with_a_bias"])
def test_attention_grad_of_sinks_is_there(bias, backend, device, seed):
    """Learnable sinks whose gradient was never computed (flash-attention#1973): a column of scores without a value."""
    query, key, value = attention_inputs(2, 2, 33, 70, 16, device=device, seed=seed)
    sinks = attention_sinks(2, device=device, seed=seed)
    added = random_tensor(1, 2, 33, 70, seed=seed + 1, device=device) if bias else torch.zeros(1, device=device)
    d_output = random_tensor(2, 2, 33, 16, seed=seed + 2, device=device)

    def column(query, key, value, sinks):
        """The sink as a key that is zero, with the sink for a bias and a value of zero."""
        key, value = (torch.nn.functional.pad(t, (0, 0, 1, 0)) for t in (key, value))
        extra = sinks[None, :, None, None].expand(1, 2, 33, 1)
        return attend(
            query, key, value, attn_mask=torch.cat([extra, added.expand(1, 2, 33, 70)], dim=3), backend=backend
        )

    def own(query, key, value, sinks):
        return attend(query, key, value, sinks=sinks, attn_mask=added if bias else None, backend=backend)

    found, expected = (
        (output := function(*(leaves := [t.detach().requires_grad_() for t in (query, key, value, sinks)])),
         *torch.autograd.grad(output, leaves, d_output))
        for function in (own, column)
    )  # fmt: skip
    for actual, wanted in zip(found, expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_attention_grad_of_tiles_that_a_mask_spells(backend, device, seed):
    """A block-sparse mask that spells causality is ``is_causal``, in the gradients too (flash-attention#2623).

    Its forward was exact while its backward visited other tiles than the map said, silently, at head size 64.
    """
    qkv = attention_inputs(1, 2, 197, 197, 64, kv_heads=1, device=device, seed=seed)
    d_output = random_tensor(1, 2, 197, 64, seed=seed + 1, device=device)
    causal = torch.ones(197, 197, dtype=torch.bool, device=device).tril()

    def run(**arguments):
        leaves = [t.detach().requires_grad_() for t in qkv]
        output = attend(*leaves, **arguments, backend=backend)
        return output, *torch.autograd.grad(output, leaves, d_output)

    for spelled, ruled in zip(run(attn_mask=causal), run(is_causal=True)):
        torch.testing.assert_close(spelled, ruled, rtol=1e-5, atol=1e-5)


def test_attention_masks_of_every_kind_combine(backend, device, seed):
    """Arbitrary and padding masks, refused or ignored by others (flash-attention#352, #1179, #1898, #17), all at once:
    what each kind says is what one boolean mask of them all says."""
    qkv = attention_inputs(2, 2, 33, 70, 16, device=device, seed=seed)
    d_output = random_tensor(2, 2, 33, 16, seed=seed + 1, device=device)
    mask = attention_mask(2, 2, 33, 70, device=device, seed=seed)
    padding = torch.arange(70, device=device) >= torch.tensor([[61], [55]], device=device)
    rows, keys = torch.arange(33, device=device)[:, None], torch.arange(70, device=device)
    ids = tuple(document_ids(2, n, shortest=15, longest=30, device=device, seed=seed) for n in (33, 70))
    near = (keys <= rows + 37 + 2) & (keys >= rows + 37 - 20) | (keys < 9)
    together = mask & ~padding[:, None, None] & near & (ids[0][:, None, :, None] == ids[1][:, None, None])
    assert together.any()

    def run(**arguments):
        leaves = [t.detach().requires_grad_() for t in qkv]
        output = attend(*leaves, **arguments, backend=backend)
        return output, *torch.autograd.grad(output, leaves, d_output)

    apart = run(
        attn_mask=mask, key_padding_mask=padding, document_ids=ids, window=(20, 2), prefix=9,
        causal_alignment="bottom_right",
    )  # fmt: skip
    for found, expected in zip(apart, run(attn_mask=together)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["expanded", "transposed", "sliced"])
def test_attention_grad_of_output_gradients_that_lie_apart(how, backend, device, seed):
    """An output's gradient that is not contiguous was read as if it were (flash-attention#355)."""
    leaves = [t.requires_grad_() for t in attention_inputs(2, 2, 33, 70, 16, device=device, seed=seed)]
    output = attend(*leaves, backend=backend)
    d_output = {
        "expanded": torch.ones((), device=device).expand(2, 2, 33, 16),
        "transposed": random_tensor(16, 33, 2, 2, seed=seed, device=device).permute(2, 3, 1, 0),
        "sliced": random_tensor(2, 2, 33, 33, seed=seed, device=device)[..., 1::2],
    }[how]
    found = torch.autograd.grad(output, leaves, d_output, retain_graph=True)
    for actual, expected in zip(found, torch.autograd.grad(output, leaves, d_output.contiguous())):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_attention_grad_of_inputs_of_a_thousand(backend, device):
    """Constant inputs of 1000 gave NaN gradients in float32 (pytorch#125674): rows whose scores are all alike attend
    evenly, and scores have no gradient. (The LSE is asked for because the torch backend then computes itself: on CPUs
    ``F.scaled_dot_product_attention`` is 8 % off here, its float32 LSE of 8e6 being too coarse.)"""
    leaves = [torch.full((1, 2, 50, 64), 1000.0, device=device, requires_grad=True) for _ in range(3)]
    output, _ = attend(*leaves, return_lse=True, backend=backend)
    torch.testing.assert_close(output, leaves[2].detach(), rtol=1e-5, atol=0)
    d_query, d_key, d_value = torch.autograd.grad(output, leaves, torch.ones_like(output))
    torch.testing.assert_close(d_value, torch.ones_like(d_value), rtol=1e-5, atol=0)
    # of the scores' gradient, 64e3 - 64e3, float32 leaves an ulp, and the products with keys of 1000 enlarge it
    ulp = 64e3 * torch.finfo(torch.float32).eps
    for gradient in (d_query, d_key):
        assert gradient.abs().max() <= 4 * ulp * 1000 / math.sqrt(64) * 2


def test_attention_averaged_weights_need_no_memory_per_head(backend, device, seed, monkeypatch):
    """Weights that are averaged over heads, at the price of all heads' (pytorch#98505, RT-DETR#680): nothing of their
    size is allocated, neither in the forward nor in the backward."""
    if device.type != "cpu":
        pytest.skip("counts the allocations of CPU tensors; the same code runs on a GPU")
    for bound in ("BLOCK_ELEMENTS", "AT_WORK"):
        monkeypatch.setattr(cutting, bound, 64 * 64)
    leaves = attention_inputs(1, 8, 64, 64, 8, device=device, seed=seed)
    leaves = [t.requires_grad_() for t in leaves]
    with torch.profiler.profile(profile_memory=True) as profile:
        results = attend(*leaves, need_weights=True, return_lse=True, backend=backend)
        torch.autograd.grad([r.sum() for r in results], leaves)
    trace: Any = profile.profiler
    largest = max(e.nbytes() for e in trace.kineto_results.events() if e.name() == "[memory]")
    assert 64 * 64 * 4 <= largest < 8 * 64 * 64 * 4 / 2  # the averaged weights themselves, and far from all heads'


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

    from fastattn.ops.attention import launch

    found = {}
    for launcher in vars(launch).values():
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


def test_attention_jacobian_of_a_gradient(backend, device, seed):
    """The batched pullback of a gradient: vmap expanded the statistics, which one batch entry's samples share, and the
    kernels read past them, as if they were contiguous. All samples but the first were wrong, without a word."""
    query, key, value = attention_inputs(1, 2, 3, 5, 4, device=device, seed=seed)

    def scalar(query):
        return attend(query, key, value, backend=backend).square().sum()

    pullback = torch.func.vjp(torch.func.grad(scalar), query)[1]
    directions = random_tensor(3, *query.shape, seed=seed, device=device)
    together = torch.func.vmap(pullback)(directions)[0]
    one_by_one = torch.stack([pullback(direction)[0] for direction in directions])
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_attention_window_wider_than_any_integer_hides_nothing(backend):
    """Some say "no limit" with 2**63 - 1, and some with a power of ten."""
    query, key, value = (random_tensor(1, 2, 5, 8, seed=i) for i in range(3))
    held: Any = {"cache_seqlens": 5, "is_causal": False}
    expected = fastattn.attention(query, key, value, backend=backend)
    for wide in (2**63 - 1, 10**30):
        for window in ((wide, wide), (None, wide), (wide, None)):
            of_both: Any = {"window": window, "backend": backend}
            found = fastattn.attention(query, key, value, causal_alignment="bottom_right", **of_both)
            torch.testing.assert_close(found, expected)
            cached = fastattn.attention_with_kvcache(query, key, value, **held, **of_both)
            torch.testing.assert_close(cached, expected)
