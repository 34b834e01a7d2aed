"""The operators under opcheck, torch.compile, torch.export, autocast and activation checkpointing."""

import shutil
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.ops.attention import operator
from fastattn.ops.attention.call import make_call
from fastattn.testing import attention_inputs, attention_mask, key_padding_mask, random_tensor
from fastattn_kernels.attention import backward, backward_dkdv
from fastattn_kernels.common.arguments import WeightsShare
from tests.ops.attention_cases import attend, dropout_state

B, H, L, S, D = 2, 2, 5, 7, 8

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal_bottom_right_lse": {"is_causal": True, "causal_alignment": "bottom_right", "return_lse": True},
    "masks_average": {"masks": "bool", "need_weights": True},
    "bias_heads_lse": {"masks": "bias", "need_weights": True, "average_attn_weights": False, "return_lse": True},
    "gqa_feature_map": {"kv_heads": 1, "layout": "feature_map", "return_lse": True},
    "dropout": {"dropout_p": 0.5, "return_lse": True},
    "window_prefix": {"window": (2, 1), "prefix": 1, "causal_alignment": "bottom_right"},
    "documents_softcap": {"documents": True, "softcap": 2.0, "need_weights": True},
    "slopes_sinks": {"added": True, "is_causal": True, "return_lse": True},
}


def make_arguments(name, device):
    """Leaves (query, key, value, and slopes and sinks where they are ``added``) and keyword arguments of a call."""
    arguments = dict(CALLS[name])
    layout, kv_heads = arguments.pop("layout", "dense"), arguments.pop("kv_heads", H)
    leaves = attention_inputs(B, H, L, S, D, kv_heads=kv_heads, device=device, layout=layout, seed=1)
    if arguments.pop("added", False):
        leaves += tuple(random_tensor(H, seed=i, device=device) for i in (4, 5))
    if arguments.pop("documents", False):
        arguments["document_ids"] = tuple(torch.arange(n, device=device).div(4).int()[None] for n in (L, S))
    masks = arguments.pop("masks", None)
    if masks:
        dtype = torch.bool if masks == "bool" else torch.float32
        arguments["attn_mask"] = attention_mask(B, H, L, S, dtype=dtype, broadcast="head", device=device, seed=2)
        arguments["key_padding_mask"] = key_padding_mask(B, S, device=device, seed=3)
    return [t.requires_grad_() for t in leaves], arguments


def call_with(leaves, arguments, backend):
    """The call whose leaves these are."""
    added = dict(zip(("alibi_slopes", "sinks"), leaves[3:]))
    return attend(*leaves[:3], **added, **arguments, backend=backend)


def results_and_gradients(function, leaves):
    """What ``function`` returns, and the gradients of the leaves through all of it."""
    results = function(*leaves)
    results = (results,) if isinstance(results, torch.Tensor) else results
    cotangents = [random_tensor(*r.shape, seed=i, dtype=r.dtype, device=r.device) for i, r in enumerate(results)]
    return [*results, *torch.autograd.grad(results, leaves, cotangents)]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ opcheck


@pytest.mark.parametrize("name", CALLS)
def test_operators_pass_opcheck(name, backend, device):
    """Schema, fake implementation and autograd registration of both opaque operators, on real inputs."""
    leaves, arguments = make_arguments(name, device)
    leaves = [t.detach() for t in leaves]
    arguments |= dict(zip(("alibi_slopes", "sinks"), leaves[3:]))
    call = make_call(*leaves[:3], **arguments)
    torch.manual_seed(0)
    state = dropout_state(call, backend) if call.dropout_p else None
    inputs, options = operator.operands(call, state, backend)
    torch.library.opcheck(torch.ops.fastattn.attention_forward.default, (*inputs, *options))
    output, lse, weights, statistics = torch.ops.fastattn.attention_forward(*inputs, *options)
    needs = [*(t is not None for t in (call.bias, call.alibi_slopes, call.sinks)), True]
    d_weights = None if call.weights == "none" else torch.ones_like(weights)
    gradients = (torch.ones_like(output), torch.ones_like(lse), d_weights, output, statistics, *needs)
    torch.library.opcheck(torch.ops.fastattn.attention_backward.default, (*gradients, *inputs, *options))


def test_outputs_of_the_operators_alias_nothing(backend, device):
    leaves, _ = make_arguments("plain", device)
    call = make_call(*(t.detach() for t in leaves))
    found = operator.apply(call, None, backend)[0]
    assert found.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in leaves}


# ------------------------------------------------------------------------------------------------------ torch.compile

# aot_eager traces everything that inductor does; inductor itself takes seconds, so it has two cases.
COMPILED = [(name, "aot_eager", dynamic) for name in CALLS if name != "dropout" for dynamic in (False, True)]
COMPILED += [("plain", "eager", False), ("masks_average", "inductor", False), ("bias_heads_lse", "inductor", True)]


