"""Faults that functions of scores and of pairs had in graphs, gradients, threads and block masks."""

import threading
from typing import Any

import pytest
import torch

import fastattn
from fastattn.ops.attention.functions.program import Program
from fastattn.reference import attention as reference
from fastattn.testing import random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")


def tensors(batch=1, heads=2, length=5, keys=None, size=8, *, seed=0, needs_grad=False):
    """Query, key and value."""
    shapes = ((batch, heads, n, size) for n in (length, keys or length, keys or length))
    return [random_tensor(*shape, seed=seed + n).requires_grad_(needs_grad) for n, shape in enumerate(shapes)]


# ------------------------------------------------------------------------------------------------------ torch.compile


def _by_literal(query, key, value, table):
    factors = torch.tensor([2.0, 3.0])
    return fastattn.attention(
        query,
        key,
        value,
        score_mod=lambda score, b, h, i, j: score * torch.tensor([2.0, 3.0])[h] * factors[h] * table[h],
    )


def _by_views(query, key, value, table):
    query, key, value = torch.cat([query, key, value], -1).chunk(3, -1)
    first, second = torch.stack([table, table + 1.0]).unbind(0)
    return fastattn.attention(
        query,
        key,
        value,
        alibi_slopes=table,
        score_mod=lambda score, b, h, i, j: score * first[h] + second[h] + table[h],
    )


def _by_grad(query, key, value, table):
    def total(table):
        found: Any = fastattn.attention(query, key, value, score_mod=lambda s, b, h, i, j: s * table[h])
        return found.square().sum()

    return torch.func.grad(total)(table)


@pytest.mark.parametrize("function", [_by_literal, _by_views, _by_grad], ids=lambda each: each.__name__.strip("_"))
def test_functions_in_graphs_take_what_eager_calls_take(function):
    """Inside ``torch.compile`` a tensor that the function makes of numbers was an error, and so were query, key and
    value that are views of one tensor (a packed projection's), an argument of the call that the function captures too,
    and ``torch.func.grad``: torch's higher-order operators refuse operands of one storage unless they are told."""
    query, key, value = tensors(needs_grad=True)
    table = random_tensor(2, seed=7).requires_grad_()
    wanted = function(query, key, value, table)
    found = torch.compile(function, backend="aot_eager", fullgraph=True)(query, key, value, table)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    leaves = (query, key, value, table) if found.requires_grad else ()
    if leaves:
        gradients = (torch.autograd.grad(each.square().sum(), leaves) for each in (found, wanted))
        for ours, theirs in zip(*gradients):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- gradients


def _without_grad(score):
    with torch.no_grad():
        return score * 2.0


STOPPED = {
    "straight_through": lambda table: lambda score, b, h, i, j: score + (score.round() - score).detach() * table[h],
    "no_grad": lambda table: lambda score, b, h, i, j: _without_grad(score) * table[h] + score,
    "captured": lambda table: lambda score, b, h, i, j: score + table[h].detach() * j * table[h],
    "prologue": lambda table: lambda score, b, h, i, j: score * table.exp().detach()[h] * table[h],
}


@pytest.mark.parametrize("name", STOPPED)
def test_functions_stop_gradients_where_they_say_so(name, backend):
    """``detach`` and ``torch.no_grad`` inside a function were ignored: their gradients were those of the function
    without them, in the score and in what is captured."""
    found, wanted = _gradients(STOPPED[name], {}, backend)
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def _gradients(make, words, backend, captured=None):
    """Of query, key, value and a captured table: ours, and those of plain torch in float64."""
    query, key, value = tensors(length=9, needs_grad=True)
    leaves = query, key, value, random_tensor(2, seed=7).requires_grad_()
    d_output = random_tensor(1, 2, 9, 8, seed=99)
    output: Any = fastattn.attention(query, key, value, score_mod=make(leaves[3]), backend=backend, **words)
    found = torch.autograd.grad(output, leaves, d_output)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    seen = torch.ones(9, 9, dtype=torch.bool).tril() if words else None
    output = reference(*exact[:3], score_mod=(captured or make)(exact[3]), mask=seen).output
    return found, torch.autograd.grad(output, exact, d_output.double())


