"""Derivatives of calls with functions: of every order and mode, and gradients of captured tensors bit for bit."""

import itertools
from typing import Any

import pytest
import torch
from torch.func import grad, hessian, jvp, vmap

from fastattn.ops.attention.functions.memory import traced
from fastattn.ops.attention.functions.program import Program
from fastattn.reference import attention as reference
from fastattn.testing import attention_inputs, random_tensor
from tests.ops.attention_cases import attend
from tests.ops.functions_calls import Call
from tests.ops.functions_cases import ADDRESSED, SCORES, Sizes
from tests.ops.functions_checks import check

SMALL = Sizes(1, 2, 3, 4)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def leaves_of(*names):
    """Query, key and value in float64, and what the functions of these names capture, each a call's own."""
    inputs = attention_inputs(*SMALL, 2, kv_heads=1, dtype=torch.float64, seed=1)
    captured = [SCORES[name].draw(SMALL) for name in names]
    captured = [t.double() if t.is_floating_point() else t for t in itertools.chain(*captured)]
    floating = [t for t in captured if t.is_floating_point()]
    return tuple(t.detach().requires_grad_() for t in (*inputs, *floating)), captured


def of_leaves(name, captured, **words: Any) -> Any:
    """A function of query, key, value and the floating captured tensors."""

    def function(query, key, value, *floating):
        rest = iter(floating)
        own = (next(rest) if t.is_floating_point() else t for t in captured)
        return attend(query, key, value, score_mod=SCORES[name].bind(*own), backend="torch", **words)

    return function


