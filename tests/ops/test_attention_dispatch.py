"""Which backend runs: by argument, by context, by environment; and what explain says of it."""

import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import fastattn
from fastattn.ops.attention import direct, on_torch, on_triton
from fastattn.ops.common import backends
from fastattn.testing import attention_inputs
from tests.ops.attention_cases import attend


@pytest.fixture
def qkv(device):
    return [torch.randn(1, 2, 5, 8, device=device) for _ in range(3)]


@pytest.fixture
def ran(monkeypatch):
    """The backends that ran, in turn."""
    names = []
    for name, module in (("torch", on_torch), ("triton", on_triton)):

        def run(call, name=name, original=module.run):
            names.append(name)
            return original(call)

        monkeypatch.setattr(module, "run", run)

    originals = {name: getattr(direct, name) for name in ("attend_plainly", "attend_by_difference", "attend")}
    for name, way in originals.items():

        def attend(*arguments, way=way):
            output = way(*arguments)
            if output is not None:
                names.append("torch")
            return output

        monkeypatch.setattr(direct, name, attend)
    return names


def test_auto_takes_the_kernels_where_they_can_run(qkv, ran):
    pytest.importorskip("triton", reason="triton is not installed")
    attend(*qkv)
    assert ran == ["triton"]


def test_auto_takes_torch_where_the_kernels_refuse(qkv, ran):
    attend(*(t.double() for t in qkv))
    assert ran == ["torch"]


def test_backend_argument_wins_over_the_context(qkv, ran):
    pytest.importorskip("triton", reason="triton is not installed")
    with fastattn.use_backend("triton"):
        attend(*qkv, backend="torch")
    assert ran == ["torch"]


def test_use_backend_nests_and_restores(qkv, ran):
    pytest.importorskip("triton", reason="triton is not installed")
    before = backends.default_backend.value
    with fastattn.use_backend("torch"):
        attend(*qkv)
        with fastattn.use_backend("triton"):
            attend(*qkv)
        attend(*qkv)
    assert ran == ["torch", "triton", "torch"]
    assert backends.default_backend.value == before


def test_use_backend_restores_after_an_exception():
    before = backends.default_backend.value
    with pytest.raises(KeyError), fastattn.use_backend("torch"):
        raise KeyError
    assert backends.default_backend.value == before


def test_use_backend_refuses_an_unknown_name():
    before = backends.default_backend.value
    with pytest.raises(ValueError, match=r"backend='flash'.*'auto', 'triton', 'torch'"), fastattn.use_backend("flash"):  # type: ignore[arg-type]
        pass
    assert backends.default_backend.value == before


# ------------------------------------------------------------------------------------------------------------ explain

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "weights": {"need_weights": True},
    "lse": {"return_lse": True},
    "dropout": {"dropout_p": 0.5},
    "window": {"window": (2, 1)},
    "documents": {"documents": True, "softcap": 2.0},
    "float64": {"dtype": torch.float64},
    "large_head": {"size": 600},
    "bias_with_gradient": {"bias": True},
}


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
@pytest.mark.parametrize("name", CALLS)
def test_explain_agrees_with_what_runs(name, backend, device, ran):
    arguments = dict(CALLS[name])
    dtype, size = arguments.pop("dtype", torch.float32), arguments.pop("size", 8)
    qkv = [torch.randn(1, 2, 5, size, device=device, dtype=dtype) for _ in range(3)]
    if arguments.pop("documents", False):
        arguments["document_ids"] = torch.tensor([[0, 0, 1, 1, 1]], device=device)
    if arguments.pop("bias", False):
        arguments["attn_mask"] = torch.zeros(5, 5, device=device, requires_grad=True)
    said = fastattn.explain(*qkv, **arguments, backend=backend)
    assert not ran
    if said.backend is None:
        with pytest.raises(NotImplementedError) as caught:
            attend(*qkv, **arguments, backend=backend)
        for reason in said.refusals[backend]:
            assert reason in str(caught.value)
        assert "no backend would run" in str(said)
        assert not ran
    else:
        attend(*qkv, **arguments, backend=backend)
        assert ran == [said.backend]
        assert str(said).startswith(f"{said.backend}: {said.path}")
    assert set(said.refusals) <= {"torch", "triton"}
    for backend_name, reasons in said.refusals.items():
        assert f"not {backend_name}: {'; '.join(reasons)}" in str(said)


def test_explain_gives_every_reason_at_once(device):
    query = torch.zeros(1, 1, 4, 600, dtype=torch.float64, device=device)
    reasons = fastattn.explain(query, query, query).refusals["triton"]
    assert sum("float64" in r for r in reasons) == 1
    assert sum("600" in r for r in reasons) == 2


