"""What Gluon calls differently from one Triton to the next (3.6 to 3.9): the only file here that knows.

Kernels import these names; everything else of Gluon they take from Gluon itself.
"""

from typing import Any

from triton._C.libtriton import ir
from triton.experimental import gluon as _gluon
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

# To a type checker, what ``gluon.jit`` decorates would return functions.
gluon: Any = _gluon
_tma: Any = tma

# 3.9 renamed them
tma_load = getattr(_tma, "async_load", None) or _tma.async_copy_global_to_shared
tma_store = getattr(_tma, "async_store", None) or _tma.async_copy_shared_to_global
tma_store_wait = _tma.store_wait

if hasattr(_tma, "async_atomic_add"):
    tma_reduce_add = _tma.async_atomic_add
else:  # until 3.9 the operation is there, and only its wrapper is missing

    @builtin
    def tma_reduce_add(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
        """Add a tile of shared memory to the tensor, one element after the other, in no fixed order."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


def shared(function: Any) -> Any:
    """A ``@triton.jit`` function for Gluon kernels: the same body, so that both languages have one predicate."""
    return gluon.jit(function.fn)
