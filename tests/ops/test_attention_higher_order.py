"""vmap, forward mode and second derivatives: exact where they work, never silently wrong."""

from typing import Any

import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fastattn.ops.attention import cutting
from fastattn.ops.attention.call import make_call
from fastattn.reference import attention as reference
from fastattn.testing import attention_inputs, attention_mask, key_padding_mask, random_tensor
from tests.ops.attention_cases import attend

B, H, L, S, D = 2, 2, 4, 5, 3


def inputs(dtype, device, **options):
    return attention_inputs(B, H, L, S, D, dtype=dtype, device=device, seed=1, **options)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------- float64, by differences

CALLS: dict[str, dict[str, Any]] = {
    "output": {},
    "output_causal": {"is_causal": True},
    "plain": {"return_lse": True},
    "causal": {"is_causal": True, "return_lse": True},
    "average": {"need_weights": True},
    "heads": {"need_weights": True, "average_attn_weights": False, "return_lse": True},
    "rules": {
        "window": (0, 1),
        "causal_alignment": "bottom_right",
        "prefix": 1,
        "document_ids": (torch.tensor([[0, 1]]), torch.tensor([[1, 0, 1]])),
        "softcap": 1.5,
        "need_weights": True,
        "return_lse": True,
    },
}
# What else has a gradient.
LEAVES = {
    "attn_mask": (1, 1, 2, 3),
    "alibi_slopes": (1, 2),
    "sinks": (2,),
}


def float64_function(name, device, more):
    leaves = [*attention_inputs(1, 2, 2, 3, 2, dtype=torch.float64, device=device, seed=1)]
    names = LEAVES if more else ()
    leaves += [random_tensor(*LEAVES[n], seed=5 + i, dtype=torch.float64, device=device) for i, n in enumerate(names)]
    arguments = dict(CALLS[name])
    if "document_ids" in arguments:
        arguments["document_ids"] = tuple(t.to(device) for t in arguments["document_ids"])

    def function(query, key, value, *others):
        return attend(query, key, value, **dict(zip(names, others)), **arguments, backend="torch")

    return function, tuple(t.requires_grad_() for t in leaves)


def skip_sdpa_on_gpus(name, more, device):
    if name.startswith("output") and not more and device.type != "cpu":
        pytest.skip("F.scaled_dot_product_attention has no double backward or forward mode on GPUs")


@pytest.mark.parametrize("more", [False, True], ids=["", "bias_slopes_sinks"])
@pytest.mark.parametrize("name", CALLS)
def test_attention_gradcheck(name, more, device):
    skip_sdpa_on_gpus(name, more, device)
    function, leaves = float64_function(name, device, more)
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("more", [False, True], ids=["", "bias_slopes_sinks"])
@pytest.mark.parametrize("name", CALLS)
def test_attention_gradgradcheck(name, more, device):
    skip_sdpa_on_gpus(name, more, device)
    function, leaves = float64_function(name, device, more)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_attention_third_derivatives_gradcheck(device):
    function, leaves = float64_function("rules", device, True)

    def second(*tensors):
        first = torch.autograd.grad([t.square().sum() for t in function(*tensors)], tensors, create_graph=True)
        return torch.autograd.grad([t.square().sum() for t in first], tensors, create_graph=True)

    assert torch.autograd.gradcheck(second, leaves, fast_mode=True)


@pytest.mark.parametrize("derived", [False, True], ids=["self_attention", "derived"])
def test_plain_outputs_second_derivatives_of_one_tensor(derived, device):
    """Keys and values that are the queries, or are made from them: no gradient is counted twice."""
    skip_sdpa_on_gpus("output", False, device)
    (query,) = attention_inputs(1, 2, 3, 3, 2, dtype=torch.float64, device=device, seed=1)[:1]

    def function(x):
        return attend(x, 2 * x, x.sin(), backend="torch") if derived else attend(x, x, x, backend="torch")

    assert torch.autograd.gradgradcheck(function, query.requires_grad_(), fast_mode=True)


def test_plain_output_second_derivatives_through_checkpointing(device):
    """Checkpointing unpacks what was saved once a backward pass, and the hook has to unpack it as well."""
    skip_sdpa_on_gpus("output", False, device)
    leaves = [t.requires_grad_() for t in attention_inputs(1, 2, 3, 3, 2, dtype=torch.float64, device=device, seed=1)]

    def function(*qkv):
        def run(*tensors):
            return attend(*(2 * t for t in tensors), backend="torch")

        return checkpoint(run, *qkv, use_reentrant=False)

    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


# ------------------------------------------------------------------------------------------------------------ in blocks


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


BLOCKED: dict[str, dict[str, Any]] = {
    "prefix": {"is_causal": True, "prefix": 2, "softcap": 1.5},
    "window": {"window": (5, 3), "causal_alignment": "bottom_right"},
}


