"""What every attention kernel is told: the tensors and numbers of one call, masks as strides."""

import dataclasses

import torch
from torch import Tensor

from fastattn_kernels.attention_config import Load


def _broadcast_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides with 0 on the axes of size 1: they broadcast, and nothing is expanded."""
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride()))


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call's inputs, already validated.

    Attributes:
        query: ``[B, H, L, D]``, float16, bfloat16 or float32, any strides; so are the next two.
        key: ``[B, Hk, S, D]``.
        value: ``[B, Hk, S, Dv]``.
        scale: multiplies the scores.
        bias: ``[B | 1, H | 1, L | 1, S | 1]``, floating, added to the scaled scores.
        mask: ``[B | 1, H | 1, L | 1, S | 1]``, boolean, True = may see.
        key_padding_mask: ``[B, S]``, boolean, True = padding.
        diagonal: query ``i`` sees keys ``j <= i + diagonal``; None: every key.
        seed: int64 ``[2]`` on the device, seed and offset of the dropout; None: no dropout.
        dropout_p: the probability of dropping a weight.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    bias: Tensor | None = None
    mask: Tensor | None = None
    key_padding_mask: Tensor | None = None
    diagonal: int | None = None
    seed: Tensor | None = None
    dropout_p: float = 0.0

    def masks_pairs(self) -> bool:
        """Whether some query may see a key that another one, or nobody, may not.

        Then NaN or inf in what is masked out could leak as 0 * NaN, and a launch is followed by a careful one that does
        again, with 0 * NaN = 0, the tiles that are not finite. It exits at once where all are: a few microseconds,
        against a second, register-hungry loop in every kernel.
        """
        ruled = self.mask is not None or self.bias is not None or self.key_padding_mask is not None
        return ruled or (self.diagonal is not None and self.query.shape[2] > 1)

    def load(self, d_weights: "WeightsGradient | None" = None) -> Load:
        """What a tile of scores carries beside itself."""
        if self.seed is not None or d_weights is not None:
            return "heavy"
        masked = self.mask is not None or self.bias is not None or self.key_padding_mask is not None
        return "masked" if masked else "plain"

    def rule_arguments(self) -> tuple[object, ...]:
        """The arguments ``mask_ptr .. stride_padding_n`` that every kernel takes in this order."""
        arguments: list[object] = []
        for tensor, axes in ((self.mask, 4), (self.bias, 4)):
            arguments += [None] + [0] * axes if tensor is None else [_as_bytes(tensor), *_broadcast_strides(tensor)]
        padding = self.key_padding_mask
        arguments += [None, 0, 0] if padding is None else [_as_bytes(padding), *padding.stride()]
        return tuple(arguments)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


@dataclasses.dataclass(frozen=True)
class WeightsGradient:
    """The gradient of the returned weights.

    Attributes:
        tensor: ``[B, L, S]`` of averaged weights, or ``[B, H, L, S]``; floating, any strides.
        heads: ``H``.
    """

    tensor: Tensor
    heads: int

    def arguments(self) -> tuple[object, ...]:
        """The kernel arguments ``dw_ptr .. share``: averaged weights have head stride 0 and give each head 1 / H."""
        strides = self.tensor.stride()
        if self.tensor.dim() == 3:
            return self.tensor, strides[0], 0, *strides[1:], 1.0 / self.heads
        return self.tensor, *strides, 1.0
