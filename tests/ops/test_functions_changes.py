"""Functions that change are traced again, and those that stay are not: changes that memory once did not see."""

import builtins
import collections
import functools
import sys
import types
from typing import Any

import pytest
import torch

import fastattn
from fastattn.ops.attention.functions import memory
from fastattn.reference import attention as reference
from fastattn.testing import random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")


def tensors(batch=1, heads=2, length=5, keys=None, size=8, *, seed=0, needs_grad=False):
    """Query, key and value."""
    shapes = ((batch, heads, n, size) for n in (length, keys or length, keys or length))
    return [random_tensor(*shape, seed=seed + n).requires_grad_(needs_grad) for n, shape in enumerate(shapes)]


# --------------------------------------------------------------------------------------------------- memory of traces


class _Callable:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, score, batch, head, query_index, key_index):
        return score * self.factor


class _Operations:
    def __init__(self, factor):
        self.factor = factor

    def __getitem__(self, index):
        return self.factor

    def __float__(self):
        return self.factor

    def __enter__(self):
        return self.factor

    def __exit__(self, *error):
        pass

    def __rmul__(self, other):
        return other * self.factor


def attribute_of_a_callable():
    of_object = _Callable(1.0)
    yield of_object
    yield _Callable(2.0)
    of_object.factor = 3.0
    yield of_object


def one_of_two_dictionaries():
    first, second = {"factor": 1.0}, {"factor": 2.0}

    def score_mod(score, batch, head, query_index, key_index):
        return score * first["factor"] * second["factor"]

    yield score_mod
    second["factor"] = 3.0
    yield score_mod


def one_of_two_partials():
    def times(score, factor):
        return score * factor

    partials = [functools.partial(times, factor=1.0), functools.partial(times, factor=2.0)]

    def score_mod(score, batch, head, query_index, key_index):
        return partials[1](partials[0](score))

    yield score_mod
    partials[1] = functools.partial(times, factor=3.0)
    yield score_mod


def attribute_of_a_class():
    class Config:
        factor = 1.0

    config = Config()
    yield lambda score, batch, head, query_index, key_index: score * Config.factor
    yield lambda score, batch, head, query_index, key_index: score * config.factor
    Config.factor = 2.0
    yield lambda score, batch, head, query_index, key_index: score * config.factor

    def score_mod(score, batch, head, query_index, key_index):
        return score * Config.factor

    yield score_mod
    Config.factor = 3.0
    yield score_mod


def method_of_a_class():
    class Methods:
        factor = 1.0

        @classmethod
        def of_class(cls, score):
            return score * cls.factor

        @property
        def times(self):
            return self.factor

    methods = Methods()

    def score_mod(score, batch, head, query_index, key_index):
        return methods.of_class(score) * methods.times

    yield score_mod
    Methods.factor = 2.0
    yield score_mod
    setattr(Methods, "times", property(lambda self: 3.0))  # noqa: B010 - its type is another
    yield score_mod


def attribute_of_a_module():
    module: Any = types.ModuleType("settings")
    module.factor, module.function = 1.0, lambda score: score

    def score_mod(score, batch, head, query_index, key_index):
        return module.function(score) * module.factor

    yield score_mod
    module.factor = 2.0
    yield score_mod
    module.function = lambda score: -score
    yield score_mod


def import_inside_of_the_function():
    module: Any = types.ModuleType("fastattn_test_settings")
    module.factor = 1.0
    sys.modules[module.__name__] = module

    def score_mod(score, batch, head, query_index, key_index):
        from fastattn_test_settings import factor  # pyrefly: ignore[missing-import]

        return score * factor

    yield score_mod
    module.factor = 2.0
    yield score_mod
    del sys.modules[module.__name__]


def function_in_a_cache():
    for factor in (1.0, 2.0):
        cached = functools.lru_cache(lambda factor=factor: factor)
        yield lambda score, batch, head, query_index, key_index, cached=cached: score * cached()


def name_that_another_function_has():
    """``a_config`` is met first, and only ``b_reads`` names its attribute."""
    a_config = types.SimpleNamespace(factor=1.0)

    def b_reads(config, score):
        return score * config.factor

    def score_mod(score, batch, head, query_index, key_index):
        return b_reads(a_config, score)

    yield score_mod
    a_config.factor = 2.0
    yield score_mod