@pytest.mark.parametrize("name", BLOCKED)
def test_attention_derivatives_in_blocks(name, device, monkeypatch):
    """All that is beyond the first order is exact over many blocks, and needs the memory of a few."""
    batch, heads, length, keys, block = 2, 2, 16, 128, 1024
    monkeypatch.setattr(cutting, "BLOCK_ELEMENTS", block)
    leaves = attention_inputs(batch, heads, length, keys, 4, dtype=torch.float64, device=device, seed=1)
    leaves += tuple(random_tensor(heads, seed=i, dtype=torch.float64, device=device) for i in (2, 3))
    tangents = [random_tensor(*t.shape, seed=10 + i, dtype=t.dtype, device=device) for i, t in enumerate(leaves)]
    arguments = BLOCKED[name]

    def ours(query, key, value, slopes, sinks):
        more = {**arguments, "alibi_slopes": slopes, "sinks": sinks, "return_lse": True}
        return attend(query, key, value, **more, backend="torch")

    def truth(query, key, value, slopes, sinks):
        call = make_call(query, key, value, **arguments, alibi_slopes=slopes, sinks=sinks)
        rules = {n: getattr(call, n) for n in ("alibi_slopes", "sinks", "prefix", "lower", "upper", "shift", "softcap")}
        found = reference(query, key, value, **rules)
        return found.output, found.lse

    def derivatives(function):
        def gradient(*tensors):
            return grad(lambda *t: sum(r.square().sum() for r in function(*t)), argnums=(0, 1, 2, 3, 4))(*tensors)

        first = jvp(function, leaves, tuple(tangents))[1]
        forward_over_reverse = jvp(gradient, leaves, tuple(tangents))[1]
        tensors = [t.detach().requires_grad_() for t in leaves]
        return *first, *forward_over_reverse, *second_order(function, tensors)

    with LargestTensor() as largest:
        found = derivatives(ours)
    for actual, expected in zip(found, derivatives(truth)):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert largest.elements <= 2 * block <= batch * heads * length * keys / 4


# ------------------------------------------------------------------------------------ float32, against the reference


def both(arguments):
    """fastattn and the reference with the same masks, output and LSE."""
    mask, padding = arguments.get("attn_mask"), arguments.get("key_padding_mask")

    def ours(backend):
        return lambda *qkv: attend(*qkv, **arguments, return_lse=True, backend=backend)

    def truth(query, key, value):
        found = reference(
            query,
            key,
            value,
            mask=mask,
            key_padding_mask=padding,
            upper=0 if arguments.get("is_causal") else None,
        )
        return found.output, found.lse

    return ours, truth


def masks(device):
    return {
        "attn_mask": attention_mask(B, H, L, S, broadcast="head", device=device, seed=2),
        "key_padding_mask": key_padding_mask(B, S, minimum=2, device=device, seed=3),
        "is_causal": True,
    }


def second_order(function, leaves):
    """Gradients of the squared norm of the gradients: every second derivative of attention takes part."""
    results = function(*leaves)
    d_results = [random_tensor(*r.shape, seed=i, dtype=r.dtype, device=r.device) for i, r in enumerate(results)]
    seen = torch.stack([torch.where(r.isfinite(), r, 0).mul(d).sum() for r, d in zip(results, d_results)])
    first = torch.autograd.grad(seen.sum(), leaves, create_graph=True)
    return torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_attention_double_backward_matches_reference(masked, backend, device):
    """Nobody else's fused attention has one; PyTorch's silently has none but in its math path (pytorch#116350)."""
    ours, truth = both(masks(device) if masked else {})
    leaves = [t.requires_grad_() for t in inputs(torch.float32, device)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    actual = second_order(ours(backend), leaves)
    for found, wanted in zip(actual, second_order(truth, exact)):
        assert wanted.abs().max() > 1e-3
        assert_close(found.double(), wanted)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_attention_jvp_matches_reference(masked, backend, device):
    ours, truth = both(masks(device) if masked else {})
    primals = inputs(torch.float32, device)
    tangents = tuple(random_tensor(*p.shape, seed=7 + i, device=device) for i, p in enumerate(primals))
    values, derivatives, *_ = jvp(ours(backend), primals, tangents)
    exact = jvp(truth, tuple(p.double() for p in primals), tuple(t.double() for t in tangents))
    for found, wanted in zip((*values, *derivatives), (*exact[0], *exact[1])):
        visible = wanted.isfinite()
        assert_close(found.double()[visible], wanted[visible])
    assert derivatives[0].any()


# ---------------------------------------------------------------------------------------------------------------- vmap


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (2, None, 0), (None, 1, 1), (0, None, None)], ids=str)
def test_attention_vmap_is_a_loop(in_dims, backend, device):
    samples = 3

    def stacked(tensor, dim):
        return tensor if dim is None else torch.stack([tensor * (i + 1) for i in range(samples)], dim)

    tensors = [stacked(t, d) for t, d in zip(inputs(torch.float32, device), in_dims)]

    def function(*qkv):
        return attend(*qkv, is_causal=True, need_weights=True, return_lse=True, backend=backend)

    found = vmap(function, in_dims=in_dims)(*tensors)
    loop = [function(*(t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims))) for i in range(samples)]
    for batched, single in zip(found, zip(*loop)):
        assert_close(batched, torch.stack(single))


