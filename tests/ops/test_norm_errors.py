"""Bad arguments get an exception that names the argument, its value and what is accepted; nothing runs before."""

import logging
from typing import Any

import pytest
import torch

import fastattn
from fastattn.ops.common import backends
from fastattn.testing import random_tensor
from tests.ops.norm_cases import FUNCTIONS

ROWS, N = (2, 3), 8
KINDS = ["layer", "rms"]


def good(device: torch.device | str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {"x": torch.zeros(*ROWS, N, device=device, dtype=dtype)}


def bad_calls(device: torch.device | str) -> list[tuple[Any, ...]]:
    """``(name, changed arguments, exception, words that the message holds)``."""

    def zeros(*shape: int, device: Any = device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    def whole(*shape: int) -> torch.Tensor:
        return zeros(*shape, dtype=torch.int64)

    def elsewhere(*shape: int) -> torch.Tensor:
        return zeros(*shape, device="meta")

    cases: list[tuple[Any, ...]] = [
        ("x_list", {"x": [1.0]}, TypeError, ["x", "list", "torch.Tensor"]),
        ("x_none", {"x": None}, TypeError, ["x", "NoneType", "torch.Tensor"]),
        ("x_scalar", {"x": zeros()}, ValueError, ["x", "no dimensions", "[..., N]"]),
        ("x_int", {"x": whole(*ROWS, N)}, TypeError, ["x", "torch.int64", "float16"]),
        ("x_bool", {"x": zeros(*ROWS, N, dtype=torch.bool)}, TypeError, ["x", "torch.bool", "float16"]),
        ("residual_list", {"residual": [0.0]}, TypeError, ["residual", "list", "torch.Tensor"]),
        ("residual_int", {"residual": whole(*ROWS, N)}, TypeError, ["residual", "torch.int64", "float16"]),
        ("residual_shape", {"residual": zeros(2, 4, N)}, ValueError, ["residual", "(2, 4, 8)", "(2, 3, 8)"]),
        ("residual_size", {"residual": zeros(*ROWS, 7)}, ValueError, ["residual", "(2, 3, 7)", "(2, 3, 8)"]),
        ("residual_device", {"residual": elsewhere(*ROWS, N)}, ValueError, ["residual", "meta", "one device"]),
        ("row_scale_list", {"row_scale": [1.0, 1.0]}, TypeError, ["row_scale", "list", "torch.Tensor"]),
        ("row_scale_int", {"row_scale": whole(*ROWS)}, TypeError, ["row_scale", "torch.int64", "float16"]),
        ("row_scale_column", {"row_scale": zeros(*ROWS, 1)}, ValueError, ["row_scale", "(2, 3, 1)", "rows (2, 3)"]),
        ("row_scale_shape", {"row_scale": zeros(2)}, ValueError, ["row_scale", "(2,)", "rows (2, 3)"]),
        ("row_scale_device", {"row_scale": elsewhere(*ROWS)}, ValueError, ["row_scale", "meta", "one device"]),
        ("sizes_wrong", {"normalized_shape": (7,)}, ValueError, ["normalized_shape", "(7,)", "(2, 3, 8)"]),
        ("sizes_first", {"normalized_shape": (2, 3)}, ValueError, ["normalized_shape", "(2, 3)", "(2, 3, 8)"]),
        ("sizes_too_many", {"normalized_shape": (1, 2, 3, 8)}, ValueError, ["normalized_shape", "(1, 2, 3, 8)"]),
        ("sizes_none", {"normalized_shape": ()}, ValueError, ["normalized_shape=()", "at least one"]),
        ("sizes_float", {"normalized_shape": 8.0}, TypeError, ["normalized_shape", "8.0", "int"]),
        ("sizes_text", {"normalized_shape": "8"}, TypeError, ["normalized_shape", "'8'", "int"]),
        ("sizes_of_floats", {"normalized_shape": (8.0,)}, TypeError, ["normalized_shape", "8.0", "int"]),
        ("dropout_negative", {"dropout_p": -0.1}, ValueError, ["dropout_p", "-0.1", "from 0 to 1"]),
        ("dropout_above_one", {"dropout_p": 1.5}, ValueError, ["dropout_p", "1.5", "from 0 to 1"]),
        ("dropout_nan", {"dropout_p": float("nan")}, ValueError, ["dropout_p", "nan", "from 0 to 1"]),
        ("dropout_text", {"dropout_p": "half"}, TypeError, ["dropout_p", "'half'", "number"]),
        ("dropout_none", {"dropout_p": None}, TypeError, ["dropout_p", "None", "number"]),
        ("eps_text", {"eps": "small"}, TypeError, ["eps", "'small'", "number"]),
        ("eps_list", {"eps": [1e-5]}, TypeError, ["eps", "[1e-05]", "number"]),
        ("out_dtype_text", {"out_dtype": "float32"}, TypeError, ["out_dtype", "str", "torch.dtype"]),
        ("out_dtype_int", {"out_dtype": torch.int32}, ValueError, ["out_dtype=torch.int32", "float16"]),
        ("out_dtype_complex", {"out_dtype": torch.complex64}, ValueError, ["out_dtype=torch.complex64", "float16"]),
        ("residual_dtype_type", {"residual_dtype": float}, TypeError, ["residual_dtype", "type", "torch.dtype"]),
        ("residual_dtype_int", {"residual_dtype": torch.int8}, ValueError, ["residual_dtype=torch.int8", "float16"]),
        ("round_residual_text", {"round_residual": "no"}, TypeError, ["round_residual", "'no'", "True or False"]),
        ("unit_offset_text", {"unit_offset": "no"}, TypeError, ["unit_offset", "'no'", "True or False"]),
        ("return_residual_text", {"return_residual": "no"}, TypeError, ["return_residual", "'no'", "True or False"]),
        ("backend", {"backend": "cuda"}, ValueError, ["backend", "'cuda'", "'auto'", "'triton'", "'torch'"]),
    ]  # fmt: skip
    for name in ("weight", "bias", "x_bias"):
        cases += [
            (f"{name}_list", {name: [1.0] * N}, TypeError, [name, "list", "torch.Tensor"]),
            (f"{name}_int", {name: whole(N)}, TypeError, [name, "torch.int64", "float16"]),
            (
                f"{name}_complex",
                {name: zeros(N, dtype=torch.complex64)},
                TypeError,
                [name, "torch.complex64", "float16"],
            ),
            (f"{name}_shape", {name: zeros(7)}, ValueError, [name, "(7,)", "(8,)"]),
            (f"{name}_rows", {name: zeros(*ROWS, N)}, ValueError, [name, "(2, 3, 8)", "(8,)"]),
            (f"{name}_scalar", {name: zeros()}, ValueError, [name, "()", "(8,)"]),
            (f"{name}_device", {name: elsewhere(N)}, ValueError, [name, "meta", "one device"]),
            (f"{name}_flat", {name: zeros(24), "normalized_shape": (3, 8)}, ValueError, [name, "(24,)", "(3, 8)"]),
        ]
    return cases


NAMES = [name for name, *_ in bad_calls("cpu")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_norm_bad_argument_says_what_is_accepted(name, kind, device):
    changed, exception, words = next(rest for n, *rest in bad_calls(device) if n == name)
    with pytest.raises(exception) as caught:
        FUNCTIONS[kind](**{**good(device), **changed})
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_norm_bad_argument_raises_before_anything_runs(name, kind, device, monkeypatch):
    from fastattn.ops.residual_norm import on_torch, on_triton

    def ran(*args):
        raise AssertionError("the backend was reached")

    for module in (on_torch, on_triton):
        monkeypatch.setattr(module, "run", ran)
    changed, exception, _ = next(rest for n, *rest in bad_calls(device) if n == name)
    state = torch.get_rng_state()
    with pytest.raises(exception):
        FUNCTIONS[kind](**{**good(device), "dropout_p": 0.5, **changed})
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_norm_writes_none_of_its_arguments(kind, backend, device):
    """Neither in the forward nor in the backward; the torch backend works in place where it may."""
    arguments = {name: random_tensor(*ROWS, N, seed=i, device=device) for i, name in enumerate(("x", "residual"))}
    arguments |= {name: random_tensor(N, seed=i, device=device) for i, name in enumerate(("weight", "bias", "x_bias"))}
    arguments["row_scale"] = random_tensor(*ROWS, seed=9, device=device)
    before = {name: t.clone() for name, t in arguments.items()}
    leaves = {name: t.requires_grad_() for name, t in arguments.items()}
    for more in ({}, {"dropout_p": 0.5, "unit_offset": True}):
        results = FUNCTIONS[kind](**leaves, **more, return_residual=True, backend=backend)
        gradients = [random_tensor(*ROWS, N, seed=20 + i, device=device) for i in range(2)]
        copies = [g.clone() for g in gradients]
        torch.autograd.grad(results, list(leaves.values()), gradients)
        assert all(torch.equal(g, c) for g, c in zip(gradients, copies))
    assert all(torch.equal(t, before[name]) for name, t in leaves.items())


@pytest.mark.parametrize(
    ("changed", "exception", "words"),
    [
        ({"input": 3}, TypeError, ["x", "int"]),
        ({"normalized_shape": (7,)}, ValueError, ["normalized_shape", "(7,)", "(2, 3, 8)"]),
        ({"normalized_shape": ()}, ValueError, ["normalized_shape=()", "at least one"]),
        ({"weight": torch.ones(7)}, ValueError, ["weight", "(7,)", "(8,)"]),
        ({"eps": "small"}, TypeError, ["eps", "'small'"]),
        ({"backend": "cuda"}, ValueError, ["backend", "'cuda'"]),
    ],
    ids=["input_int", "sizes", "sizes_empty", "weight", "eps", "backend"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_norm_drop_in_bad_argument_says_what_is_accepted(kind, changed, exception, words):
    function = getattr(fastattn, f"{kind}_norm")
    with pytest.raises(exception) as caught:
        function(**{"input": torch.zeros(*ROWS, N), "normalized_shape": (N,), **changed})
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"


# ------------------------------------------------------------------------------------------------------------ refusals

WIDEST = 262144


def refused(device: torch.device) -> dict[str, tuple[dict[str, Any], list[str]]]:
    """Calls that the kernels do not take: the arguments, and the words of the reason. Nothing large is allocated."""
    wide = torch.zeros(1, 1, device=device).expand(1, WIDEST + 1)

    def double(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    accepted = "float16, bfloat16 and float32"
    return {
        "x_float64": ({"x": double(*ROWS, N)}, ["x is torch.float64", accepted]),
        "residual_float64": ({"residual": double(*ROWS, N)}, ["residual is torch.float64", accepted]),
        "weight_float64": ({"weight": double(N)}, ["weight is torch.float64", accepted]),
        "bias_float64": ({"bias": double(N)}, ["bias is torch.float64", accepted]),
        "x_bias_float64": ({"x_bias": double(N)}, ["x_bias is torch.float64", accepted]),
        "row_scale_float64": ({"row_scale": double(*ROWS)}, ["row_scale is torch.float64", accepted]),
        "out_dtype_float64": ({"out_dtype": torch.float64}, ["out_dtype=torch.float64", accepted]),
        "residual_dtype_float64": ({"residual_dtype": torch.float64}, ["residual_dtype=torch.float64", accepted]),
        "wide": ({"x": wide}, [f"N={WIDEST + 1}", f"1 to {WIDEST}"]),
        "no_columns": ({"x": torch.zeros(2, 0, device=device)}, ["N=0", f"1 to {WIDEST}"]),
        "wide_by_axes": (
            {"x": torch.zeros(1, 1, 1, device=device).expand(1, 2, WIDEST), "normalized_shape": (2, WIDEST)},
            [f"N={2 * WIDEST}", f"1 to {WIDEST}"],
        ),
        "several": (
            {"x": wide.double(), "weight": double(1).expand(WIDEST + 1)},
            [f"N={WIDEST + 1}", "x is torch.float64", "weight is torch.float64", "; "],
        ),
    }


REFUSED = list(refused(torch.device("cpu")))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_triton_refuses_with_all_its_reasons_and_never_falls_back(kind, name, device, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from fastattn.ops.residual_norm import on_torch as norm_torch

    def ran(*args):
        raise AssertionError("the torch backend was reached")

    monkeypatch.setattr(norm_torch, "run", ran)
    changed, words = refused(device)[name]
    call = {**good(device), **changed}
    with pytest.raises(NotImplementedError) as caught:
        FUNCTIONS[kind](**call, backend="triton")
    for word in ("triton", *words):
        assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"
    with fastattn.use_backend("triton"), pytest.raises(NotImplementedError):
        FUNCTIONS[kind](**call)


def test_triton_refuses_what_is_on_a_device_without_it():
    pytest.importorskip("triton", reason="triton is not installed")
    with pytest.raises(NotImplementedError, match=r"x is on meta: it runs on CUDA"):
        fastattn.rms_norm(torch.zeros(2, N, device="meta"), (N,), backend="triton")


def test_triton_takes_the_widest_row(device):
    pytest.importorskip("triton", reason="triton is not installed")
    x = torch.zeros(1, 1, device=device).expand(1, WIDEST)
    assert not fastattn.rms_norm(x, (WIDEST,), backend="triton").any()


@pytest.mark.parametrize("kind", KINDS)
def test_auto_falls_back_and_says_so_once(kind, device, caplog, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(backends, "_said", set())
    x = random_tensor(*ROWS, N, seed=1, dtype=torch.float64, device=device)
    with caplog.at_level(logging.WARNING, logger="fastattn"):
        for _ in range(3):
            found = FUNCTIONS[kind](x, backend="auto")
            assert torch.equal(found, FUNCTIONS[kind](x, backend="torch"))
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("fastattn", logging.WARNING)
    assert "auto runs the torch backend" in record.getMessage()
    assert "x is torch.float64" in record.getMessage()


@pytest.mark.parametrize("kind", KINDS)
def test_auto_says_nothing_where_triton_runs(kind, device, caplog, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(backends, "_said", set())
    x = random_tensor(*ROWS, N, seed=1, device=device)
    with caplog.at_level(logging.WARNING, logger="fastattn"):
        found = FUNCTIONS[kind](x, backend="auto")
    assert torch.equal(found, FUNCTIONS[kind](x, backend="triton"))
    assert not caplog.records


@pytest.mark.parametrize("name", REFUSED)
def test_torch_takes_what_triton_refuses(name, device):
    if "wide" in name or name == "several":
        pytest.skip("a row of more than 262144 elements would be written")
    changed, _ = refused(device)[name]
    call = {**good(device), **changed}
    output, total = fastattn.add_layer_norm(**call, return_residual=True, backend="torch")
    assert output.shape == total.shape == call["x"].shape