def attribute_of_a_layer_of_torch():
    layer = torch.nn.LeakyReLU(0.1)

    def score_mod(score, batch, head, query_index, key_index):
        return layer(score)

    yield score_mod
    layer.negative_slope = 0.7
    yield score_mod
    layer.register_forward_hook(lambda layer, given, found: found * 2.0)
    yield score_mod


def attribute_in_a_slot():
    class Base:
        __slots__ = ("factor",)

    class Slotted(Base):
        pass

    slotted: Any = Slotted()

    def score_mod(score, batch, head, query_index, key_index):
        return score * slotted.factor

    for factor in (1.0, 2.0):
        slotted.factor = factor
        yield score_mod


def attribute_of_a_function():
    def score_mod(score, batch, head, query_index, key_index):
        return score * itself.factor

    itself: Any = score_mod
    for factor in (1.0, 2.0):
        itself.factor = factor
        yield score_mod


def attribute_of_a_container():
    class Missing(dict):
        factor = 0.0

        def __missing__(self, key):
            return self.factor

    missing = Missing()

    def score_mod(score, batch, head, query_index, key_index):
        return score * missing["factor"]

    for factor in (1.0, 2.0):
        missing.factor = factor
        yield score_mod


def operation_of_an_object():
    held = _Operations(1.0)

    def by_index(score, batch, head, query_index, key_index):
        return score * held[0]

    def by_conversion(score, batch, head, query_index, key_index):
        return score * float(held)

    def by_with(score, batch, head, query_index, key_index):
        with held as factor:
            return score * factor

    def by_product(score, batch, head, query_index, key_index):
        return score * (1.0 * held)

    for function in (by_index, by_conversion, by_with, by_product):
        for held.factor in (1.0, 2.0):
            yield function


def name_among_builtins():
    def score_mod(score, batch, head, query_index, key_index):
        return score * fastattn_factor  # noqa: F821  # pyrefly: ignore[unknown-name]

    for factor in (1.0, 2.0):
        vars(builtins)["fastattn_factor"] = factor
        yield score_mod
    del vars(builtins)["fastattn_factor"]


CHANGES = [
    attribute_of_a_callable, one_of_two_dictionaries, one_of_two_partials, attribute_of_a_class, method_of_a_class,
    attribute_of_a_module, import_inside_of_the_function, function_in_a_cache, name_that_another_function_has,
    attribute_of_a_layer_of_torch, attribute_in_a_slot, attribute_of_a_function, attribute_of_a_container,
    operation_of_an_object, name_among_builtins,
]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES, ids=lambda each: each.__name__)
def test_functions_that_change_are_traced_again(changes):
    """What a function reached in these ways was not in the key of its trace: after a change the old trace was used, and
    the result was that of the old function."""
    query, key, value = tensors()
    for score_mod in changes():
        found: Any = fastattn.attention(query, key, value, score_mod=score_mod)
        wanted = reference(query.double(), key.double(), value.double(), score_mod=score_mod).output
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


class _Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(random_tensor(2, seed=9))
        self.activation = torch.nn.Softplus()
        self.factor = 2.0

    def forward(self, score, batch, head, query_index, key_index):
        return self.activation(score) * self.factor + self.table[head]


def test_functions_that_stay_are_traced_once(monkeypatch):
    """Objects, layers and ``flex_attention``'s block masks were traced anew at every call."""
    traces = collections.Counter()

    def trace(kind, *arguments):
        traces[kind] += 1
        return known(kind, *arguments)

    known = memory.trace
    monkeypatch.setattr(memory, "trace", trace)
    query, key, value = tensors()
    layer, table = _Layer(), random_tensor(2, seed=8)
    for make in (
        lambda: layer,
        lambda: layer.forward,
        lambda: _Callable(4.0),
        lambda: lambda s, b, h, i, j: s * table[h],
    ):
        for _ in range(3):
            fastattn.attention(query, key, value, score_mod=make())
    assert traces == {"score_mod": 4}
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 5, 5, device="cpu")
    for _ in range(3):
        fastattn.flex_attention(query, key, value, block_mask=mask)
    assert traces["mask_mod"] == 1
