"""Repairs to Triton's interpreter (3.6 to 3.9), without which ``TRITON_INTERPRET=1`` gives wrong numbers in bfloat16.

Six things are repaired. The interpreter keeps bfloat16 as 16-bit integers and computes on those: products and sums of
bfloat16 tiles are garbage, float32 is truncated to bfloat16 instead of rounded, and subnormal bfloat16 becomes another
float32. The result of comparing integers is typed as an integer, and turned into one where it is broadcast, which 3.9
refuses as a mask. 3.6.0 with NumPy 2.4 fails on run-time loop bounds. And the interpreter takes four times as long as
it has to: it rebinds Triton's whole language at every call of a device function, where once a launch is enough; it
computes whether integers overflow, and drops the answer, since its option ``debug`` is off; and it makes the same types
again for every operation.

The repairs are installed once, and only while interpreting: compiled kernels do not depend on them.
"""

import dataclasses
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_NAN = np.uint16(0x7FC0)


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even, NaN kept."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    with np.errstate(over="ignore"):
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), _NAN, rounded)


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: Any) -> Any:
    return interpreter.TensorHandle(_to_float32(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _repair_elementwise(operation: Any) -> Any:
    """``operation(self, *handles, op)`` with bfloat16 computed in float32 and rounded back, and booleans called so."""

    def repaired(self: Any, *arguments: Any) -> Any:
        handles, op = arguments[:-1], arguments[-1]
        is_bfloat16 = any(_is_bfloat16(h) for h in handles)
        result = operation(self, *(map(_widened, handles) if is_bfloat16 else handles), op)
        if result.data.dtype == np.bool_:
            return interpreter.TensorHandle(result.data, tl.int1)
        if is_bfloat16 and result.data.dtype == np.float32:
            return interpreter.TensorHandle(_to_bfloat16(result.data), tl.bfloat16)
        return result

    return repaired


def _repair_dot(dot: Any) -> Any:
    def repaired(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), *rest)

    return repaired


def _repair_cast(cast: Any) -> Any:
    def repaired(self: Any, source: Any, destination: Any) -> Any:
        if source.dtype.scalar == tl.float32 and destination.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_to_bfloat16(source.data), tl.bfloat16)
        if _is_bfloat16(source) and destination.scalar == tl.float32:
            return _widened(source)
        return cast(self, source, destination)

    return repaired


def _repair_index(patch_tensor: Any) -> Any:
    def repaired(tensor: Any, scope: Any, *rest: Any) -> None:
        patch_tensor(tensor, scope, *rest)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    return repaired


def _repair_patch(patch_lang: Any) -> Any:
    bound: set[frozenset[int]] = set()  # which modules the launch that runs has rebound so far

    def repaired(fn: Any) -> Any:
        modules = frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)
        if modules in bound:
            return None  # a device function: its caller does not use the result
        scope = patch_lang(fn)
        if hasattr(scope, "restore"):
            bound.add(modules)
            restore = scope.restore

            def restoring() -> None:
                restore()
                bound.clear()

            scope.restore = restoring
        return scope

    return repaired


def _remembering_numpy_dtype(numpy_dtype: Any) -> Any:
    """``numpy_dtype(dtype)``, which makes a dictionary of all dtypes at every call."""
    known: dict[str, Any] = {}

    def remembering(dtype: Any) -> Any:
        scalar = dtype.scalar
        if scalar.name not in known:
            known[scalar.name] = numpy_dtype(scalar)
        return known[scalar.name]

    return remembering


def _remembering_block_type(with_element_ty: Any) -> Any:
    """``with_element_ty(self, scalar)``: the same type again for the same shape and dtype."""
    known: dict[tuple[str, str], Any] = {}

    def remembering(self: Any, scalar: Any) -> Any:
        names = self.name, scalar.name  # that of a block has its shape
        if names not in known:
            known[names] = with_element_ty(self, scalar)
        return known[names]

    return remembering


def _remembering_tensor(initialise: Any) -> Any:
    """``initialise(self, handle, type)``, where all attributes but these two follow from the type's name."""
    known: dict[str, dict[str, Any]] = {}

    def remembering(self: Any, handle: Any, type: Any) -> None:
        derived = known.get(type.name)
        if derived is None:
            initialise(self, handle, type)
            known[type.name] = {name: value for name, value in vars(self).items() if name not in ("handle", "type")}
        else:
            self.handle, self.type = handle, type
            vars(self).update(derived)

    return remembering


def repair() -> None:
    """Install the repairs; calling it again changes nothing."""
    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "_fastattn_repaired", False):
        return
    for name in ("binary_op", "unary_op", "ternary_op"):
        setattr(builder, name, _repair_elementwise(getattr(builder, name)))
    builder.create_dot = _repair_dot(builder.create_dot)
    builder.cast_impl = _repair_cast(builder.cast_impl)
    interpreter._patch_lang_tensor = _repair_index(interpreter._patch_lang_tensor)  # type: ignore[attr-defined]
    interpreter._patch_lang = _repair_patch(interpreter._patch_lang)  # type: ignore[attr-defined]
    of_all: Any = interpreter.interpreter_builder
    of_all.options = dataclasses.replace(of_all.options, sanitize_overflow=False)
    interpreter._get_np_dtype = _remembering_numpy_dtype(interpreter._get_np_dtype)
    tl.block_type.with_element_ty = _remembering_block_type(tl.block_type.with_element_ty)
    tl.tensor.__init__ = _remembering_tensor(tl.tensor.__init__)
    builder._fastattn_repaired = True
