"""``fastattn.integrations.diffusers.register``: a backend of diffusers is ours for a while.

Where diffusers is not installed, a stand-in has the part of its registry that is used; ``make clients`` runs these
tests with diffusers itself, too.
"""

import enum
import importlib.util
import inspect
import sys
import types
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn.integrations import diffusers
from fastattn.testing import random_tensor

DISPATCH = "diffusers.models.attention_dispatch"


@pytest.fixture(autouse=True)
def _torch_backend():
    """What is tested is the way there."""
    with fastattn.use_backend("torch"):
        yield


def native(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, return_lse=False,
    _parallel_config=None,
):  # fmt: skip
    """As diffusers 0.42 has it, without context parallelism."""
    if return_lse:
        raise ValueError("Native attention backend does not support setting `return_lse=True`.")
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    query, key, value = (x.permute(0, 2, 1, 3) for x in (query, key, value))
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return output.permute(0, 2, 1, 3)


def flash(query, key, value, dropout_p=0.0):
    """A member whose function takes no masks."""


def stand_in() -> types.ModuleType:
    module: Any = types.ModuleType(DISPATCH)

    class AttentionBackendName(str, enum.Enum):
        NATIVE = "native"
        FLASH = "flash"
        _NATIVE_MATH = "_native_math"

    class Registry:
        _backends: ClassVar[dict] = {}
        _constraints: ClassVar[dict] = {}
        _supported_arg_names: ClassVar[dict] = {}

        @classmethod
        def register(cls, backend, constraints=None):
            def decorator(function):
                cls._backends[backend] = function
                cls._constraints[backend] = constraints or []
                cls._supported_arg_names[backend] = set(inspect.signature(function).parameters)
                return function

            return decorator

    for name, function in (("native", native), ("flash", flash), ("_native_math", native)):
        Registry.register(AttentionBackendName(name))(function)

    def dispatch(query, key, value, *, backend=AttentionBackendName.NATIVE, parallel_config=None, **arguments):
        arguments = {"query": query, "key": key, "value": value, "_parallel_config": parallel_config, **arguments}
        known = Registry._supported_arg_names[backend]
        return Registry._backends[backend](**{name: arg for name, arg in arguments.items() if name in known})

    module.AttentionBackendName, module._AttentionBackendRegistry = AttentionBackendName, Registry
    module.dispatch_attention_fn = dispatch
    return module


@pytest.fixture(params=["stand-in", "diffusers"])
def module(request, monkeypatch):
    """The module of the registry."""
    if request.param == "stand-in":
        found = stand_in()
        for name in ("diffusers", "diffusers.models", DISPATCH):
            monkeypatch.setitem(sys.modules, name, found)
        return found
    if importlib.util.find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed: `make clients` runs this")
    return importlib.import_module(DISPATCH)


def qkv(*, requires_grad=False):
    """``[B, L, H, D]``, as diffusers has them."""
    return [random_tensor(2, 5, 3, 8, seed=i).requires_grad_(requires_grad) for i in range(3)]