def test_auto_says_once_that_it_fell_back(device, caplog, monkeypatch):
    """Where the kernels run, a silent fall-back costs the user the speed he came for (transformers#46960)."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(backends, "_said", set())
    query = torch.zeros(1, 1, 4, 8, dtype=torch.float64, device=device)
    for _ in range(2):
        fastattn.explain(query, query, query)
    said = [r.getMessage() for r in caplog.records if r.name == "fastattn"]
    assert len(said) == 1
    assert "float64" in said[0]


def others(device):
    """A call of each other operator, by arguments that its kernels take, and the changes that they refuse."""
    x, weight = torch.randn(3, 8, device=device), torch.randn(8, device=device)
    rows = torch.randn(1, 3, 8, device=device)
    return {
        fastattn.add_layer_norm: ((x, x, weight), {"out_dtype": torch.float64}),
        fastattn.add_rms_norm: ((x, None, weight), {"out_dtype": torch.float64}),
        fastattn.layer_norm: ((x, 8, weight), {"weight": weight.double()}),
        fastattn.rms_norm: ((x, 8), {"weight": weight.double()}),
        fastattn.additive_attention: ((rows, rows, rows, weight), {"attn_mask": torch.zeros(3, 3).double()}),
    }


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
@pytest.mark.parametrize("name", [f.__name__ for f in others(torch.device("cpu"))])
def test_explain_knows_every_operator(name, backend, device):
    pytest.importorskip("triton", reason="triton is not installed")
    function = getattr(fastattn, name)
    arguments, refused = others(device)[function]
    said = fastattn.explain(function, *arguments, backend=backend)
    assert said.backend == ("torch" if backend == "torch" else "triton") and said.path and not said.refusals
    refused = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in refused.items()}
    said = fastattn.explain(
        function, *(arguments[:2] if "weight" in refused else arguments), backend=backend, **refused
    )
    assert "float64" in said.refusals["triton"][0]
    assert said.backend == (None if backend == "triton" else "torch")


def test_explain_of_what_is_no_operator_says_what_is():
    with pytest.raises(TypeError, match=r"'relu' cannot be explained: expected one of attention, attention_varlen, "):
        fastattn.explain(torch.relu, torch.zeros(1))


# -------------------------------------------------------------------------------------------------------- environment


def in_a_process(code, **environment):
    paths = os.pathsep.join([p for p in sys.path if p])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("name", ["torch", "auto"])
def test_environment_sets_the_default_backend(name):
    code = "import fastattn, torch; q = torch.ones(1, 1, 3, 4); print(fastattn.explain(q, q, q).backend)"
    result = in_a_process(code, FASTATTN_BACKEND=name, TRITON_INTERPRET="0")
    assert result.stdout.strip() == "torch", result.stderr  # without the interpreter there are no kernels on a CPU


def test_environment_backend_refuses_by_name():
    code = "import fastattn, torch; q = torch.ones(1, 1, 3, 4); fastattn.attention(q, q, q)"
    result = in_a_process(code, FASTATTN_BACKEND="triton", TRITON_INTERPRET="0")
    assert result.returncode != 0
    assert "NotImplementedError: the triton backend refuses this call" in result.stderr


def test_environment_with_an_unknown_name_fails_at_import():
    result = in_a_process("import fastattn", FASTATTN_BACKEND="quick")
    assert result.returncode != 0
    assert "FASTATTN_BACKEND='quick': expected one of 'auto', 'triton', 'torch'" in result.stderr


# ------------------------------------------------------------------------------------- switches and several threads


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_switches_may_be_left_in_any_order(order):
    """Two threads, or two generators, overlap: the one that is left first must not bring back what the other, who
    entered in between, has found."""
    switches: list[tuple[Any, list[Any]]] = [
        (backends.default_backend, ["torch", "triton", "auto"]),
        (
            backends.chosen_kernels,
            [backends.KernelChoice("gluon"), backends.KernelChoice("auto", False), backends.KernelChoice()],
        ),
    ]
    for switch, values in switches:
        before = switch.value
        contexts: list[Any] = [switch.set(value) for value in values]
        for context, value in zip(contexts, values):
            context.__enter__()
            assert switch.value == value
        inside = list(values)
        for i in order:
            contexts[i].__exit__(None, None, None)
            inside[i] = None
            assert switch.value == next((v for v in reversed(inside) if v is not None), before)


def test_switches_of_threads_end_as_they_began():
    before, failures = backends.default_backend.value, []

    def work(name):
        for _ in range(300):
            with fastattn.use_backend(name):
                if backends.default_backend.value not in ("torch", "triton"):
                    failures.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("torch", "triton") * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert backends.default_backend.value == before


def test_use_backend_inside_a_compiled_function():
    torch._dynamo.reset()

    def function(query):
        with fastattn.use_backend("torch"):
            return attend(query, query, query)

    query = attention_inputs(1, 1, 3, 3, 8)[0]
    before = backends.default_backend.value
    torch.testing.assert_close(torch.compile(function, backend="eager", fullgraph=True)(query), function(query))
    assert backends.default_backend.value == before


COMPILED: dict[str, Any] = {
    "attention": lambda x: fastattn.attention(x[None], x[None], x[None]),
    "attention_varlen": lambda x: fastattn.attention_varlen(x, x, x, torch.zeros(2, dtype=torch.int32)),
    "additive_attention": lambda x: fastattn.additive_attention(x, x, x, x[0, 0]),
    "layer_norm": lambda x: fastattn.layer_norm(x, x.shape[-1:]),
}


@pytest.mark.parametrize("name", COMPILED)
def test_auto_takes_the_kernels_in_a_compiled_function(name, device):
    """``torch.compile`` of torch 2.11 says that it exports, and got the graph that leaves the process: torch's own
    operators, or a refusal."""
    pytest.importorskip("triton", reason="triton is not installed")
    torch._dynamo.reset()
    targets = []

    def keep(graph_module, _):
        targets.extend(str(node.target) for node in graph_module.graph.nodes)
        return graph_module.forward

    compiler: Any = aot_autograd(fw_compiler=keep)
    x = torch.randn(2, 4, 8, device=device)
    torch.compile(COMPILED[name], backend=compiler, fullgraph=True)(x)
    assert any(target.startswith("fastattn.") for target in targets), targets
