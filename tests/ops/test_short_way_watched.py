"""The short way of a call is not taken while something traces, transforms or watches; autograd sees no difference."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton", reason="triton is not installed")

import fastattn
from tests.machines import DEVICE
from tests.ops import short_way_cases as cases
from tests.ops.short_way_cases import Draw, assert_same, counted, long_way


@pytest.fixture(autouse=True)
def forgetful():
    cases.forget()
    yield
    cases.forget()


def attend(query, key=None, **options) -> Any:
    key = query if key is None else key
    return fastattn.attention(query, key, key, is_causal=True, backend="triton", **options)


def add_norm(x, residual=None, weight=None, **options) -> Any:
    residual = x.flip(0) if residual is None else residual
    return fastattn.add_layer_norm(x, residual, weight, backend="triton", **options)


FUNCTIONS = {"attention": (attend, (1, 1, 3, 4)), "norm": (add_norm, (3, 8))}
each_function = pytest.mark.parametrize(("function", "shape"), FUNCTIONS.values(), ids=FUNCTIONS)


def draw(shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def meet(function, *args, **options):
    """Have the signatures of a training call and of one without gradients met, plans and backward included."""
    for _ in range(3):
        function(*args, **options)
        leaves = [t.detach().clone().requires_grad_() for t in args]
        cases.tensors_of(function(*leaves, **options))[0].sum().backward()


# -------------------------------------------------------------------------------------- what watches, or differentiates


def _hessian(function, x):
    return torch.autograd.functional.hessian(lambda x: function(x).sin().sum(), x)


def _forward_mode(function, x):
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x.cos()))).tangent


def _forward_mode_over_a_backward(function, x):
    """The call itself is an ordinary one."""
    from torch.autograd import forward_ad

    leaf = x.clone().requires_grad_()
    output = function(leaf)
    with forward_ad.dual_level():
        (found,) = torch.autograd.grad(output, leaf, forward_ad.make_dual(x, x.cos()))
        return forward_ad.unpack_dual(found).tangent


def _batched_gradients(function, x):
    leaf = x.clone().requires_grad_()
    output = function(leaf)
    return torch.autograd.grad(output, leaf, torch.stack([x, x.sin()]), is_grads_batched=True)


def _compiled(function, x):
    torch._dynamo.reset()
    leaf = x.clone().requires_grad_()
    output = torch.compile(function, backend="aot_eager")(leaf)
    return output, *torch.autograd.grad(output, leaf, x)


def _exported(function, x):
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            return function(x)

    return torch.export.export(Module(), (x,)).module()(x.sin())


def _made_into_a_graph(function, x):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(lambda x: function(x))(x)(x.sin())


def _jit_traced(function, x):
    traced: Any = torch.jit.trace(function, (x,), check_trace=False)
    return traced(x.sin())


def _counted_flops(function, x):
    with FlopCounterMode(display=False) as counter:
        output = function(x)
    return output, torch.tensor(counter.get_total_flops())


def _autocast(function, x):
    with torch.autocast(DEVICE.type, torch.bfloat16):
        return function(x)


def _backward_under_autocast(function, x):
    leaf = x.clone().requires_grad_()
    output = function(leaf)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        return torch.autograd.grad(output, leaf, x)


class _Listed(TorchFunctionMode):
    """Lists the operators of this package that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += [str(func)] * str(func).startswith("fastattn.")
        return func(*args, **kwargs or {})


def _function_mode(function, x):
    with _Listed() as listed:
        output = function(x)
    assert len(listed.seen) == 1, listed.seen
    return output


class _Marked(Tensor):
    """A class of its own."""


def _subclass(function, x):
    found = function(x.as_subclass(_Marked))
    assert type(found) is _Marked
    return found.as_subclass(Tensor)


def _gradient_of_a_subclass(function, x):
    leaf = x.clone().requires_grad_()
    return tuple(t.as_subclass(Tensor) for t in torch.autograd.grad(function(leaf), leaf, x.as_subclass(_Marked)))


def _saved_on_cpu(function, x):
    leaf = x.clone().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        output = function(leaf)
    return torch.autograd.grad(output, leaf, x)


