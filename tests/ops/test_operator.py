"""The scaffold of operators, by a small one: products of queries and keys that mix values, without a softmax."""

import dataclasses
import functools
import types
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastattn.ops.common.blocks import OF_KEYS, OF_ROWS, SCORES, Block
from fastattn.ops.common.derivatives import Blocked
from fastattn.ops.common.flops import product_flops
from fastattn.ops.common.operator import ForwardArguments, Operator, apply
from fastattn.ops.common.row_operator import BackwardFunction, ForwardFunction, RowOperator
from fastattn.testing import random_tensor


class Inputs(NamedTuple):
    query: Tensor  # [B, H, L, D]
    key: Tensor  # [B, H, S, D]
    value: Tensor  # [B, H, S, D]
    bias: Tensor | None  # [1 | B, H, L, S]


class Options(NamedTuple):
    scale: float
    needs_scores: bool
    backend: str


class Results(NamedTuple):
    output: Tensor
    scores: Tensor


class OutputGradients(NamedTuple):
    d_output: Tensor
    d_scores: Tensor | None


class Needs(NamedTuple):
    needs_d_bias: bool


class InputGradients(NamedTuple):
    d_query: Tensor
    d_key: Tensor
    d_value: Tensor
    d_bias: Tensor


def scores_of(query, key, bias, scale):
    scores = query @ key.mT * scale
    return scores if bias is None else scores + bias


def forward(inputs, options):
    scores = scores_of(inputs.query, inputs.key, inputs.bias, options.scale)
    return Results(scores @ inputs.value, scores if options.needs_scores else scores.new_empty(0))


def backward(gradients, kept, needs, inputs, options):
    scores = kept.scores if options.needs_scores else scores_of(inputs.query, inputs.key, inputs.bias, options.scale)
    ds = gradients.d_output @ inputs.value.mT
    ds = ds if gradients.d_scores is None else ds + gradients.d_scores
    d_bias = ds.sum_to_size(inputs.bias.shape) if needs.needs_d_bias else ds.new_empty(0)
    return InputGradients(
        ds @ inputs.key * options.scale, ds.mT @ inputs.query * options.scale, scores.mT @ gradients.d_output, d_bias
    )


def empty_results(inputs, options):
    scores = (*inputs.query.shape[:3], inputs.key.shape[2]) if options.needs_scores else (0,)
    return Results(torch.empty_like(inputs.query), inputs.query.new_empty(scores))


def empty_gradients(inputs, needs):
    bias = torch.empty_like(inputs.bias) if needs.needs_d_bias else inputs.query.new_empty(0)
    return InputGradients(*(torch.empty_like(t) for t in (inputs.query, inputs.key, inputs.value)), d_bias=bias)


def blocked(inputs, options):
    size, heads, length, _ = inputs.query.shape
    keys = inputs.key.shape[2]

    def formula(query, key, value, bias):
        scores = scores_of(query, key, bias, options.scale)
        return scores @ value, scores if options.needs_scores else query.new_empty(0)

    def each():
        for row in range(0, length, 2):
            yield Block(slice(0, size), slice(row, min(row + 2, length)), slice(0, keys)), formula

    return Blocked(
        primals=OPERATOR.differentiable(inputs),
        axes=(OF_ROWS, OF_KEYS, OF_KEYS, SCORES),
        result_shapes=(inputs.query.shape, (size, heads, length, keys) if options.needs_scores else (0,)),
        result_dtypes=(inputs.query.dtype, inputs.query.dtype),
        result_axes=(OF_ROWS, SCORES if options.needs_scores else (None,)),
        blocks=each,
    )


OPERATOR = RowOperator(
    name="test_of_the_scaffold",
    inputs=Inputs,
    options=Options,
    results=Results,
    kept=Results,
    output_gradients=OutputGradients,
    needs=Needs,
    input_gradients=InputGradients,
    implementation=lambda backend: types.SimpleNamespace(forward=forward, backward=backward),  # type: ignore[arg-type]
    ask=Needs,
    stored=lambda options: (True, options.needs_scores),
    empty_results=empty_results,
    empty_gradients=empty_gradients,
    blocked=blocked,
    forward_flops=lambda inputs, options: 2 * product_flops(inputs.query, inputs.key, inputs.query[3]),
    backward_flops=lambda inputs, options: 4 * product_flops(inputs.query, inputs.key, inputs.query[3]),
)


class MixBackward(BackwardFunction):
    pair, operator = OPERATOR, OPERATOR.backward


class Mix(ForwardFunction):
    pair, operator, backward_function = OPERATOR, OPERATOR.forward, MixBackward


def mixed(query, key, value, bias=None, scale=0.5, needs_scores=True) -> Any:
    results = Results(*apply(Mix, Inputs(query, key, value, bias), Options(scale, needs_scores, "torch")))
    return (results.output, results.scores) if needs_scores else (results.output,)


def plain(query, key, value, bias=None, scale=0.5, needs_scores=True) -> Any:
    scores = scores_of(query, key, bias, scale)
    return (scores @ value, scores) if needs_scores else (scores @ value,)


