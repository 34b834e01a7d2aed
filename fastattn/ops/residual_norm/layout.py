"""The memory layout of norms: that of torch's own norms, since code that follows them may call ``view``.

``F.layer_norm`` gives a contiguous tensor. So does ``F.rms_norm``, unless its input is in a channels-last format, which
its result then keeps.
"""

from __future__ import annotations

from torch import Tensor

# The axes from that which should vary fastest to that which should vary slowest.
_CHANNELS_LAST = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}


def is_channels_last(x: Tensor) -> bool:
    """Does ``F.rms_norm`` take ``x`` to be in a channels-last format?

    By the rule of ``Tensor::suggest_memory_format`` in torch's C++: sizes of 1 leave some strides ambiguous.
    """
    if x.dim() not in _CHANNELS_LAST or x.is_contiguous():
        return False
    shape, strides, least = x.shape, x.stride(), 0
    if strides[1] == 0:
        return False
    for axis in _CHANNELS_LAST[x.dim()]:
        if shape[axis] == 0 or strides[axis] < least or (axis == 0 and least == strides[1]):
            return False
        least = strides[axis] * max(1, shape[axis])
    return True


def in_channels_last(output: Tensor, x: Tensor, residual: Tensor | None) -> Tensor:
    """An RMS norm of ``x``, or of its sum with ``residual``, in their channels-last format where they are in one."""
    if is_channels_last(x if residual is None else residual):  # torch lays a sum out as its first term
        return output.movedim(1, -1).contiguous().movedim(-1, 1)  # vmap does not know contiguous of such a format
    return output
