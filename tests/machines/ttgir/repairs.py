"""Repairs of ttsem 0.1.0, as operations that take the place of its own. Another version of it is refused.

- PTX that our kernels hold inline is declared: ttsem knows other fragments.
- ``ttng.warp_group_dot`` without ``use_acc`` takes zero for the accumulator: ttsem adds what stands there.
- ``ttng.async_tma_reduce`` and ``tt.descriptor_reduce`` are logged as atomic: ttsem logs a load and a store, and finds
  a race between every two programs that add to one tile.
- Products are one matrix product of float32 (float64 for float64) by numpy: ttsem's chain of fused multiply-adds is
  closer to a tensor core's last bits, and takes longer than all else together.

What a TMA store writes through a descriptor of the host is lost by ttsem's own launcher; ours (:mod:`.launcher`) hands
it the tensors' own memory. To drop a repair with a newer version: delete it here, and raise ``VERSION``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import ttsem
from ttsem import ops, values
from ttsem.ir_types import Op

VERSION = "0.1.0"
if ttsem.__version__ != VERSION:
    raise ImportError(f"ttsem {ttsem.__version__} is installed: the repairs are for {VERSION}, look at each again")

Handler = Callable[[Any, Op, list[Any]], list[Any]]

# --------------------------------------------------------------------------------------------------------- inline PTX


def _approximate_tanh(x: np.ndarray) -> np.ndarray:
    """``tanh`` as far off as PTX allows, in the one direction or the other."""
    x = np.asarray(x, np.float32)
    direction = ((x.view(np.int32) & 1) * 2 - 1).astype(np.float32)
    return (np.tanh(x) * (1 + direction * np.float32(2**-10.987))).astype(np.float32)


def _pair(name: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Two float32 rounded to the type ``name``, in one word: the instruction's first source is the upper half."""
    ty = values.Type(kind="float", width=16, name=name)

    def pack(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
        high, low = (
            np.asarray(values.from_float(np.asarray(half, np.float32), ty)).view(np.uint16).astype(np.uint32)
            for half in (upper, lower)
        )
        return (high << np.uint32(16) | low).view(np.int32)

    return pack


# By the text; operands by their numbers in it.
FRAGMENTS: dict[str, Callable[..., np.ndarray]] = {
    "mov.b32 $0, $1;": lambda x: x,
    "tanh.approx.f32 $0, $1;": _approximate_tanh,
    "cvt.rn.bf16x2.f32 $0, $2, $1;": lambda low, high: _pair("bf16")(high, low),
    "cvt.rn.f16x2.f32 $0, $2, $1;": lambda low, high: _pair("f16")(high, low),
}


def inline_ptx(interp: Any, op: Op, args: list[Any]) -> list[Any]:
    text = " ".join(str(op.attrs.get("asm_string", "")).split())
    if text not in FRAGMENTS:
        return ops.OPS["tt.elementwise_inline_asm"](interp, op, args)
    result = FRAGMENTS[text](*(np.asarray(arg) for arg in args))
    return [np.asarray(result).astype(values.to_numpy(op.result_types[0]), copy=False)]


# ----------------------------------------------------------------------------------------------------------- products


def dot(interp: Any, op: Op, args: list[Any]) -> list[Any]:
    """``tt.dot`` of floats: TF32 operands are rounded to it, and 3xTF32 is exact enough to be float32."""
    left_type, right_type, result_type = op.operand_types[0], op.operand_types[1], op.result_types[0]
    if not values.is_float(result_type):
        return ops.OPS["tt.dot"](interp, op, args)
    dtype = np.float64 if result_type.scalar.name == "f64" else np.float32
    left, right = (values.to_float(arg, ty).astype(dtype, copy=False) for arg, ty in zip(args, (left_type, right_type)))
    if op.attrs.get("inputPrecision", 0) == 0 and left_type.scalar.name == "f32":
        left, right = ops._to_tf32(left), ops._to_tf32(right)
    with np.errstate(all="ignore"):
        total = np.matmul(left, right) + values.to_float(args[2], op.operand_types[2])
    return [values.from_float(total, result_type)]


def warp_group_dot(interp: Any, op: Op, args: list[Any]) -> list[Any]:
    left, right, accumulator = (arg.data if isinstance(arg, values.MemDesc) else arg for arg in args[:3])
    if len(args) > 3 and not bool(np.asarray(args[3])):
        accumulator = np.zeros_like(np.asarray(accumulator))
    return dot(interp, op, [left, right, accumulator])


# ------------------------------------------------------------------------------------------------------------ reduces


def reduce_into(interp: Any, descriptor: values.Descriptor, tile: np.ndarray, at: list[Any], kind: str) -> None:
    """Combine a tile with what lies in global memory, logged as the atomic update that it is."""
    memory = interp.memory
    log, spans = memory.access_log, memory.access_spans
    memory.access_log = memory.access_spans = None
    try:
        ops._desc_reduce(interp, descriptor, tile, at, kind)
    finally:
        memory.access_log, memory.access_spans = log, spans
    addresses, inside = ops._desc_pointers(descriptor, at)
    memory._log("a", addresses[inside], values.to_numpy(descriptor.elem).itemsize, None)


def descriptor_reduce(interp: Any, op: Op, args: list[Any]) -> list[Any]:
    reduce_into(interp, args[0], np.asarray(args[1]), args[2:], ops._reduce_kind(op))
    return []


def tma_reduce(interp: Any, op: Op, args: list[Any]) -> list[Any]:
    reduce_into(interp, args[0], np.asarray(args[-1].data), args[1:-1], ops._reduce_kind(op))
    return []


OPERATIONS: dict[str, Handler] = {
    **ops.OPS,
    "tt.elementwise_inline_asm": inline_ptx,
    "tt.dot": dot,
    "ttng.warp_group_dot": warp_group_dot,
    "tt.descriptor_reduce": descriptor_reduce,
    "ttng.async_tma_reduce": tma_reduce,
}
