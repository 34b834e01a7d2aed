"""Which kernels run a call of attention: Gluon's or plain Triton's, by device, problem, wish, and what compiles."""

import dataclasses
import sys
from typing import Any

import pytest
import torch
from triton.compiler.errors import CompilationError

import fastattn
from fastattn_kernels.attention import choice as module
from fastattn_kernels.common.device import Target
from fastattn_kernels.common.gradients import Gradients
from fastattn_kernels.common.problem import Problem

attention: Any = module  # stand-ins take the place of tensors
nothing: Any = None
NOTHING = Gradients(nothing, nothing, nothing)


class Kernels:
    """Stand-ins that note what is launched; the Gluon ones refuse, fail or work."""

    def __init__(self, monkeypatch, target: Any = ("cuda", 90)):
        self.launched: list[str] = []
        self.reasons: list[str] = []
        self.error: Exception | None = None
        gluon = attention.GluonKernels(lambda problem: list(self.reasons), self._gluon)
        monkeypatch.setattr(attention, "target_of", lambda device: Target(*target))
        monkeypatch.setattr(attention, "gluon_kernels", lambda direction: gluon)
        monkeypatch.setattr(attention, "not_compiling", {})
        monkeypatch.setattr(attention, "fewest_operations", 0)
        for of, name in ((attention.forward, "launch_attention_fwd"), (attention.backward, "launch_attention_bwd")):
            monkeypatch.setattr(of, name, lambda *a, **k: self.launched.append("plain"))

    def _gluon(self, *arguments, **keywords):
        if self.error is not None:
            raise self.error
        self.launched.append("gluon")

    def run(self, kernels="auto", direction="forward", **changes):
        """What one launch launched."""
        before = len(self.launched)
        if direction == "forward":
            attention.launch_attention_fwd(problem(**changes), *(None,) * 3, kernels=kernels)
        else:
            attention.launch_attention_bwd(problem(**changes), *(None,) * 4, NOTHING, kernels=kernels)
        return self.launched[before:]


def problem(**changes: Any) -> Problem:
    query = torch.zeros(1, 2, 4, 16, dtype=torch.bfloat16)
    arguments: Any = {"scale": 0.25, **changes}
    return Problem(query, query, query, **arguments)


@pytest.fixture
def kernels(monkeypatch):
    return Kernels(monkeypatch)


BOTH = pytest.mark.parametrize("direction", ["forward", "backward"])


@BOTH
def test_gluon_runs_where_it_can(kernels, direction):
    assert kernels.run(direction=direction) == ["gluon"]
    assert kernels.run("gluon", direction) == ["gluon"]
    assert kernels.run("triton", direction) == ["plain"]


@BOTH
def test_what_gluon_refuses_runs_plain_unless_it_was_asked_for_by_name(kernels, direction):
    kernels.reasons = ["it rains", "it pours"]
    assert kernels.run(direction=direction) == ["plain"]
    with pytest.raises(NotImplementedError, match=f"refuse this {direction}: it rains; it pours"):
        kernels.run("gluon", direction)
    assert "forward in plain Triton (not in Gluon: it rains; it pours)" in attention.describe(problem())


@pytest.mark.parametrize("target", [("cuda", 80), ("cuda", 100), ("hip", "gfx942"), ("interpreter", 0)])
def test_other_devices_have_plain_kernels(monkeypatch, target):
    kernels = Kernels(monkeypatch, target)
    assert kernels.run() == ["plain"]
    with pytest.raises(NotImplementedError, match=f"this is {target[0]}:{target[1]}"):
        kernels.run("gluon")


NOWHERE: Any = None
COMPILER = [CompilationError(NOWHERE, NOWHERE, "no such layout"), RuntimeError("PassManager::run failed")]


@BOTH
@pytest.mark.parametrize("error", COMPILER, ids=["triton", "mlir"])
def test_a_kernel_that_does_not_compile_is_replaced_and_said_once(kernels, direction, error, caplog):
    kernels.error = error
    for _ in range(2):
        assert kernels.run(direction=direction) == ["plain"]
    assert [record.getMessage() for record in caplog.records if "does not compile" in record.getMessage()] == [
        caplog.messages[0]
    ]
    assert "does not compile them" in attention.gluon_refusals(direction, problem())[0]
    # what needs another kernel is tried
    kernels.error = None
    assert kernels.run(direction=direction, softcap=3.0) == ["gluon"]
    assert kernels.run(direction=direction) == ["plain"]


@BOTH
def test_small_calls_run_in_plain_triton_unless_gluon_is_asked_for(kernels, direction, monkeypatch):
    """Their launches take longer than their products: 2 x 4 x 4 x (16 + 16) x 2 are 2048 operations."""
    monkeypatch.setattr(attention, "fewest_operations", 2049)
    assert kernels.run(direction=direction) == ["plain"]
    assert kernels.run("gluon", direction) == ["gluon"]
    assert "the call is small: 2.05e-06 GFLOP" in attention.describe(problem())
    monkeypatch.setattr(attention, "fewest_operations", 2048)
    assert kernels.run(direction=direction) == ["gluon"]


@BOTH
def test_a_kernel_asked_for_by_name_fails_as_it_fails(kernels, direction):
    kernels.error = COMPILER[0]
    with pytest.raises(CompilationError):
        kernels.run("gluon", direction)


