"""The gradients that a backward is given of its outputs and those that it writes of its inputs."""

import dataclasses

import torch
from torch import Tensor

from fastattn_kernels.common.arguments import OnlyIf, WeightsShare


@dataclasses.dataclass(frozen=True)
class Gradients:
    """The tensors that a backward writes its gradients into, any strides; whatever they hold before is lost, but for
    what rows in no packed sequence hold in ``d_alibi_slopes``: the other gradients of such rows become zero.

    Attributes:
        d_query: ``[B, H, L, D]``.
        d_key: ``[B, Hk, S, D]``.
        d_value: ``[B, Hk, S, Dv]``.
        d_alibi_slopes: ``[B, H, L]``, contiguous float32: what each row gives to the gradient of its head's ALiBi
            slope; None: not asked for.
    """

    d_query: Tensor
    d_key: Tensor
    d_value: Tensor
    d_alibi_slopes: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class WeightsGradient:
    """The gradient of the returned weights.

    Attributes:
        tensor: ``[B, L, S]`` of averaged weights, or ``[B, H, L, S]``; floating, any strides.
        heads: ``H``.
        used: boolean ``[]`` on the device, False where ``tensor`` is all zeros, as a compiled graph gets it if no loss
            uses the weights; None: it is used. The host does not read it, which would wait for the device.
    """

    tensor: Tensor
    heads: int
    used: Tensor | None = None

    def only_if_used(self, expected: bool = True) -> OnlyIf | None:
        """The kernel argument ``only_if``; None: the kernel runs in any case."""
        return None if self.used is None else OnlyIf(self.used.view(torch.uint8), int(expected))

    def argument(self) -> WeightsShare:
        """The kernel argument ``d_weights``. Averaged weights have head stride 0 and give each head 1 / H."""
        strides = self.tensor.stride()
        if self.tensor.dim() == 3:
            return WeightsShare(self.tensor, strides[0], 0, *strides[1:], 1.0 / max(self.heads, 1))
        return WeightsShare(self.tensor, *strides, 1.0)


def weights_argument(d_weights: WeightsGradient | None) -> WeightsShare | None:
    """The kernel argument ``d_weights`` of a gradient that may not be there."""
    return None if d_weights is None else d_weights.argument()