# Each gives results of a function and a tensor.
WATCHERS = {
    "grad": lambda function, x: grad(lambda x: function(x).sin().sum())(x),
    "grad of grad": lambda function, x: grad(lambda x: grad(lambda x: function(x).sin().sum())(x).sin().sum())(x),
    "vmap": lambda function, x: vmap(function)(torch.stack([x, x.sin()])),
    "jvp": lambda function, x: jvp(function, (x,), (x.cos(),)),
    "jacrev": lambda function, x: jacrev(function)(x),
    "hessian": _hessian,
    "forward mode": _forward_mode,
    "forward mode over a backward": _forward_mode_over_a_backward,
    "batched gradients": _batched_gradients,
    "vectorized jacobian": lambda function, x: torch.autograd.functional.jacobian(function, x, vectorize=True),
    "torch.compile": _compiled,
    "torch.export": _exported,
    "make_fx": _made_into_a_graph,
    "jit.trace": _jit_traced,
    "FlopCounterMode": _counted_flops,
    "autocast": _autocast,
    "backward under autocast": _backward_under_autocast,
    "a mode of torch functions": _function_mode,
    "a subclass": _subclass,
    "a gradient of a subclass": _gradient_of_a_subclass,
    "save_on_cpu": _saved_on_cpu,
}
# Those that watch or transform the backward of an ordinary call alone.
_OF_BACKWARDS = {
    "hessian", "forward mode over a backward", "batched gradients", "vectorized jacobian", "backward under autocast",
    "a gradient of a subclass",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*jit.trace.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("watcher", WATCHERS)
@each_function
def test_watched_call_is_the_same_once_there_is_a_plan(function, shape, watcher):
    x = draw(shape)
    with long_way():
        expected = cases.tensors_of(WATCHERS[watcher](function, x))
    meet(function, x)
    with counted() as taken:
        found = cases.tensors_of(WATCHERS[watcher](function, x))
    assert_same([t.detach() for t in found], [t.detach() for t in expected])
    assert (taken.forwards > 0) == (watcher in _OF_BACKWARDS)
    assert taken.backwards == 0 or watcher == "hessian"  # whose second backward goes through the call as well


def test_default_device_is_no_watcher():
    """``torch.set_default_device`` is a mode of torch functions too, and stays on."""
    x = draw((3, 8))
    meet(add_norm, x)
    with torch.device("cpu"), counted() as taken:
        add_norm(x)
    assert taken.planned == 1


@pytest.mark.parametrize(("function", "dtype", "is_short"), [
    (attend, torch.bfloat16, True),  # of autocast's dtype: there is nothing to cast
    (attend, torch.float32, False),
    (add_norm, torch.bfloat16, True),
    (add_norm, torch.float32, True),  # norms cast nothing
])  # fmt: skip
def test_training_under_autocast_takes_the_short_way_where_it_casts_nothing(function, dtype, is_short):
    shape = dict(FUNCTIONS.values())[function]

    def step(seed):
        leaf = draw(shape, seed).to(dtype).requires_grad_()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            output = function(leaf)
        return [output.detach(), *torch.autograd.grad(output.float().sin().sum(), leaf)]

    with counted() as taken:
        found = [t for seed in range(3) for t in step(seed)]
    assert (taken.forwards, taken.planned) == ((2, 1) if is_short else (0, 0))
    with long_way():
        assert_same(found, [t for seed in range(3) for t in step(seed)])


# ---------------------------------------------------------------------------------------------------------- derivatives


def _second_order(case, seed):
    """The results of a call, its gradients, and gradients of these."""
    of_call = Draw(seed)
    torch.manual_seed(seed)
    results = cases.tensors_of(case(of_call))
    first = torch.autograd.grad([t.sin().sum() for t in results], of_call.leaves, create_graph=True)
    second = torch.autograd.grad([t.sin().sum() for t in first], of_call.leaves, allow_unused=True)
    return [t.detach() for t in (*results, *first, *second) if t is not None]


SECOND_ORDER = {
    "attention": cases.ATTENTION["everything"],
    "attention with a gradient of the mask": cases.ATTENTION["bias"],
    "norm": cases.NORMS["layer_of_all"],
    "norm of axes": cases.NORMS["layer_axes"],
    "norm of a constant row scale": cases.NORMS["layer_row_scale_constant"],
    "norm alone": cases.NORMS["rms_norm"],
    "additive attention": cases.ADDITIVE["masks"],
}


@pytest.mark.parametrize("case", SECOND_ORDER.values(), ids=SECOND_ORDER)
def test_second_derivatives_are_the_same_by_the_short_way(case):
    """Of the call that is written down as well, which runs on tensors of its own: they are kept as the user gave them,
    or the gradients would not flow on."""
    with counted() as taken:
        found = [_second_order(case, seed) for seed in range(3)]
    assert (taken.forwards, taken.planned) == (2, 1)
    with long_way():
        for seed in (1, 2):
            for actual, wanted in zip(found[seed], _second_order(case, seed), strict=True):
                # autograd adds up the paths to a leaf in another order: each of at most 8 sums rounds once
                most = 8 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
                torch.testing.assert_close(actual, wanted, rtol=0.0, atol=most)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@each_function
def test_checkpoint_from_the_first_call_on(function, shape, reentrant):
    """The first call goes the long way and its repetition in the backward is the second: checkpointing compares what
    they save."""
    for seed in range(3):
        leaf = draw(shape, seed).requires_grad_()
        output: Any = checkpoint(lambda x: function(x, dropout_p=0.5), leaf, use_reentrant=reentrant)
        output.backward(draw(shape))  # the reentrant kind knows no torch.autograd.grad
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def test_checkpoint_is_the_same_by_the_short_way():
    def run(reentrant) -> Any:
        leaf: Any = draw((3, 8)).requires_grad_()
        torch.manual_seed(3)
        checkpoint(lambda x: add_norm(x, dropout_p=0.5), leaf, use_reentrant=reentrant).square().sum().backward()
        return leaf.grad

    with long_way():
        expected = run(reentrant=False)
    for _ in range(3):
        assert torch.equal(run(reentrant=False), expected)
        assert torch.equal(run(reentrant=True), expected)


def test_hook_on_a_saved_tensor_may_lay_it_out_anew():
    """A plan of the backward that reads with the strides of the forward would read the wrong elements."""

    def run(seed, is_hooked):
        leaf = draw((1, 3, 2, 4), seed).requires_grad_()
        output = attend(leaf.transpose(1, 2))
        if is_hooked:
            for saved in output.grad_fn._raw_saved_tensors:
                saved.register_hooks(lambda t: t.contiguous().clone(), lambda t: t)
        return torch.autograd.grad(output, leaf, draw((1, 2, 3, 4)))[0]

    for seed in range(3):
        run(seed, is_hooked=False)
    with counted() as taken:
        found = run(3, is_hooked=True)
    assert taken.planned == 1
    with long_way():
        assert torch.equal(found, run(3, is_hooked=False))


# ------------------------------------------------------------------------------------------------- tensors and autograd


@each_function
def test_outputs_may_be_written_to(function, shape):
    """As ``x = norm(x); x += y`` does: an output that is a view made where there is no autograd may not."""
    for seed in range(4):
        leaf = draw(shape, seed).requires_grad_()
        output = function(leaf)
        assert not output._is_view()
        if function is add_norm:  # attention's output is kept for its backward
            output += 1.0
            output.mul_(2.0).sum().backward()
        with torch.no_grad():
            output = function(leaf)
        output.mul_(torch.ones(1, device=DEVICE, requires_grad=True))


@pytest.mark.parametrize("case", ["layer_axes", "rms_channels_last", "layer_of_all"])
def test_outputs_in_another_shape_may_be_written_to(case):
    for seed in range(4):
        of_call = Draw(seed)
        output, *_ = cases.tensors_of(cases.NORMS[case](of_call))
        output.mul_(2.0).sum().backward()
        assert all(leaf.grad is not None for leaf in of_call.leaves)


def test_x_and_residual_do_not_share_their_gradients():
    """Autograd takes a gradient over as the ``grad`` of a leaf where nobody else has it. Two views of one gradient look
    like that, and a second backward would add to both through each."""
    for axes in ((8,), (2, 4)):
        for _ in range(2):
            add_norm(*(draw((3, *axes)).requires_grad_() for _ in range(2)), normalized_shape=axes)
        for _ in range(2):
            x, residual = (draw((3, *axes), seed).requires_grad_() for seed in range(2))
            expected = torch.zeros_like(x)
            for _ in range(2):
                output = add_norm(x, residual, normalized_shape=axes)
                (found,) = torch.autograd.grad(output, x, draw(x.shape), retain_graph=True)
                output.backward(draw(x.shape))
                expected += found
            assert x.grad is not None and residual.grad is not None
            assert torch.equal(x.grad, expected)
            assert torch.equal(residual.grad, expected)


@each_function
def test_graph_runs_twice_where_it_is_retained_and_else_raises(function, shape):
    for seed in range(4):
        leaf = draw(shape, seed).requires_grad_()
        output = function(leaf)
        found = [torch.autograd.grad(output, leaf, draw(shape), retain_graph=True)[0] for _ in range(2)]
        assert torch.equal(*found)
        torch.autograd.grad(output, leaf, draw(shape))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(output, leaf, draw(shape))


def _raises_in_backward(call):
    output = call()
    try:
        output.sum().backward()
    except RuntimeError as error:
        return "modified by an inplace operation" in str(error) or str(error)
    return False


def _write(tensor):
    tensor.detach().add_(1) if tensor.dtype != torch.bool else tensor.logical_not_()


WRITTEN_TO: dict[str, Any] = {
    "query": (lambda t: attend(t), lambda: draw((1, 1, 3, 4))),
    "mask": (lambda t: attend(draw((1, 1, 3, 4)).requires_grad_(), attn_mask=t), lambda: draw((3, 3)) < 1),
    "bias": (lambda t: attend(draw((1, 1, 3, 4)).requires_grad_(), attn_mask=t), lambda: draw((3, 3))),
    "padding": (
        lambda t: attend(draw((1, 1, 3, 4)).requires_grad_(), key_padding_mask=t), lambda: draw((1, 3)) > 1,
    ),
    "documents": (lambda t: attend(draw((1, 1, 3, 4)).requires_grad_(), document_ids=t), lambda: torch.arange(3)[None]),
    "documents of 16 bits": (
        lambda t: attend(draw((1, 1, 3, 4)).requires_grad_(), document_ids=t),
        lambda: torch.arange(3, dtype=torch.int16)[None],
    ),
    "prefix": (lambda t: attend(draw((1, 1, 3, 4)).requires_grad_(), prefix=t), lambda: torch.tensor([1])),
    "x": (lambda t: add_norm(t, draw((3, 8)).requires_grad_()), lambda: draw((3, 8))),
    "x beside a row scale": (
        lambda t: add_norm(t, draw((3, 8)).requires_grad_(), row_scale=draw((3,))), lambda: draw((3, 8)),
    ),
    "x alone": (
        lambda t: fastattn.layer_norm(t, 8, draw((8,)).requires_grad_(), backend="triton"), lambda: draw((3, 8)),
    ),
    "weight": (lambda t: add_norm(draw((3, 8)).requires_grad_(), weight=t), lambda: draw((8,))),
}  # fmt: skip


@pytest.mark.parametrize(("function", "make"), WRITTEN_TO.values(), ids=WRITTEN_TO)
def test_argument_that_was_written_to_before_the_backward(function, make):
    """The short way keeps the same tensors as the long way, and so raises where that does and nowhere else."""

    def call():
        tensor = make().to(DEVICE)
        if tensor.is_floating_point():
            tensor.requires_grad_()
        output = function(tensor)
        _write(tensor)
        return output

    with long_way():
        expected = _raises_in_backward(call)
    with counted() as taken:
        assert [_raises_in_backward(call) for _ in range(4)] == [expected] * 4
    assert taken.forwards == 3


def test_arguments_that_are_one_tensor_and_then_are_not():
    """Their signatures are alike."""
    for seed in range(6):
        query, key = (draw((1, 1, 3, 4), seed + 10 * number).requires_grad_() for number in range(2))
        key = query if seed in (1, 2, 4) else key
        found = torch.autograd.grad(attend(query, key), (query, key), draw((1, 1, 3, 4)))
        with long_way():
            expected = torch.autograd.grad(attend(query, key), (query, key), draw((1, 1, 3, 4)))
        assert_same(list(found), list(expected))


def test_parameters_take_the_short_way():
    weight = torch.nn.Parameter(draw((8,)))
    with counted() as taken:
        for seed in range(3):
            add_norm(draw((3, 8), seed), weight=weight).sum().backward()
    assert (taken.forwards, taken.backwards) == (2, 1)
    assert type(weight.grad) is Tensor


@each_function
def test_unused_results_and_gradients_of_some_leaves(function, shape):
    """A loss may use any of the results, and ask for any of the gradients."""
    options = {"return_lse": True, "need_weights": True} if function is attend else {"return_residual": True}
    for seed in range(3):
        for used in range(3 if function is attend else 2):
            leaves = [draw(shape, seed + number).requires_grad_() for number in range(2)]
            loss = function(*leaves, **options)[used].sin().sum()
            found = torch.autograd.grad(loss, leaves[seed % 2])
            with long_way():
                assert_same(
                    list(found),
                    list(torch.autograd.grad(function(*leaves, **options)[used].sin().sum(), leaves[seed % 2])),
                )


def test_threads_share_the_short_way():
    """With a lock around them, since Triton's interpreter is not safe with threads."""
    lock, errors = threading.Lock(), []

    def work(number):
        for call in range(4):
            leaf = draw((3, 8 + call % 2), 10 * number + call).requires_grad_()
            with lock:
                (found,) = torch.autograd.grad(add_norm(leaf), leaf, draw(leaf.shape))
                with long_way():
                    (expected,) = torch.autograd.grad(add_norm(leaf), leaf, draw(leaf.shape))
            if not torch.equal(found, expected):
                errors.append((number, call))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