GRADIENTS: dict[str, dict[str, Any]] = {
    "table_of_differences": {},  # a bias
    "pair_bias": {"is_causal": True, "return_lse": True},
    "table_of_documents": {"need_weights": True, "softcap": 1.5},
    "alibi": {"mask_mod": lambda b, h, q, k: (q != 1) & (k != 2)},  # row 1 sees nothing
    "hidden_by_infinity": {"sinks": torch.ones(2, dtype=torch.float64)},
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_all_derivatives_are_right(name):
    leaves, captured = leaves_of(name)
    function = of_leaves(name, captured, **GRADIENTS[name])
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


# -------------------------------------------------------------------------------------------------- torch's transforms


def by_table(table, query, backend, **words):
    """The sum of squares of a call that is not linear in what it captures."""

    def score_mod(score, batch, head, query_index, key_index):
        return score * table[head, (query_index - key_index) % 2].exp()

    return attend(query, query, query, score_mod=score_mod, backend=backend, **words).square().sum()


def small_call(backend):
    dtype = torch.float64 if backend == "torch" else torch.float32
    return random_tensor(2, 2, seed=3, dtype=dtype), 0.3 * random_tensor(1, 2, 3, 16, seed=4, dtype=dtype)


def test_functional_transforms_agree_with_autograd(backend):
    table, query = small_call(backend)
    own = table.clone().requires_grad_()
    (expected,) = torch.autograd.grad(by_table(own, query, backend), own, create_graph=True)
    direction = random_tensor(2, 2, seed=5, dtype=table.dtype)
    (second,) = torch.autograd.grad((expected * direction).sum(), own)
    assert_close(grad(by_table)(table, query, backend), expected.detach())
    _, tangent, *_ = jvp(lambda t: by_table(t, query, backend), (table,), (direction,))
    assert_close(tangent, (expected * direction).sum().detach())
    found = hessian(lambda t: by_table(t, query, backend))(table)
    assert_close(torch.einsum("abcd,cd->ab", found, direction), second)


def test_vmap_over_a_captured_tensor_and_over_queries(backend):
    table, query = small_call(backend)
    tables, queries = torch.stack([table, 2 * table]), torch.stack([query, -query])
    for axes in ((0, None), (None, 0), (0, 0)) if backend == "torch" else ((0, 0),):
        samples = [tables if axes[0] == 0 else table, queries if axes[1] == 0 else query]
        found = vmap(grad(lambda t, x: by_table(t, x, backend)), axes)(*samples)
        for number in range(2):
            own = [s if axis is None else s[number] for s, axis in zip(samples, axes)]
            assert_close(found[number], grad(lambda t, x: by_table(t, x, backend))(*own))


def test_gradient_through_a_prologue_and_a_non_leaf(backend):
    """What is computed of a captured tensor alone, inside the function and outside, is differentiated by torch."""
    table, query = small_call(backend)
    table.requires_grad_()
    outside = 2 * table

    def score_mod(score, batch, head, query_index, key_index):
        return score + (outside.T @ table).softmax(0)[head, key_index % 2] * outside.sum()

    def by_bias(score, batch, head, query_index, key_index):
        places = torch.arange(3) % 2
        return score + ((outside.T @ table).softmax(0)[:, places] * outside.sum())[None, :, None, :]

    found = attend(query, query, query, score_mod=score_mod, backend=backend).square().sum()
    expected = reference(query, query, query, score_mod=by_bias).output.square().sum()
    assert_close(*(torch.autograd.grad(each, table, retain_graph=True)[0] for each in (found, expected)))


# ------------------------------------------------------------------------------------------------- how tables are read


@pytest.mark.parametrize("name", ADDRESSED)
def test_tables_by_any_address_have_their_gradient(name, backend, device):
    check(Call(name, sizes=Sizes(2, 2, 19, 23)), backend, device)


FOOTPRINTS = {
    "by nothing": [((), False)],
    "by batch": [(("batch",), False)],
    "by batch and key": [(("batch", "key_index"), False)],
    "by difference": [(("query_index", "key_index"), True)],
    "by difference of key and query": [(("head", "query_index", "key_index"), True)],
    "by both differences": [(("batch", "query_index", "key_index"), True)],
    "by difference and key": [(("query_index", "key_index"), False)],
    "by sum": [(("query_index", "key_index"), False)],
    "by documents": [(("batch", "head", "query_index", "key_index"), False)],
}


@pytest.mark.parametrize("name", FOOTPRINTS)
def test_pairs_are_summed_first_over_what_an_address_lacks(name):
    case = ADDRESSED[name]
    found, _ = traced("score_mod", case.bind(*case.draw(SMALL)), ())
    accesses = Program.of(found.text).accesses
    assert [(access.footprint, access.by_difference) for access in accesses] == FOOTPRINTS[name]


# --------------------------------------------------------------------------------------------------------- bit for bit


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def gradients(function, table, query, backend):
    """The bytes of a captured table's gradient, of one backward after the other."""
    own = table.clone().requires_grad_()
    output = attend(query, query, query, score_mod=function(own), backend=backend)
    while True:
        (found,) = torch.autograd.grad(output, own, query, retain_graph=True)
        yield found.numpy().tobytes()


def of_runs(*arguments, runs=50):
    """How many different ones are among those of so many backwards, half of each of 2 calls."""
    return len({each for _ in range(2) for each in itertools.islice(gradients(*arguments), runs // 2)})


READ = {
    "as_a_bias": lambda t: lambda s, b, h, q, k: s + t[(q - k).clamp(-3, 3)],
    "as_factors": lambda t: lambda s, b, h, q, k: s * t[(q - k).clamp(-3, 3)] + s * t[(q * 5 + k * 3) % 7],
}


@pytest.mark.parametrize(
    ("name", "threads", "runs"),
    [("as_a_bias", 1, 50), ("as_factors", 1, 50), ("as_a_bias", 2, 50), ("as_factors", 2, 6)],
    indirect=["threads"],
)
def test_captured_gradients_are_the_same_bits_in_every_run_of_torch(name, threads, runs):
    """Above 2^15 elements torch adds up its own gradient of an index by atomics, in float32 on two threads.

    Where other work goes on, two threads wait for one another for most of the time: hence the few runs.
    """
    table, query = random_tensor(7, seed=1), random_tensor(1, 1, 184, 4, seed=2)
    assert of_runs(READ[name], table, query, "torch", runs=runs) == 1


def test_captured_gradients_are_the_same_bits_in_every_run_of_the_kernels():
    pytest.importorskip("triton", reason="triton is not installed")
    table, query = random_tensor(7, seed=1), random_tensor(1, 1, 20, 16, seed=2)
    assert of_runs(READ["as_factors"], table, query, "triton") == 1
