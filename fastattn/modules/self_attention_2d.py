"""Self-attention over the positions of a feature map: a layer that fits between any two convolutions."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_unary

from fastattn.modules._common import check_backend
from fastattn.ops import attention
from fastattn.ops.common.backends import Backend
from fastattn.ops.common.tracing import is_symbolically_traced


class SelfAttention2d(nn.Module):
    """Each position of a ``C x H x W`` feature map looks at all ``H * W`` of them (arXiv:1805.08318).

    1x1 convolutions make queries, keys and values, a 1x1 convolution on what was attended brings back the channels,
    and a residual connection adds the input: ``y = x + gate * output(attention(query(x), key(x), value(x)))``. The
    convolutions' feature maps are read as they lie, as strided ``[B, H, positions, D]`` views; no copy is made, and no
    tensor of positions times positions.

    Args:
        channels: number ``C`` of channels that come in and go out.
        num_heads: number of heads; divides the two below.
        qk_channels: of queries and keys, all heads together; default ``channels``. SAGAN has an eighth.
        value_channels: of the values, all heads together; default ``channels``. SAGAN has half.
        gate: learn a factor for what is added, which starts at 0: so a new layer changes nothing at first, and one can
            be put into a trained network.
        scale: multiplies the scores before softmax; default ``1/sqrt(D)``, ``D = qk_channels / num_heads``. SAGAN
            has 1.
        bias: learn biases in the convolutions.
        device: where to make the parameters.
        dtype: of which type to make them.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``, as for :func:`fastattn.attention`; default what
            :func:`fastattn.use_backend` says at the call.

    Raises:
        TypeError: a number of channels or heads is no int.
        ValueError: a number of channels or heads is not positive, ``num_heads`` does not divide them, or ``backend`` is
            unknown.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        *,
        qk_channels: int | None = None,
        value_channels: int | None = None,
        gate: bool = False,
        scale: float | None = None,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        check_backend(backend)
        qk_channels = channels if qk_channels is None else qk_channels
        value_channels = channels if value_channels is None else value_channels
        sizes = {"channels": channels, "num_heads": num_heads}
        sizes |= {"qk_channels": qk_channels, "value_channels": value_channels}
        for name, size in sizes.items():
            if not isinstance(size, int):
                raise TypeError(f"{name}={size!r}: expected an int, got {type(size).__name__}")
            if size <= 0:
                raise ValueError(f"{name}={size}: expected a positive number")
        for name in ("qk_channels", "value_channels"):
            if sizes[name] % num_heads:
                raise ValueError(f"{name}={sizes[name]}: num_heads={num_heads} does not divide it")
        self.num_heads = num_heads
        self.scale = scale
        self.backend: Backend | None = backend
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.query = nn.Conv2d(channels, qk_channels, 1, **factory)
        self.key = nn.Conv2d(channels, qk_channels, 1, **factory)
        self.value = nn.Conv2d(channels, value_channels, 1, **factory)
        self.output = nn.Conv2d(value_channels, channels, 1, **factory)
        self.gate = nn.Parameter(torch.zeros((), device=device, dtype=dtype)) if gate else None

    @overload
    def forward(
        self, x: Tensor, *, need_weights: Literal[False] = False, average_attn_weights: bool = True
    ) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, *, need_weights: Literal[True], average_attn_weights: bool = True
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, x: Tensor, *, need_weights: bool = False, average_attn_weights: bool = True
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from every position to every position, and add ``x``.

        Args:
            x: ``[B, C, H, W]``, in torch's usual order or with channels last.
            need_weights: also return the weights. Without them no tensor of positions times positions is made.
            average_attn_weights: the weights averaged over heads instead of one set a head.

        Returns:
            A tensor like ``x``; with ``need_weights`` the pair of it and the weights, ``[B, H, W, H, W]`` averaged,
            ``[B, heads, H, W, H, W]`` not: those of the position that the first two name, over all positions.

        Raises:
            ValueError: ``x`` is not ``[B, C, H, W]``, ``H`` and ``W`` at least 1.
            NotImplementedError: the backend asked for by name refuses; the message lists its reasons.
        """
        symbolic = has_torch_function_unary(x) and is_symbolically_traced(x)  # torch.fx: no shape to look at
        if not symbolic and (x.dim() != 4 or x.shape[1] != self.query.in_channels or min(x.shape[2:]) == 0):
            raise ValueError(f"x has shape {tuple(x.shape)}: expected [B, {self.query.in_channels}, H, W], not empty")
        attended: Any = attention(
            self._positions(self.query(x)),
            self._positions(self.key(x)),
            self._positions(self.value(x)),
            scale=self.scale,
            need_weights=need_weights,
            average_attn_weights=average_attn_weights,
            backend=self.backend,
        )
        attended, weights = (attended[0], attended[1]) if need_weights else (attended, None)
        batch, _, height, width = x.shape
        # A view too where attention lays its output out as its query lies, which the kernels do
        added = self.output(attended.transpose(-2, -1).reshape(batch, self.value.out_channels, height, width))
        y = x + (added if self.gate is None else self.gate * added)
        if weights is None:
            return y
        return y, weights.unflatten(-1, (height, width)).unflatten(-3, (height, width))

    def _positions(self, feature_map: Tensor) -> Tensor:
        """``[B, C, H, W]`` as ``[B, heads, H * W, C / heads]``: a view, or an error, never a copy."""
        batch, channels, height, width = feature_map.shape
        return feature_map.view(batch, self.num_heads, channels // self.num_heads, height * width).transpose(-2, -1)
