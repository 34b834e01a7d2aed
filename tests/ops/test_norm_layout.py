"""In which strides norms leave: those of ``F.layer_norm`` and ``F.rms_norm``, since code behind them calls ``view``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn.testing import random_tensor

SIZES = (2, 3, 4, 8)


def draw(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return random_tensor(*shape, seed=0, dtype=dtype, device=device)


# Each makes [2, 3, 4, 8].
LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "contiguous": lambda **kw: draw(2, 3, 4, 8, **kw),
    "transposed": lambda **kw: draw(2, 4, 3, 8, **kw).transpose(1, 2),
    "features transposed": lambda **kw: draw(2, 3, 8, 4, **kw).transpose(2, 3),
    "permuted": lambda **kw: draw(8, 4, 2, 3, **kw).permute(2, 3, 1, 0),
    "channels last": lambda **kw: draw(2, 3, 4, 8, **kw).to(memory_format=torch.channels_last),
    "features of maps": lambda **kw: draw(2, 8, 3, 4, **kw).permute(0, 2, 3, 1),
    "expanded": lambda **kw: draw(2, 1, 4, 8, **kw).expand(-1, 3, -1, -1),
    "sliced": lambda **kw: draw(2, 3, 4, 16, **kw)[..., ::2],
    "rows sliced": lambda **kw: draw(2, 4, 6, 8, **kw).transpose(1, 2)[:, ::2],
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

MODES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "evaluation": lambda norm, x: norm(x),
    "training": lambda norm, x: norm(x.detach().requires_grad_()),
    "no grad": lambda norm, x: torch.no_grad()(norm)(x),
    "forward mode": lambda norm, x: torch.func.jvp(norm, (x,), (x.clone(),))[0],
    "functorch": lambda norm, x: torch.func.vjp(norm, x)[0],
    "vmap": lambda norm, x: torch.func.vmap(norm)(x),
    "compiled": lambda norm, x: torch.compile(norm, backend="aot_eager")(x),
}


def ours(kind: str, axes: int, backend: str, weight: Tensor | None) -> Callable[[Tensor], Tensor]:
    function: Callable[..., Any] = fastattn.layer_norm if kind == "layer" else fastattn.rms_norm
    return lambda x: function(x, SIZES[-axes:], weight, backend=backend)


def torchs(kind: str, axes: int, weight: Tensor | None) -> Callable[[Tensor], Tensor]:
    function = F.layer_norm if kind == "layer" else F.rms_norm
    return lambda x: function(x, SIZES[-axes:], weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_is_laid_out_as_torchs(kind, mode, axes, dtype, backend, device):
    """In training an RMS norm of a transposed batch came out transposed, and a ``view`` behind it failed."""
    for name, make in LAYOUTS.items():
        if (mode, name) == ("forward mode", "expanded"):
            continue  # torch's own raises: it writes into the tangent
        x = make(dtype=DTYPES[dtype], device=device)
        for weight in (None, torch.ones(SIZES[-axes:], dtype=x.dtype, device=device)):
            expected = MODES[mode](torchs(kind, axes, weight), x)
            output = MODES[mode](ours(kind, axes, backend, weight), x)
            assert output.stride() == expected.stride(), name
            assert output.dtype == expected.dtype, name
            torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_of_a_sum_is_laid_out_as_torchs(kind, learns, backend, device):
    """By what lies in the residual, whose layout torch's sum has; the sum itself has it on the torch backend."""
    function: Callable[..., Any] = fastattn.add_layer_norm if kind == "layer" else fastattn.add_rms_norm
    for name, make in LAYOUTS.items():
        for of_residual, make_residual in LAYOUTS.items():
            if of_residual == "expanded":
                continue  # which of the two leads then is decided by torch's iterators
            x, residual = (m(dtype=torch.float32, device=device) for m in (make, make_residual))
            total = residual + x
            expected = torchs(kind, 1, None)(total)
            output, returned = function(x.requires_grad_(learns), residual, return_residual=True, backend=backend)
            assert output.stride() == expected.stride(), (name, of_residual)
            assert returned.stride() == total.stride() if backend == "torch" else returned.is_contiguous()


@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm])
def test_a_view_behind_a_fused_norm(make):
    """What the layout is for: heads inside, normalised, and merged by ``view``."""
    model, x = nn.Sequential(make(8)), torch.randn(2, 5, 3, 8).transpose(1, 2)
    expected = model(x).view(6, 5, 8)
    fastattn.fuse(model, backend="torch")
    torch.testing.assert_close(model(x).view(6, 5, 8), expected)
    torch.testing.assert_close(model(x.requires_grad_()).view(6, 5, 8), expected)
