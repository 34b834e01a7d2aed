"""Triton's interpreter, as repaired: what it says of a value is what the compiler would."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language", reason="triton is not installed")

from fastattn_kernels import interpreting  # noqa: E402


@triton.jit
def _ones_of_one_program_kernel(x_ptr, size, program, COLS: tl.constexpr):
    """Ones in the first ``size`` of the columns that belong to ``program``."""
    cols = tl.arange(0, COLS)
    row_ptr = x_ptr + tl.program_id(0) * COLS
    tl.store(row_ptr + cols, tl.full([COLS], 1.0, tl.float32), mask=(cols < size) & (tl.program_id(0) == program))


def test_a_scalar_comparison_broadcasts_into_a_mask(device):
    """Triton 3.9's interpreter had an integer there, and refused it as a mask."""
    x = torch.zeros(3, 8, device=device)
    _ones_of_one_program_kernel[(3,)](x, 5, 1, COLS=8)
    expected = torch.zeros(3, 8, device=device)
    expected[1, :5] = 1.0
    torch.testing.assert_close(x, expected, rtol=0.0, atol=0.0)


@pytest.mark.skipif(not interpreting(), reason="the interpreter is repaired only while it is used")
@pytest.mark.parametrize("comparison", ["create_icmpEQ", "create_icmpSLT", "create_icmpUGE", "create_fcmpOLT"])
def test_interpreted_comparisons_are_booleans(comparison):
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    dtype, stored = (tl.float32, np.float32) if "fcmp" in comparison else (tl.int32, np.int32)
    one, two = (TensorHandle(np.array([value], dtype=stored), dtype) for value in (1, 2))
    compared = getattr(interpreter_builder, comparison)(one, two)
    assert compared.dtype == tl.int1
    assert compared.data.dtype == np.bool_


@pytest.mark.skipif(not interpreting(), reason="the interpreter is repaired only while it is used")
@pytest.mark.parametrize("shape", [[], [4], [4, 8], [8, 4]], ids=str)
def test_interpreted_values_of_one_type_share_nothing_with_those_of_another(shape):
    """Types are made once and remembered: by their shape and their dtype, pointers as well."""
    from triton.runtime.interpreter import TensorHandle

    scalars = [tl.float32, tl.int32, tl.pointer_type(tl.float32), tl.pointer_type(tl.int32)]
    stored = [np.float32, np.int32, np.uint64, np.uint64]
    for _ in range(2):  # the second time everything is known
        for scalar, kind in zip(scalars, stored):
            type_ = tl.block_type(tl.int8, shape).with_element_ty(scalar) if shape else scalar
            handle = TensorHandle(np.zeros(shape, dtype=kind), scalar)
            value = tl.tensor(handle, type_)
            assert value.handle is handle and value.type is type_
            assert type_.scalar == value.dtype == scalar
            assert [size.value for size in value.shape] == shape
            assert value.numel.value == np.prod(shape)