def leaves(has_bias=True):
    shapes = [(2, 2, 5, 3), (2, 2, 7, 3), (2, 2, 7, 3), (2, 2, 5, 7)][: 4 if has_bias else 3]
    return [random_tensor(*s, seed=i, dtype=torch.float64).requires_grad_() for i, s in enumerate(shapes)]


def loss_of(results) -> Any:
    return sum(t.square().sum() for t in results)


def gradients(function, tensors, create_graph=False, **arguments):
    loss = loss_of(function(*tensors, **arguments))
    return torch.autograd.grad(loss, tensors, create_graph=create_graph)


def assert_all_close(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


CASES = [(has_bias, needs_scores) for has_bias in (False, True) for needs_scores in (False, True)]


# ------------------------------------------------------------------------------------------------------------ operators


def test_schema_is_made_of_the_groups():
    inputs = "Tensor query, Tensor key, Tensor value, Tensor? bias, float scale, bool needs_scores, str backend"
    packets = torch.ops.fastattn.test_of_the_scaffold_forward, torch.ops.fastattn.test_of_the_scaffold_backward
    forward_schema, backward_schema = (str(packet.default._schema) for packet in packets)
    assert f"forward({inputs}) -> (Tensor, Tensor)" in forward_schema
    given = "Tensor d_output, Tensor? d_scores, Tensor output, Tensor scores, bool needs_d_bias"
    assert f"backward({given}, {inputs}) -> (Tensor, Tensor, Tensor, Tensor)" in backward_schema


def test_arguments_are_reached_by_name_and_put_back():
    arguments = OPERATOR.forward.split("qkvbsnt")
    assert (arguments.inputs.bias, arguments.options.scale) == ("b", "s")
    assert OPERATOR.forward.join(inputs=arguments.inputs, options=arguments.options) == tuple("qkvbsnt")
    assert OPERATOR.forward.join(inputs=["q", "k"]) == ("q", "k", None, None, None, None, None)


def test_two_arguments_of_one_name_are_refused():
    class Again(NamedTuple):
        query: Tensor

    with pytest.raises(ValueError, match="arguments of one name: query, key, value, bias, query"):
        Operator("never", ForwardArguments(Inputs, Again), Results, run=forward, fake=empty_results)
    assert not hasattr(torch.ops.fastattn, "never")


def test_an_annotation_that_no_schema_knows_is_refused():
    class Several(NamedTuple):
        scales: list

    with pytest.raises(ValueError, match="never: scales is annotated list: expected one of Tensor, "):
        Operator("never", ForwardArguments(Inputs, Several), Results, run=forward, fake=empty_results)
    assert not hasattr(torch.ops.fastattn, "never")


def group(*names: str) -> Any:
    """A NamedTuple type of tensors."""
    return NamedTuple("group", [(name, Tensor) for name in names])  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_gradients": group("d_key", "d_query", "d_value")}, "expected d_query, d_key, d_value, the gradients"),
        ({"needs": group("needs_d_biass")}, "input_gradients has no d_biass: it has d_query"),
        ({"output_gradients": group("d_output", "d_score")}, "results has no score: it has output, scores"),
        ({"output_gradients": group("d_scores", "d_output")}, "output_gradients does not begin with d_output"),
        ({"kept": group("output", "score")}, "results has no score: it has output, scores"),
        ({"kept": group("scores")}, "kept has no output: it has scores"),
        ({"options": group("scale", "engine")}, "options has no backend: it has scale, engine"),
    ],
    ids=["order", "needs", "output_gradients", "d_output", "kept", "output", "backend"],
)
def test_names_that_connect_nothing_are_refused(changed, message):
    """Some would fail only in a backward, by an error that names no group."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(OPERATOR, name="never", **changed)
    assert not hasattr(torch.ops.fastattn, "never_forward")


def test_operator_of_one_result():
    """torch wants the result itself of such an operator, and no tuple of one."""

    class Doubled(NamedTuple):
        output: Tensor

    def doubled(inputs, options):
        return Doubled(inputs.query * 2)

    def empty(inputs, options):
        return Doubled(torch.empty_like(inputs.query))

    operator = Operator("test_of_one_result", ForwardArguments(Inputs, Options), Doubled, run=doubled, fake=empty)
    arguments = (*(t.detach() for t in leaves()), 0.5, False, "torch")
    assert_all_close(operator(*arguments), (arguments[0] * 2,))
    torch.library.opcheck(torch.ops.fastattn.test_of_one_result.default, arguments)


@pytest.mark.parametrize(("has_bias", "needs_scores"), CASES)
def test_both_operators_pass_opcheck(has_bias, needs_scores):
    inputs = Inputs(*(t.detach() for t in leaves(has_bias)), *(() if has_bias else (None,)))
    options = Options(0.5, needs_scores, "torch")
    torch.library.opcheck(torch.ops.fastattn.test_of_the_scaffold_forward.default, (*inputs, *options))
    results = forward(inputs, options)
    given = OutputGradients(results.output, results.scores if needs_scores else None)
    arguments = (*given, *results, has_bias, *inputs, *options)
    torch.library.opcheck(torch.ops.fastattn.test_of_the_scaffold_backward.default, arguments)


def test_operations_are_counted():
    tensors, product = leaves(), 2 * 2 * 2 * 5 * 7 * 3
    with FlopCounterMode(display=False) as counter:
        found = mixed(*tensors)
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(found[0].sum(), tensors)
    assert counter.get_total_flops() == 4 * product


# ---------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize(("has_bias", "needs_scores"), CASES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_derivatives_of_every_order(order, has_bias, needs_scores):
    found = []
    for function in (mixed, plain):
        tensors = leaves(has_bias)
        results = gradients(function, tensors, create_graph=order > 1, needs_scores=needs_scores)
        for step in range(1, order):
            results = torch.autograd.grad(loss_of(results), tensors, create_graph=step + 1 < order)
        found.append(results)
    assert_all_close(*found)


@pytest.mark.parametrize(("has_bias", "needs_scores"), CASES)
def test_forward_mode_and_forward_over_reverse(has_bias, needs_scores):
    primals = tuple(t.detach() for t in leaves(has_bias))
    tangents = tuple(random_tensor(*t.shape, seed=9, dtype=t.dtype) for t in primals)
    pushed = []
    for function in (mixed, plain):
        call = functools.partial(function, needs_scores=needs_scores)
        gradient = torch.func.grad(lambda *tensors, call=call: loss_of(call(*tensors)))
        pushed.append([*torch.func.jvp(call, primals, tangents)[1], torch.func.jvp(gradient, primals, tangents)[1]])
    assert_all_close(*pushed)


@pytest.mark.parametrize("needs_scores", [False, True])
def test_vmap_of_gradients(needs_scores):
    tensors = [torch.stack([t.detach(), 2 * t.detach()]) for t in leaves()]
    found = []
    for function in (mixed, plain):
        call = functools.partial(function, needs_scores=needs_scores)
        each: Any = torch.func.grad(lambda *tensors, call=call: loss_of(call(*tensors)))
        found.append([torch.func.vmap(each, in_dims=(0, None, 0, 0))(tensors[0], tensors[1][0], *tensors[2:])])
    assert_all_close(*found)


def test_results_that_no_loss_uses_have_no_gradient(monkeypatch):
    """The operator gets None for them, and does not add zeros."""
    seen = []

    def noting(*groups: Any):
        seen.append(groups[0].d_scores)
        return backward(*groups)

    modules = types.SimpleNamespace(forward=forward, backward=noting)
    monkeypatch.setattr(OPERATOR, "implementation", lambda backend: modules)
    tensors = leaves()
    output, scores = mixed(*tensors)
    assert scores.requires_grad
    torch.autograd.grad(output.sum(), tensors)
    assert seen == [None]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_unpacks_what_was_saved_once(use_reentrant):
    def function(*tensors):
        return checkpoint(mixed, *tensors, use_reentrant=use_reentrant)

    tensors = leaves()
    loss_of(function(*tensors)).backward()
    assert_all_close([t.grad for t in tensors], gradients(plain, leaves()))


# --------------------------------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_one_function_serves_compiled_calls(compiler, dynamic):
    """Although it has a ``jvp``, which torch.compile refuses in a Function that it traces."""
    torch._dynamo.reset()
    compiled = torch.compile(mixed, backend=compiler, fullgraph=True, dynamic=dynamic)
    for has_bias in (True, False):
        assert_all_close(gradients(compiled, leaves(has_bias)), gradients(plain, leaves(has_bias)))


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transforms_inside_of_compiled_code(transform):
    torch._dynamo.reset()
    tensors = [t.detach() for t in leaves()]

    def function(query):
        def of_query(query):
            return loss_of(mixed(query, *tensors[1:]))

        if transform == "grad":
            return torch.func.grad(of_query)(query)
        if transform == "jvp":
            return torch.func.jvp(of_query, (query,), (query,))[1]
        return torch.func.vmap(of_query)(torch.stack([query, 2 * query]))

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_all_close([compiled(tensors[0])], [function(tensors[0])])


@pytest.mark.parametrize("strict", [False, True])
def test_operators_are_in_exported_graphs(strict):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return mixed(*tensors)

    tensors = tuple(t.detach() for t in leaves())
    exported = torch.export.export(Module(), tensors, strict=strict)
    assert "fastattn.test_of_the_scaffold_forward" in str(exported.graph)
    assert_all_close(exported.module()(*tensors), plain(*tensors))


def test_an_eager_call_binds_no_signature(monkeypatch):
    """torch's ``Function.apply`` does so on every call, in more time than a small kernel takes."""

    def refuse(*args: Any):
        raise AssertionError("a signature was bound")

    tensors, expected = leaves(), gradients(plain, leaves())
    monkeypatch.setattr("inspect.signature", refuse)
    assert mixed(*tensors)[0].grad_fn.name() == "MixBackward"
    assert_all_close(gradients(mixed, tensors), expected)
    with pytest.raises(AssertionError, match="a signature was bound"):
        torch.func.vmap(mixed)(*(t[None] for t in tensors))
