"""``MultiheadAttention`` under compile, export, function transforms, tracing, scripting, autocast and overrides."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrize

import fastattn

E = 8


def make(backend: Any = "torch", **arguments: Any) -> fastattn.MultiheadAttention:
    torch.manual_seed(0)
    return fastattn.MultiheadAttention(E, 2, batch_first=True, backend=backend, **arguments)


def inputs(batch=2, length=5):
    torch.manual_seed(1)
    return torch.randn(batch, length, E)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_compile_without_graph_breaks(backend, training, need_weights):
    module = make(backend, add_zero_attn=True).train(training)
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x, padding = inputs(), torch.tensor([[False] * 4 + [True], [False] * 5])
    results = []
    for parameters, run in ((module.parameters(), module), (twin.parameters(), compiled)):
        output, weights = run(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        output.square().sum().backward()
        results.append((output, weights, [p.grad for p in parameters]))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_dynamic_lengths_compiles_once(backend):
    module = make(backend).eval()
    compiled = torch.compile(module, fullgraph=True, backend="eager", dynamic=True)
    for length in (5, 6, 9):
        x = inputs(length=length)
        with torch.no_grad(), torch.compiler.set_stance("default" if length == 5 else "fail_on_recompile"):
            torch.testing.assert_close(compiled(x, x, x), module(x, x, x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("need_weights", [False, True])
def test_export_with_a_dynamic_batch(backend, need_weights, strict):
    module = make(backend).eval()
    x = inputs()
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"query": {0: batch}, "key": {0: batch}, "value": {0: batch}, "need_weights": None}
    arguments = {"need_weights": need_weights}
    exported = torch.export.export(module, (x, x, x), arguments, dynamic_shapes=shapes, strict=strict).module()
    other = inputs(batch=3)
    torch.testing.assert_close(exported(other, other, other, **arguments), module(other, other, other, **arguments))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no batching rule for its CPU attention
@pytest.mark.parametrize("need_weights", [False, True])
def test_per_sample_gradients_are_the_gradients_of_each_sample(backend, need_weights):
    module = make(backend)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x = inputs(batch=3)

    def loss(parameters, sample):
        output, weights = functional_call(module, parameters, (sample, sample, sample), {"need_weights": need_weights})
        return output.square().sum() + (weights.square().sum() if need_weights else 0)

    together = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        for name, gradient in grad(loss)(parameters, sample).items():
            torch.testing.assert_close(together[name][i], gradient)


def test_functional_call_with_stacked_modules():
    modules = [make(), make()]
    nn.init.normal_(modules[1].in_proj_weight)
    parameters, buffers = stack_module_state(modules)
    x = inputs()
    outputs = vmap(lambda p, b: functional_call(modules[0], (p, b), (x, x, x)))(parameters, buffers)
    for i, module in enumerate(modules):
        torch.testing.assert_close([t[i] for t in outputs], list(module(x, x, x)))


@pytest.mark.parametrize("need_weights", [False, True])
def test_double_backward_matches_torch(backend, need_weights):
    if backend == "torch" and not need_weights and torch.cuda.is_available():
        pytest.skip("F.scaled_dot_product_attention has no double backward on GPUs")
    results = []
    for kind, more in ((nn.MultiheadAttention, {}), (fastattn.MultiheadAttention, {"backend": backend})):
        torch.manual_seed(0)
        module = kind(E, 2, batch_first=True, **more)
        x = inputs().requires_grad_()
        # Torch can differentiate twice only with weights; the output is the same.
        output, _ = module(x, x, x, need_weights=need_weights or kind is nn.MultiheadAttention)
        (first,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [x, *module.parameters()], allow_unused=True))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


class SelfAttention(nn.Module):
    """What ``jit`` can take: one input, and no None among the outputs of a trace."""

    def __init__(self, attention, need_weights):
        super().__init__()
        self.attention, self.need_weights = attention, need_weights

    def forward(self, x):
        output, weights = self.attention(x, x, x, need_weights=self.need_weights)
        if weights is None:
            return (output,)
        return output, weights


@pytest.mark.parametrize("need_weights", [False, True])
def test_trace_runs_on_other_values(need_weights):
    module = make().eval()
    x = inputs()

    with torch.no_grad():
        traced: Any = torch.jit.trace(SelfAttention(module, need_weights), x)
        other = x + 1
        torch.testing.assert_close(
            traced(other), module(other, other, other, need_weights=need_weights)[: 1 + need_weights]
        )


class Attending(nn.Module):
    """What ``torch.jit.script`` can compile around a module."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x, x, x)[0]


def test_script_gets_torchs_module_and_says_so():
    module = make()
    with pytest.warns(UserWarning, match="cannot compile fastattn.MultiheadAttention"):
        scripted = torch.jit.script(Attending(copy.deepcopy(module)))
    x = inputs()
    torch.testing.assert_close(scripted(x), module(x, x, x)[0])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("appended", [False, True])
def test_autocast_gives_the_low_dtype(appended, need_weights):
    module = make(add_bias_kv=appended, add_zero_attn=appended)
    x = inputs()
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    expected, _ = module(x, x, x, attn_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        output, weights = module(x, x, x, attn_mask=mask, need_weights=need_weights)
    assert output.dtype == torch.bfloat16
    assert weights is None or weights.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)


class Recording(torch.Tensor):
    """A tensor that notes which functions are called with it."""

    called: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.called.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Tagged(torch.Tensor):
    """A tensor that overrides nothing."""


def test_torch_function_receives_the_whole_call():
    Recording.called.clear()
    module, x = make(), inputs()
    output, _ = module(x.as_subclass(Recording), x, x)
    assert torch.nn.functional.multi_head_attention_forward in Recording.called
    torch.testing.assert_close(output.as_subclass(torch.Tensor), module(x, x, x)[0])


def test_subclass_that_overrides_nothing_is_computed_here(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "multi_head_attention_forward", None)
    module, x = make(), inputs()
    output, _ = module(*(x.as_subclass(Tagged),) * 3, need_weights=False)
    assert isinstance(output, Tagged)
    torch.testing.assert_close(output.as_subclass(torch.Tensor), module(x, x, x)[0])


def test_device_context_does_not_change_the_path(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "multi_head_attention_forward", None)
    module, x = make(), inputs()
    with torch.device("cpu"):
        module(x, x, x)


def test_nested_tensors_go_torchs_way():
    module = make().eval()
    sequences = [torch.randn(3, E), torch.randn(5, E)]
    with torch.no_grad():
        nested = torch.nested.nested_tensor(sequences)
        output, _ = module(nested, nested, nested, need_weights=False)
        for got, x in zip(output.unbind(), sequences):
            torch.testing.assert_close(got, module(x, x, x, need_weights=False)[0])
    module.train()
    with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast path"):
        module(nested, nested, nested, need_weights=False)


def test_parametrized_projection_is_used():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    module, x = make(), inputs()
    expected = copy.deepcopy(module)
    with torch.no_grad():
        expected.in_proj_weight.mul_(2)
    parametrize.register_parametrization(module, "in_proj_weight", Double())
    torch.testing.assert_close(module(x, x, x), expected(x, x, x))
