"""Products of tiles that are the same on every processor, for Triton's interpreter.

The interpreter multiplies tiles by numpy, whose library of matrix products adds up in an order of its own on each
maker's processors, and in another one at a tile's edge. Kernels whose errors held to their budgets on one processor
missed them on another by chance. The order is no part of a kernel: so a product is summed in float64 here, and rounded
once to the accumulator's dtype, to which the accumulator is then added.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def install() -> None:
    """From now on; float32 and narrower products alone, of any operands that the interpreter takes."""
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        wide = d.data.dtype == np.float32 and all(t.data.dtype in (np.float16, np.float32) for t in (a, b))
        if not wide:
            return multiply(self, a, b, d, input_precision, max_num_imprecise_acc)
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(np.float32)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