@pytest.mark.parametrize(("name", "compiler", "dynamic"), COMPILED)
def test_attention_compiles_without_graph_breaks(name, compiler, dynamic, backend, device):
    if compiler == "inductor" and shutil.which("gcc") is None and shutil.which("clang") is None:
        pytest.skip("inductor needs a C++ compiler: neither gcc nor clang is on the path")
    torch._dynamo.reset()
    leaves, arguments = make_arguments(name, device)

    def function(query, *others):
        found = call_with((query * 1.5, *others), arguments, backend)
        return (found * 2,) if isinstance(found, torch.Tensor) else tuple(t * 2 for t in found)

    compiled = torch.compile(function, backend=compiler, fullgraph=True, dynamic=dynamic)
    assert_same(results_and_gradients(compiled, leaves), results_and_gradients(function, leaves))


@pytest.mark.parametrize("how", ["dynamic", "mark_dynamic"])
def test_attention_compiled_for_dynamic_lengths_compiles_once(how, backend, device):
    """A new length must not compile anew (flash-attention#2635, pytorch#136196)."""
    torch._dynamo.reset()
    counter = CompileCounter()

    def rules(query, key, value, slopes, sinks, query_documents, key_documents):
        return attend(
            query,
            key,
            value,
            is_causal=True,
            causal_alignment="bottom_right",
            window=(4, None),
            prefix=2,
            document_ids=(query_documents, key_documents),
            alibi_slopes=slopes,
            softcap=3.0,
            sinks=sinks,
            return_lse=True,
            backend=backend,
        )

    function = torch.compile(rules, backend=counter, fullgraph=True, dynamic=True if how == "dynamic" else None)
    compiled = None
    for i in range(10):
        lengths = seqlen_q, seqlen_k = 5 + 3 * i, 40 - 2 * i
        tensors = [
            *attention_inputs(B, H, seqlen_q, seqlen_k, D, device=device),
            *(random_tensor(H, seed=n, device=device) for n in (4, 5)),
            *(torch.zeros(B, n, dtype=torch.int64, device=device) for n in lengths),
        ]
        if how == "mark_dynamic":
            for index, axis in ((0, 2), (1, 2), (2, 2), (5, 1), (6, 1)):
                torch._dynamo.mark_dynamic(tensors[index], axis)
        found = function(*tensors)
        if i % 4 == 0:
            assert_same(found, rules(*tensors))
        compiled = compiled or counter.frame_count
    assert counter.frame_count == compiled


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_attention_compiles_with_any_prefix(dynamic, backend, device):
    """Also one longer than there are keys, or than an int32; torch 2.11 did not trace torch.sym_min of two ints."""
    torch._dynamo.reset()
    inputs = attention_inputs(B, H, L, S, D, device=device)

    def function(prefix):
        return attend(*inputs, is_causal=True, prefix=prefix, backend=backend)

    compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=dynamic)
    for prefix in (0, 2, 3, S, 40, 2**31 - 1, 2**31, 2**40):
        assert_same([compiled(prefix)], [function(min(prefix, S))])


def test_attention_compiles_with_any_scale(backend, device):
    """A float of a dynamic graph is a symbol, which math.isfinite refused: there was no graph at all."""
    torch._dynamo.reset()
    inputs = attention_inputs(B, H, L, S, D, device=device)

    def function(scale):
        return attend(*inputs, scale=scale, backend=backend)

    compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=True)
    for scale in (0.3, 0.4, -0.5):
        assert_same([compiled(scale)], [function(scale)])


def test_attention_compiled_inside_use_backend_follows_it(device):
    torch._dynamo.reset()
    inputs = attention_inputs(B, H, L, S, D, device=device)
    function = torch.compile(lambda *t: attend(*t), backend="eager", fullgraph=True)
    for name in ("torch", "auto"):
        with fastattn.use_backend(name):
            assert_same([function(*inputs)], [attend(*inputs)])


