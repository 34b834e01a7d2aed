"""What every norm kernel is told: the tensors and numbers of one call."""

import dataclasses

import torch
import triton.language as tl
from torch import Tensor

from fastattn_kernels.common.arguments import Dropout

# The kernel arguments that Triton must not look at: a new number of rows is no reason to compile again.
RUN_TIME = ("row_count", "middle_rows", "inner_rows", "eps")


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name for a dtype of torch's."""
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]


@dataclasses.dataclass(frozen=True)
class NormProblem:
    """One call's inputs, already validated.

    Attributes:
        x: ``[..., N]``, float16, bfloat16 or float32, any strides.
        residual: ``[..., N]``, any strides; None: nothing is added.
        weight: ``[N]``, contiguous, and so are the next two.
        bias: ``[N]``.
        x_bias: ``[N]``.
        row_scale: ``[..., 1]``, any strides.
        is_rms: no mean is subtracted.
        eps: added to the variance, or the mean square.
        unit_offset: ``1 + weight`` multiplies.
        seed: int64 ``[2]`` on the device, seed and offset of the dropout; None: no dropout.
        dropout_p: the probability of dropping an element.
    """

    x: Tensor
    residual: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    x_bias: Tensor | None = None
    row_scale: Tensor | None = None
    is_rms: bool = False
    eps: float = 1e-5
    unit_offset: bool = False
    seed: Tensor | None = None
    dropout_p: float = 0.0

    @property
    def is_heavy(self) -> bool:
        """Whether x, before it is added, is given a bias, scaled or dropped: a tile then takes more registers."""
        return self.x_bias is not None or self.row_scale is not None or self.seed is not None

    def dropout(self) -> Dropout | None:
        """The kernel argument ``dropout``."""
        return None if self.seed is None else Dropout(self.seed, self.dropout_p)
