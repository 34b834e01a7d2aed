"""Functions of Triton made of text: what they are called, how long they are remembered, and who compiles them anew."""

import inspect

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402

from fastattn_kernels.common.functions import Modifier, compiled  # noqa: E402
from tests.kernels.cross_compile import compile_for  # noqa: E402

ADD = "@triton.jit\ndef change(x, captured):\n    return x + tl.load(captured[0].ptr) * captured[0].sizes[{axis}]\n"
TWICE = "@triton.jit\ndef change(x, captured):\n    return tanh(2.0 * x)\n"


@triton.jit
def _changed_kernel(out_ptr, first, second, steps, BLOCK: tl.constexpr):
    """``first`` and then ``second`` of 0, 1, ..., once for each step, in a loop and a branch of it."""
    x = tl.arange(0, BLOCK).to(tl.float32)
    for step in tl.range(0, steps):
        if step % 2 == 0:  # noqa: SIM108  # a branch, as the test's docstring has it
            x = first.function(x, first.captured)
        else:
            x = second.function(x, second.captured)
    tl.store(out_ptr + tl.arange(0, BLOCK), x)


def test_text_becomes_one_function_with_its_source():
    function = compiled(TWICE, "change")
    assert compiled("".join(TWICE), "change") is function
    assert compiled(ADD.format(axis=0), "change") is not function
    assert "tanh(2.0 * x)" in inspect.getsource(getattr(function, "fn", function))


def test_text_without_the_function_raises():
    with pytest.raises(KeyError, match="other"):
        compiled(TWICE, "other")
    with pytest.raises(SyntaxError):
        compiled("def change(x:\n", "change")


@pytest.mark.machine
def test_two_functions_of_one_name_stay_apart_in_a_kernel(device):
    """Each is called by its own text, inside a loop and a branch, and reads its own tensors."""
    tensor = torch.full((3, 1, 5), 0.25, device=device)[:, :, 1:]
    first = Modifier(compiled(ADD.format(axis=2), "change"), None, (tensor,)).mask_mod()
    second = Modifier(compiled(TWICE, "change")).mask_mod()
    out = torch.full((16,), torch.nan, device=device)
    _changed_kernel[(1,)](out, first, second, 3, BLOCK=16)
    x = torch.arange(16.0, device=device)
    torch.testing.assert_close(out, torch.tanh(2.0 * (x + 1.0)) + 1.0)


def test_captured_tensors_are_described_by_sizes_and_strides():
    scalar, flags = torch.tensor(2.0), torch.zeros(4, 1, 3, dtype=torch.bool).transpose(0, 2)
    of_scalar, of_flags = Modifier(compiled(TWICE, "change"), None, (scalar, flags)).mask_mod().captured
    assert of_scalar.ptr is scalar and of_scalar[1:] == ((), ())
    assert of_flags.ptr.dtype == torch.uint8 and of_flags[1:] == ((3, 1, 4), (1, 0, 3))


def hashes(*cases):
    """Of the kernel that sums gradients of captured tensors, one for each of the cases, by a process of its own."""
    return [row["hash"] for row in compile_for("cuda:90", [*cases]) if row["kernel"] == "_attention_bias_bwd_kernel"]


CASE = {"dtype": "bfloat16", "head_dim": 64, "score_mod": 30.0, "length": 97, "keys": 130, "passes": ["captured"]}


@pytest.mark.resources
def test_one_text_is_one_kernel_in_every_process():
    """Other lengths, and so other captured tensors, compile nothing anew; another text does."""
    longer, bent = {**CASE, "length": 511, "keys": 131}, {**CASE, "score_mod": 20.0}
    (first,), (again, other) = hashes(CASE), hashes(longer, bent)
    assert first == again
    assert first != other
