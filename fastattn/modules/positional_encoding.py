"""What tells attention, which knows no order, where each vector stands: a learned look-up table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_unary

from fastattn.modules._tracing import leaf_node
from fastattn.ops.common.tracing import is_symbolically_traced


class LearnedPositionalEncoding(nn.Module):
    """A learned vector for each position, added to the input or put behind it (arXiv:1706.03762, section 3.5).

    Self-attention gives permuted outputs for permuted inputs. With this in front of it the order counts.

    Args:
        max_length: number of positions in the table.
        width: of the vectors: where they are added, that of the input.
        concatenate: put the vectors behind the input's features instead of adding them.
        std: standard deviation of the table at first.
        device: where to make the table.
        dtype: of which type to make it.

    Raises:
        ValueError: ``max_length`` or ``width`` is not positive.
    """

    def __init__(
        self,
        max_length: int,
        width: int,
        *,
        concatenate: bool = False,
        std: float = 0.02,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in {"max_length": max_length, "width": width}.items():
            if size <= 0:
                raise ValueError(f"{name}={size}: expected a positive number")
        self.concatenate = concatenate
        self.std = std
        self.weight = nn.Parameter(torch.empty(max_length, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew."""
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Tell each vector of ``x`` where it stands.

        Args:
            x: ``[..., L, E]``.
            start: the position of the first vector; for decoding, the number of those that came before.

        Returns:
            ``[..., L, E]``, or with ``concatenate`` ``[..., L, E + width]``, in the dtype of ``x``.

        Raises:
            TypeError: ``x`` is not floating.
            ValueError: ``x`` has no two dimensions, the table is too short, or vectors that are to be added are not as
                wide as ``x``.
        """
        if has_torch_function_unary(x) and is_symbolically_traced(x):
            node: Any = leaf_node(self, x, start=start)
            if node is not None:
                return node
        max_length, width = self.weight.shape
        if not x.is_floating_point():
            raise TypeError(f"x is {x.dtype}: expected a floating dtype")
        if x.dim() < 2:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected [..., length, size]")
        length = x.shape[-2]
        if start < 0 or start + length > max_length:
            raise ValueError(f"positions {start} to {start + length - 1}: the table holds max_length={max_length}")
        positions = self.weight[start : start + length].to(x.dtype)
        if self.concatenate:
            return torch.cat((x, positions.expand(*x.shape[:-1], width)), dim=-1)
        if x.shape[-1] != width:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected [..., {width}], as wide as the table")
        return x + positions

    def extra_repr(self) -> str:
        """Sizes, and what is done with the vectors."""
        max_length, width = self.weight.shape
        return f"{max_length}, {width}, concatenate={self.concatenate}"