def test_attention_compiled_with_dropout_draws_anew(backend, device):
    torch._dynamo.reset()
    inputs = attention_inputs(B, H, L, S, D, device=device)
    function = torch.compile(lambda *t: attend(*t, dropout_p=0.5, backend=backend), backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    assert not torch.equal(function(*inputs), function(*inputs))


class Returning(torch.nn.Module):
    """Attention that returns its averaged weights, whoever wants them."""

    def forward(self, query, key, value):
        return attend(query, key, value, is_causal=True, need_weights=True, backend="triton")


@pytest.fixture
def backward_passes(monkeypatch):
    """Of each launch of the plain backward: had it a gradient of weights, anything to do, and was it careful?"""
    found = []
    launch = backward.launch
    careful = {backward_dkdv._attention_bwd_dkdv_kernel: False, backward._attention_bwd_careful_kernel: True}

    def noting(kernel, grid, on, *arguments, only_if, **constants):
        if kernel in careful:
            d_weights = next((each for each in arguments if isinstance(each, WeightsShare)), None)
            is_on = only_if is None or bool(only_if.flag_ptr) == bool(only_if.expected)
            found.append((d_weights is not None, is_on, careful[kernel]))
        launch(kernel, grid, on, *arguments, only_if=only_if, **constants)

    for module in (backward, backward_dkdv):
        monkeypatch.setattr(module, "launch", noting)
    return found


def gradients_of(function, loss, device):
    leaves = [t.requires_grad_() for t in attention_inputs(B, H, 70, 90, D, device=device, seed=1)]
    return torch.autograd.grad(loss(*function(*leaves)), leaves)


def of_output(output, weights):
    return output.square().sum()


def of_both(output, weights):
    return output.square().sum() + weights.square().sum()


@pytest.mark.parametrize("loss_is_compiled", [False, True])
def test_compiled_backward_goes_without_the_gradient_of_weights_that_no_loss_uses(
    loss_is_compiled, device, backward_passes
):
    """The graph hands zeros to the backward: kernels that would add them find nothing to do, and what others wrote
    stays, to the last bit; Gluon's, which know no such gradient, could have been those. A graph that holds the loss
    too knows that it uses no weights, and launches what an eager call does."""
    pytest.importorskip("triton")
    torch._dynamo.reset()
    module = Returning()
    with fastattn.use_kernels("triton"):
        expected = gradients_of(module, of_output, device)
        assert backward_passes == [(False, True, False), (False, True, True)]
        backward_passes.clear()
        if loss_is_compiled:
            whole = torch.compile(lambda *t: (of_output(*module(*t)),), backend="aot_eager", fullgraph=True)
            found = gradients_of(whole, lambda loss: loss, device)
        else:
            found = gradients_of(torch.compile(module, backend="aot_eager", fullgraph=True), of_output, device)
    assert [(weights, careful) for weights, is_on, careful in backward_passes if is_on] == [
        (False, False),
        (False, True),
    ]
    off = [weights for weights, is_on, _ in backward_passes if not is_on]
    assert off == ([] if loss_is_compiled else [True, True])
    for ours, theirs in zip(found, expected):
        assert torch.equal(ours, theirs)


def test_compiled_backward_has_the_gradient_of_weights_that_a_loss_uses(device, backward_passes):
    pytest.importorskip("triton")
    torch._dynamo.reset()
    module = Returning()
    with fastattn.use_kernels("triton"):
        expected = gradients_of(module, of_both, device)
        assert [weights for weights, _, _ in backward_passes] == [True, True]  # eager, where it is known to be used
        backward_passes.clear()
        found = gradients_of(torch.compile(module, backend="aot_eager", fullgraph=True), of_both, device)
    assert [(weights, is_on) for weights, is_on, _ in backward_passes] == [(False, False)] * 2 + [(True, True)] * 2
    for ours, theirs in zip(found, expected):
        assert torch.equal(ours, theirs)
    assert not torch.allclose(found[0], gradients_of(module, of_output, device)[0])


# ------------------------------------------------------------------------------------------------------- torch.export


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_attention_exports_with_dynamic_lengths(strict, backend, device):
    class Module(torch.nn.Module):
        def forward(self, query, key, value, padding):
            return attend(
                query, key, value, key_padding_mask=padding, is_causal=True, need_weights=True, backend=backend
            )

    def inputs(batch, seqlen_q, seqlen_k):
        tensors = attention_inputs(batch, H, seqlen_q, seqlen_k, D, device=device)
        return *tensors, key_padding_mask(batch, seqlen_k, device=device)

    b, m, n = (torch.export.Dim(name, min=2, max=512) for name in ("b", "m", "n"))
    shapes = ({0: b, 2: m}, {0: b, 2: n}, {0: b, 2: n}, {0: b, 1: n})
    exported = torch.export.export(Module(), inputs(3, 5, 7), dynamic_shapes=shapes, strict=strict).module()
    for sizes in ((3, 5, 7), (2, 9, 12)):
        arguments = inputs(*sizes)
        assert_same(exported(*arguments), Module()(*arguments))


# ------------------------------------------------------------------------------------------ autocast and checkpointing


def test_attention_autocasts_as_torch_does(backend, device):
    leaves, arguments = make_arguments("causal_bottom_right_lse", device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output, lse = attend(*leaves, **arguments, backend=backend)
        outside = attend(*(t.double() for t in leaves), backend="torch")
    assert output.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert outside.dtype == torch.float64  # autocast lets float64 alone
    expected, _ = attend(*(t.bfloat16() for t in leaves), **arguments, backend=backend)
    assert torch.equal(output, expected)
    for leaf, gradient in zip(leaves, torch.autograd.grad(output.sum() + lse.sum(), leaves)):
        assert gradient.dtype == leaf.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved_tensor_hooks", "reentrant"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_attention_checkpoints(dropout_p, use_reentrant, backend, device):
    """The recomputed forward draws the same dropout, so the gradients are bitwise those without checkpointing."""
    leaves, _ = make_arguments("plain", device)

    def function(query, key, value):
        return attend(query * 2, key, value, dropout_p=dropout_p, return_lse=True, backend=backend)

    def checkpointed(*tensors):
        return checkpoint(function, *tensors, use_reentrant=use_reentrant)

    gradients = []
    for run in (function, checkpointed):
        torch.manual_seed(0)
        output, lse = run(*leaves)
        (output.sum() + lse.sum()).backward()
        gradients.append([t.grad for t in leaves])
        for t in leaves:
            t.grad = None
    for plain, again in zip(*gradients):
        assert torch.equal(plain, again)
