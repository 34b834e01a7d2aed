"""What a trace depends on: functions are traced again where something has changed, and only there."""

import gc
import os
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch

from fastattn.ops.attention.functions import memory
from fastattn.ops.attention.functions.in_triton import source
from fastattn.ops.attention.functions.program import Program
from fastattn.testing import random_tensor
from tests.ops.attention_cases import attend


@pytest.fixture
def traces(monkeypatch):
    """The texts of the functions that were traced."""
    texts = []

    def trace(*arguments):
        found = traces(*arguments)
        texts.append(found.text)
        return found

    traces = memory.trace
    monkeypatch.setattr(memory, "trace", trace)
    return texts


def text_of(function, *arguments):
    return memory.traced("score_mod", function, arguments)[0].text


def scaled(table, factor: Any = 2.0):
    def score_mod(score, batch, head, query_index, key_index):
        return score * factor + table[head, key_index % 3]

    return score_mod


# ------------------------------------------------------------------------------------------------------------ the same


def test_another_tensor_length_or_batch_is_not_traced_again(traces):
    for seed, (batch, length) in enumerate([(1, 4), (2, 4), (1, 9)]):
        query, table = random_tensor(batch, 2, length, 8, seed=seed), random_tensor(2, 3, seed=seed)
        found = attend(query, query, query, score_mod=scaled(table), backend="torch")
        bias = table[:, torch.arange(length) % 3][None, :, None]
        torch.testing.assert_close(found, attend(query, query, query, attn_mask=bias, scale=2 / 8**0.5))
    assert len(traces) <= 1


@pytest.mark.parametrize(
    "table", [random_tensor(5, 7, seed=1), random_tensor(2, 3, seed=1).half(), random_tensor(3, 2, seed=1).T], ids=str
)
def test_another_size_width_or_stride_gives_the_same_program(table):
    assert text_of(scaled(table)) == text_of(scaled(random_tensor(2, 3, seed=2)))


class Holder:
    """Has attributes of which functions read some."""

    def __init__(self, table, factor):
        self.table, self.factor, self.unused = table, factor, 0

    def score_mod(self, score, batch, head, query_index, key_index):
        return score * self.factor + self.table[head, 0]


def test_attributes_that_are_not_read_do_not_count(traces):
    holder = Holder(random_tensor(2, 2, seed=1), 3.5)
    expected = text_of(holder.score_mod)
    holder.unused, holder.table = 1, random_tensor(2, 2, seed=2)
    assert text_of(holder.score_mod) == expected
    assert len(traces) == 1


# ----------------------------------------------------------------------------------------------------------- different

FACTOR = 2.0


def by_global(score, batch, head, query_index, key_index):
    return score * FACTOR


def helper(score):
    return score + 1.0


def by_helper(score, batch, head, query_index, key_index):
    return helper(score)


def by_item(numbers):
    return lambda score, batch, head, query_index, key_index: score * numbers["a"][0] + numbers["b"]


def test_another_captured_number_is_another_program():
    table = random_tensor(2, 3, seed=1)
    assert len({text_of(scaled(table, factor)) for factor in (2.0, 2.5, 3, True, -0.0, 0.0)}) == 6


def test_a_changed_attribute_is_another_program():
    holder = Holder(random_tensor(2, 2, seed=1), 2.0)
    before = text_of(holder.score_mod)
    holder.factor = 3.0
    assert "3.0" in text_of(holder.score_mod) != before


def test_a_changed_global_is_another_program(monkeypatch):
    before = text_of(by_global)
    monkeypatch.setitem(globals(), "FACTOR", 5.0)
    assert "5.0" in text_of(by_global) != before


def test_a_replaced_function_is_another_program(monkeypatch):
    before = text_of(by_helper)
    monkeypatch.setitem(globals(), "helper", lambda score: score - 7.0)
    assert "7.0" in text_of(by_helper) != before


def test_a_replaced_method_is_another_program(monkeypatch):
    holder = Holder(random_tensor(2, 2, seed=1), 2.0)
    before = text_of(holder.score_mod)
    monkeypatch.setattr(Holder, "score_mod", lambda self, score, b, h, q, k: score + self.table[h, 1])
    assert text_of(holder.score_mod) != before


def test_a_changed_container_is_another_program():
    numbers: Any = {"a": [2.0], "b": 1.0}
    function = by_item(numbers)
    before = text_of(function)
    numbers["a"][0] = 4.0
    assert "4.0" in text_of(function) != before