def test_functions_gradients_are_not_nan_by_hidden_pairs(backend):
    """On the torch backend a short call's score_mod became a bias, and the slope ``sqrt(-1)`` of a pair that causality
    hides made the gradient of what is captured NaN."""
    found, wanted = _gradients(
        lambda table: lambda score, b, h, i, j: score + (i - j).float().sqrt() * table[h],
        {"is_causal": True},
        backend,
        captured=lambda table: lambda score, b, h, i, j: score + (i - j).clamp(min=0).double().sqrt() * table[h],
    )
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_functions_that_make_complex_numbers_are_refused():
    """The imaginary part was dropped in silence."""
    with pytest.raises((NotImplementedError, TypeError), match="complex"):
        fastattn.attention(*tensors(), score_mod=lambda score, b, h, i, j: score * 1j)


# ------------------------------------------------------------------------------------------------------------ threads


def test_functions_are_traced_by_several_threads_at_once():
    """Torch's tracers patch modules, and two threads that traced at one time disturbed each other."""
    failed = []

    def run(number):
        try:
            query, key, value = tensors(seed=number, needs_grad=True)
            for factor in (1.5, 2.5):
                shift = number + factor

                def score_mod(score, batch, head, query_index, key_index):
                    return torch.tanh(score) * shift  # noqa: B023  # the call is over before it changes

                found: Any = fastattn.attention(query, key, value, score_mod=score_mod, backend="torch")
                found.sum().backward()
                wanted = reference(query.double(), key.double(), value.double(), score_mod=score_mod).output
                torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


# -------------------------------------------------------------------------------------------------------- block masks


def _block_mask(batch=None):
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: i >= j, batch, None, 32, 32, device="cpu", BLOCK_SIZE=16)


@pytest.mark.parametrize("name", ["kv_num_blocks", "full_kv_num_blocks"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "replaced"])
def test_flex_attention_sees_that_lists_of_a_block_mask_change(name, in_place):
    """Only the versions of two of the four lists were looked at, and whether a list had been replaced was not."""
    query, key, value = tensors(length=32)
    mask = _block_mask()
    before: Any = fastattn.flex_attention(query, key, value, block_mask=mask)
    if in_place:
        getattr(mask, name).zero_()
    else:
        setattr(mask, name, torch.zeros_like(getattr(mask, name)))
    found: Any = fastattn.flex_attention(query, key, value, block_mask=mask)
    row, column = torch.arange(32)[:, None], torch.arange(32)
    gone = row // 16 == column // 16 if name == "kv_num_blocks" else row // 16 > column // 16
    seen = (row >= column) & ~gone
    wanted = reference(query.double(), key.double(), value.double(), mask=seen).output
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.equal(before, found)


def test_flex_attention_takes_block_masks_of_inference_mode():
    """Tensors of inference mode have no version, and looking for it was an error of torch's."""
    query, key, value = tensors(length=32)
    with torch.inference_mode():
        mask = _block_mask()
        found: Any = fastattn.flex_attention(query, key, value, block_mask=mask)
    wanted: Any = fastattn.attention(query, key, value, is_causal=True)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_flex_attention_refuses_a_block_mask_of_fewer_entries():
    """It was an index out of bounds."""
    query, key, value = tensors(3, length=32)
    with pytest.raises(ValueError, match=r"2 batch entries .* 3 batch entries"):
        fastattn.flex_attention(query, key, value, block_mask=_block_mask(2))


# --------------------------------------------------------------------------------------------------------- evaluation


def test_functions_are_not_differentiated_in_evaluation(backend, monkeypatch):
    """The kernels' forward once made the gradient as well, which a function need not have that only evaluates."""
    query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))

    def refused(program):
        raise AssertionError("a gradient was made")

    monkeypatch.setattr(Program, "gradient", property(refused))
    with torch.no_grad():
        fastattn.attention(query, key, value, score_mod=lambda s, b, h, i, j: torch.tanh(s) * 0.7123, backend=backend)