@pytest.mark.parametrize("what", ["mask", "padding"])
def test_attention_vmap_over_masks(what, backend, device):
    samples, qkv = 3, inputs(torch.float32, device)
    if what == "mask":
        many = torch.stack([attention_mask(B, H, L, S, broadcast="batch_head", seed=i) for i in range(samples)])
    else:
        many = torch.stack([key_padding_mask(B, S, seed=i) for i in range(samples)])
    many = many.to(device)

    def function(mask):
        argument = {"attn_mask" if what == "mask" else "key_padding_mask": mask}
        return attend(*qkv, **argument, return_lse=True, backend=backend)

    for batched, single in zip(vmap(function)(many), zip(*(function(m) for m in many))):
        assert_close(batched, torch.stack(single))


@pytest.mark.parametrize("weights", [False, True], ids=["output", "weights"])
def test_attention_per_sample_gradients(weights, backend, device):
    """vmap of grad, as differential privacy needs it (pytorch#176265)."""
    query, key, value = inputs(torch.float32, device)
    queries = torch.stack([query * (i + 1) for i in range(3)])

    def loss(query, key, value):
        found = attend(query, key, value, need_weights=weights, return_lse=True, backend=backend)
        return sum(t.square().sum() for t in found)

    found = vmap(grad(loss, argnums=(0, 1, 2)), in_dims=(0, None, None))(queries, key, value)
    loop = [grad(loss, argnums=(0, 1, 2))(q, key, value) for q in queries]
    for batched, single in zip(found, zip(*loop)):
        assert_close(batched, torch.stack(single))


RULES: dict[str, Any] = {"is_causal": True, "causal_alignment": "bottom_right", "window": (2, None), "softcap": 2.0}


def of_samples(what, device):
    """Three samples of one argument."""
    return {
        "attn_mask": random_tensor(3, 1, 1, L, S, seed=4, device=device),
        "alibi_slopes": random_tensor(3, B, H, seed=5, device=device),
        "sinks": random_tensor(3, H, seed=6, device=device),
        "prefix": torch.tensor([[0, 1], [1, 2], [2, 0]], device=device),
        "query_documents": random_tensor(3, 1, L, seed=7, device=device).gt(0).int(),
    }[what]


def with_argument(what, backend, device):
    """A call as a function of one argument."""
    qkv = inputs(torch.float32, device)
    keys = torch.tensor([[0, 1, 0, 1, 1]], device=device)

    def function(tensor, query=qkv[0]):
        argument = {"document_ids": (tensor, keys)} if what == "query_documents" else {what: tensor}
        return attend(query, *qkv[1:], **RULES, **argument, return_lse=True, backend=backend)

    return function


@pytest.mark.parametrize("what", ["alibi_slopes", "sinks", "prefix", "query_documents"])
def test_attention_vmap_over_rules(what, backend, device):
    function, samples = with_argument(what, backend, device), of_samples(what, device)
    for batched, single in zip(vmap(function)(samples), zip(*(function(t) for t in samples))):
        assert_close(batched, torch.stack(single))


@pytest.mark.parametrize("what", ["attn_mask", "alibi_slopes", "sinks"])
def test_attention_per_sample_gradients_of_what_is_added(what, backend, device):
    """With one tensor a sample, and with one for all samples of another input."""
    function, samples = with_argument(what, backend, device), of_samples(what, device)
    queries = torch.stack([inputs(torch.float32, device)[0] * (i + 1) for i in range(3)])

    def loss(tensor, *query):
        return sum(torch.where(t.isfinite(), t, 0).square().sum() for t in function(tensor, *query))

    assert_close(vmap(grad(loss))(samples), torch.stack([grad(loss)(t) for t in samples]))
    shared = vmap(grad(loss), in_dims=(None, 0))(samples[0], queries)
    assert_close(shared, torch.stack([grad(loss)(samples[0], q) for q in queries]))


def test_gradients_taken_inside_a_checkpoint_are_differentiable(backend, device):
    """The operator's own backward read what it had saved twice, which checkpointing forbids."""
    leaves = [t.requires_grad_() for t in inputs(torch.float32, device)]

    def first(query, key, value):
        output, _ = attend(query, key, value, is_causal=True, return_lse=True, backend=backend)[:2]
        return torch.autograd.grad(output.sin().sum(), [query, key], create_graph=True)

    def second(gradients):
        return torch.autograd.grad([g.square().sum() for g in gradients], leaves)

    expected = second(first(*leaves))
    for found, truth in zip(second(checkpoint(first, *leaves, use_reentrant=False)), expected):
        assert torch.equal(found, truth)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4)], ids=["no_batch", "no_rows"])
def test_tangents_of_empty_results_have_their_dtypes(shape, backend, device):
    """There was no block to take the dtype from, and tangents of 16-bit results were float32."""
    query = torch.zeros(shape, dtype=torch.bfloat16, device=device)

    def function(query):
        return attend(query, query, query, need_weights=True, return_lse=True, backend=backend)

    tangents = jvp(function, (query,), (query,))[1]
    assert [t.dtype for t in tangents] == [t.dtype for t in function(query)]
    assert [t.dtype for t in tangents] == [torch.bfloat16, torch.bfloat16, torch.float32]