def test_a_changed_default_is_another_program():
    def function(score, b, h, q, k, factor=2.0):
        return score * factor

    before = text_of(function)
    function.__defaults__ = (6.0,)
    assert "6.0" in text_of(function) != before


def two(first, second):
    return lambda score, batch, head, query_index, key_index: score + first[head] * second[head]


def test_one_tensor_in_two_places_is_another_program():
    """And its gradient is that of both places."""
    first, second = (random_tensor(2, seed=i).requires_grad_() for i in range(2))
    assert text_of(two(first, second)) != text_of(two(first, first))
    query = random_tensor(1, 2, 4, 8, seed=3)

    def gradients(function, *tensors):
        output = attend(query, query, query, score_mod=function, return_lse=True, backend="torch")[1]
        return torch.autograd.grad(output.sum(), tensors)

    (found,) = gradients(two(first, first), first)
    torch.testing.assert_close(found, 2 * gradients(two(first, first.detach().clone()), first)[0])


def test_which_of_three_tensors_are_one_is_told_apart():
    def function(*tensors):
        return lambda score, b, h, q, k: score * tensors[0][h] + tensors[1][h] ** 2 - tensors[2][q]

    first, second = torch.ones(2), torch.zeros(2)
    assert text_of(function(first, first, second)) != text_of(function(first, second, second))


def test_another_number_of_axes_or_kind_is_another_program():
    def function(tensor):
        return lambda score, batch, head, query_index, key_index: score * tensor[head]

    assert text_of(function(torch.ones(2))) != text_of(function(torch.ones(2).int()))


# ------------------------------------------------------------------------------------------------------ not remembered


def test_what_cannot_be_told_is_traced_every_time(traces):
    holder = Holder(random_tensor(2, 2, seed=1), 2.0)

    def function(score, batch, head, query_index, key_index):
        return score * getattr(holder, "fac" + "tor")

    before = text_of(function)
    assert text_of(function) == before and len(traces) == 2
    holder.factor = 9.0
    assert "9.0" in text_of(function)


def test_an_object_with_its_own_attribute_access_is_traced_every_time(traces):
    class Dynamic:
        def __getattr__(self, name):
            return state[name]

    state, dynamic = {"factor": 2.0}, Dynamic()

    def function(score, batch, head, query_index, key_index):
        return score * dynamic.factor

    before = text_of(function)
    state["factor"] = 8.0
    assert "8.0" in text_of(function) != before and len(traces) == 2


def test_refusals_are_not_remembered():
    numbers: Any = [None]

    def function(score, batch, head, query_index, key_index):
        return score * numbers[0]

    with pytest.raises(TypeError):
        text_of(function)
    numbers[0] = 2.0
    assert "2.0" in text_of(function)


def test_captured_tensors_are_not_kept_alive(backend):
    query, table = random_tensor(1, 2, 4, 16, seed=1), random_tensor(2, 3, seed=2).requires_grad_()
    module = Holder(table, 2.0)
    for function in (scaled(table), module.score_mod, scaled(2 * table)):
        attend(query, query, query, score_mod=function, backend=backend).sum().backward()
    alive = [weakref.ref(each) for each in (table, module, query)]
    del table, module, function, query
    gc.collect()
    assert [each() for each in alive] == [None] * 3


# ------------------------------------------------------------------------------------------------------------- sources

WRITTEN = """
import torch

table, buckets = torch.ones(3, 4), torch.arange(9)

def score_mod(score, batch, head, query_index, key_index):
    place = buckets[(query_index - key_index).clamp(0, 8)] % 4
    return torch.tanh(score * 0.3) * table.exp()[head, place] + table[0, place] * torch.tensor([1.0, 2.0])[head]
"""
PRINTED = """
from fastattn.ops.attention.functions.memory import traced
from fastattn.ops.attention.functions.program import Program
from fastattn.ops.attention.functions.in_triton import source
program = Program.of(traced("score_mod", score_mod, ())[0].text)
print(source(program, "function") + "".join(source(program.gradient, "derivative", i) for i in range(4)), end="")
"""


def test_another_process_writes_the_same_kernels():
    """They are entries of Triton's cache by their text."""
    names: dict[str, Any] = {}
    exec(WRITTEN, names)
    program = Program.of(text_of(names["score_mod"]))
    assert len(program.gradient.results) == 4
    own = source(program, "function") + "".join(source(program.gradient, "derivative", i) for i in range(4))
    command = [sys.executable, "-c", WRITTEN + PRINTED]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert found.stdout == own
