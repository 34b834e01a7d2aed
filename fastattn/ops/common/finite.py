"""NaN and inf, found by one pass over a tensor that makes no other one."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_finite(*tensors: Tensor) -> bool:
    """Are all elements known to be finite? Their sum is, if they are and are not as large as the dtype allows.

    A sum in float32 of 16-bit tensors would first make copies of them in float32. The sum of a float16 tensor is only
    taken in float32 where it leaves float16, whose largest number is 65504.
    """
    if math.isfinite(sum(tensor.detach().sum().item() for tensor in tensors)):
        return True
    return any(tensor.dtype == torch.float16 for tensor in tensors) and math.isfinite(
        sum(tensor.detach().sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).item() for tensor in tensors)
    )