def test_an_error_that_is_not_the_compilers_is_nobodys_to_hide(kernels):
    kernels.error = RuntimeError("an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        kernels.run()
    assert kernels.launched == []


@BOTH
def test_another_gluon_is_a_reason(monkeypatch, direction):
    hopper = attention.gluon_kernels.__wrapped__
    kernels = Kernels(monkeypatch)
    for name in ("forward", "backward"):
        monkeypatch.setitem(sys.modules, f"fastattn_kernels.attention.hopper.{name}", None)
    monkeypatch.setattr(attention, "gluon_kernels", hopper)
    assert kernels.run(direction=direction) == ["plain"]
    with pytest.raises(NotImplementedError, match="has another Gluon: import of"):
        kernels.run("gluon", direction)


def test_use_kernels_reaches_the_launch(device, monkeypatch):
    seen = []
    original = attention.launch_attention_fwd

    def launch(*arguments):
        seen.append(arguments[-1])
        original(*arguments[:-1], "auto")

    monkeypatch.setattr(attention, "launch_attention_fwd", launch)
    query = torch.randn(1, 1, 4, 16, device=device)
    with fastattn.use_kernels("gluon"):
        with fastattn.use_kernels("triton"):
            fastattn.attention(query, query, query, backend="triton")
        fastattn.attention(query, query, query, backend="triton")
    fastattn.attention(query, query, query, backend="triton")
    assert seen == ["triton", "gluon", "auto"]


def test_kernels_asked_for_by_name_refuse_with_reasons(device):
    query = torch.randn(1, 1, 4, 16, device=device)  # float32
    with (
        fastattn.use_kernels("gluon"),
        pytest.raises(NotImplementedError, match="the Gluon kernels refuse this forward"),
    ):
        fastattn.attention(query, query, query, backend="triton")


def test_use_kernels_says_what_it_accepts():
    accepted = "kernels='cuda': expected one of 'auto', 'gluon', 'triton'"
    with pytest.raises(ValueError, match=accepted), fastattn.use_kernels("cuda"):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("gluon_refuses", [False, True])
def test_gradient_of_weights_that_may_be_zeros_has_a_launch_of_its_own(kernels, monkeypatch, gluon_refuses):
    """Gluon runs without it, or the plain kernels if it is zeros; behind them the plain ones, if it is not."""
    conditions: list[Any] = []

    def plain(*arguments, only_if=None):
        conditions.append((arguments[4], only_if))
        kernels.launched.append("plain")

    monkeypatch.setattr(attention.backward, "launch_attention_bwd", plain)
    kernels.reasons = ["it rains"] * gluon_refuses
    used = torch.tensor(False)
    d_weights = attention.WeightsGradient(torch.zeros(1, 4, 4), 2, used)
    arguments = problem(), None, None, None, d_weights, NOTHING
    attention.launch_attention_bwd(*arguments)
    assert kernels.launched == ["plain" if gluon_refuses else "gluon", "plain"]
    expected = [(None, 0)] * gluon_refuses + [(d_weights, 1)]
    assert [(given, value) for given, (_, value) in conditions] == expected
    for _, (flag, _) in conditions:
        assert flag.dtype == torch.uint8 and flag.data_ptr() == used.data_ptr()
    with pytest.raises(NotImplementedError, match="the gradient of weights is not in the Hopper kernels"):
        attention.launch_attention_bwd(*arguments, kernels="gluon")


def test_one_pass_is_for_those_who_let_it(kernels, monkeypatch):
    """The gradient of slopes sums over a row's keys, and one pass holds a tile of keys."""
    monkeypatch.setattr(attention, "launch_attention_bwd_one_pass", lambda *a: kernels.launched.append("one pass"))
    slopes = torch.ones(1, 2)
    for deterministic, d_alibi_slopes, expected in [
        (True, None, "plain"),
        (False, None, "one pass"),
        (False, slopes, "plain"),
    ]:
        gradients = dataclasses.replace(NOTHING, d_alibi_slopes=d_alibi_slopes)
        arguments = (problem(alibi_slopes=slopes), *(None,) * 4, gradients)
        attention.launch_attention_bwd(*arguments, kernels="triton", deterministic=deterministic)
        assert kernels.launched[-1] == expected


def test_gradients_that_may_differ_in_the_last_bit_are_right(device):
    """Through the public function; on Triton, where the choice is."""
    tensors = [torch.randn(1, 2, 70, 16, device=device, requires_grad=True) for _ in range(3)]

    def gradients():
        output = fastattn.attention(*tensors, is_causal=True, backend="triton")
        assert isinstance(output, torch.Tensor)
        return torch.autograd.grad(output.square().sum(), tensors)

    expected = gradients()
    with fastattn.use_kernels(deterministic=False):
        found = gradients()
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_describe_says_what_is_refused_by_name(kernels):
    kernels.reasons = ["it rains"]
    assert attention.describe(problem(), "gluon").startswith("forward refused: Gluon is asked for (it rains)")
    kernels.reasons = []
    weights = attention.WeightsGradient(torch.zeros(1, 4, 4), 2)
    said = attention.describe(problem(), d_weights=weights)
    refused = "the gradient of weights is not in the Hopper kernels"
    assert said == f"forward in Gluon, backward in plain Triton (not in Gluon: {refused})"


def test_one_kernel_that_does_not_compile_bars_no_other(kernels):
    kernels.error = RuntimeError("failed to translate module to LLVM IR")
    wide = torch.zeros(1, 2, 4, 4)
    assert kernels.run(bias=wide) == ["plain"]
    kernels.error = None
    assert kernels.run(bias=wide) == ["plain"]
    assert kernels.run(bias=wide.bfloat16()) == kernels.run(bias=wide[:, :, :1]) == kernels.run() == ["gluon"]


def test_keys_without_query_heads_have_no_gradient():
    query, key = torch.zeros(1, 0, 4, 16), torch.zeros(1, 2, 4, 16)
    dk, dv = torch.full_like(key, 7.0), torch.full_like(key, 7.0)
    arguments = Problem(query, key, key, scale=1.0), query, query, query, None, Gradients(query, dk, dv)
    attention.launch_attention_bwd(*arguments)
    assert not dk.any() and not dv.any()