MASKS = {
    "none": None,
    "keys": torch.arange(5) < torch.tensor([[5], [3]]),
    "additive by keys": torch.where(torch.arange(5) < torch.tensor([[5], [3]]), 0.0, -10000.0),
    "by heads": random_tensor(2, 3, 5, 5, seed=9),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_registered_backend_computes_what_the_members_own_does(module, mask):
    inputs, again = qkv(requires_grad=True), qkv(requires_grad=True)
    expected = module.dispatch_attention_fn(*inputs, attn_mask=mask, scale=0.3)
    with diffusers.register() as registration:
        found = module.dispatch_attention_fn(*again, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(found, expected)
    expected.sum().backward()
    found.sum().backward()
    torch.testing.assert_close([x.grad for x in again], [x.grad for x in inputs])
    assert (registration.member, registration.routed, registration.refused.total()) == ("native", 1, 0)


def test_registered_backend_takes_grouped_heads_and_causality(module):
    query, key, value = (random_tensor(2, 5, heads, 8, seed=heads) for heads in (4, 2, 2))
    options = {"enable_gqa": True, "is_causal": True}
    expected = module.dispatch_attention_fn(query, key, value, **options)
    with diffusers.register() as registration:
        torch.testing.assert_close(module.dispatch_attention_fn(query, key, value, **options), expected)
    assert registration.routed == 1


def test_undo_gives_the_member_back_what_it_had(module):
    registry, member = module._AttentionBackendRegistry, module.AttentionBackendName("native")
    tables = [getattr(registry, name) for name in ("_backends", "_constraints", "_supported_arg_names")]
    before = [dict(table) for table in tables]
    registration = diffusers.register()
    assert registry._backends[member] is not before[0][member]
    assert registry._constraints[member] == before[1][member]
    registration.undo()
    registration.undo()
    assert [dict(table) for table in tables] == before


def test_exception_gives_the_member_back_what_it_had(module):
    backends = module._AttentionBackendRegistry._backends
    before = dict(backends)

    def fail():
        with diffusers.register():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert backends == before


def test_undo_refuses_while_somebody_else_has_the_member(module):
    with diffusers.register(), diffusers.register() as inner:
        module.dispatch_attention_fn(*qkv())
    assert inner.routed == 1
    outer, inner = diffusers.register(), diffusers.register()
    with pytest.raises(RuntimeError, match=r"'native' has another function by now"):
        outer.undo()
    inner.undo()
    outer.undo()


def test_another_member_leaves_the_native_one_alone(module):
    with diffusers.register("_native_math") as registration:
        module.dispatch_attention_fn(*qkv())
        assert registration.routed == 0
        module.dispatch_attention_fn(*qkv(), backend=module.AttentionBackendName("_native_math"))
        assert registration.routed == 1


def test_what_ours_refuses_runs_on_the_members_own_function(module):
    inputs = [x.double() for x in qkv()]
    expected = module.dispatch_attention_fn(*inputs)
    with fastattn.use_backend("triton"), diffusers.register() as registration:
        assert torch.equal(module.dispatch_attention_fn(*inputs), expected)
    assert registration.routed == 0 and registration.refused.total() == 1
    assert "query is torch.float64" in str(registration)


def test_context_parallelism_and_lse_are_the_members_own_matter(module):
    backend = module._AttentionBackendRegistry._backends
    with diffusers.register() as registration:
        function = backend[module.AttentionBackendName("native")]
        with pytest.raises(ValueError, match="return_lse"):
            function(*qkv(), return_lse=True)
    assert registration.refused == {"return_lse": 1}


def test_compiled_graph_calls_ours(module):
    inputs = qkv()
    with diffusers.register() as registration:
        compiled = torch.compile(module.dispatch_attention_fn, backend="eager", fullgraph=True)
        for _ in range(2):
            found = compiled(*inputs)
        torch.testing.assert_close(found, module.dispatch_attention_fn(*inputs))
    assert (registration.traced, registration.routed) == (1, 1)


def test_a_member_that_there_is_not_is_named(module):
    with pytest.raises(ValueError, match=r"member='fast': expected one of .*native"):
        diffusers.register("fast")


def test_a_member_of_other_arguments_is_refused(module):
    with pytest.raises(RuntimeError, match=r"'flash' takes \(query, key, value, .*expected \(query, .*attn_mask"):
        diffusers.register("flash")


def test_missing_diffusers_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(ImportError, match=r"diffusers is not installed: expected diffusers 0.42"):
        diffusers.register()


@pytest.mark.parametrize("gone", ["_AttentionBackendRegistry", "AttentionBackendName"])
def test_diffusers_without_a_registry_is_named(monkeypatch, gone):
    found = stand_in()
    delattr(found, gone)
    for name in ("diffusers", "diffusers.models", DISPATCH):
        monkeypatch.setitem(sys.modules, name, found)
    with pytest.raises(ImportError, match=f"has no {gone}: expected it as in diffusers 0.42"):
        diffusers.register()


def test_another_registry_is_refused(monkeypatch):
    found = stand_in()
    del found._AttentionBackendRegistry._constraints
    for name in ("diffusers", "diffusers.models", DISPATCH):
        monkeypatch.setitem(sys.modules, name, found)
    with pytest.raises(RuntimeError, match=r"has no _constraints of 'native': expected it as in 0.42"):
        diffusers.register()
