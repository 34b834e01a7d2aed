"""The layers that the family ``sequence`` compares: causal, of one width, ``[B, L, d]`` to ``[B, L, d]``.

Those that are asked for attention weights return them too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CellLoop(nn.Module):
    """``h_t = cell(x_t, h_(t-1))`` in a Python loop, the cell an ``nn.RNNCell`` or ``nn.GRUCell``."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state, states = x.new_zeros(x.shape[0], self.cell.hidden_size), []
        for token in x.unbind(1):
            state = self.cell(token, state)
            states.append(state)
        return torch.stack(states, dim=1)


class Recurrence(nn.Module):
    """All states of a one-layer ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM``."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


# Not ReLU: float32 puts some numbers on the other side of its kink, and gradients were 6.8e-4 from float64's
_activation = F.silu


class CausalConvolutions(nn.Module):
    """``silu(conv(x))``, kernel size 3, a number of times: each adds two tokens to what an output sees."""

    def __init__(self, size: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(size, size, 3) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x.mT
        for layer in self.layers:
            x = _activation(layer(F.pad(x, (2, 0))))
        return x.mT


def full_reach(seqlen: int) -> int:
    """Layers of kernel size 3 and dilations 1, 2, 4, ... until the last output sees the first token.

    ``n`` of them see ``2^(n+1) - 1`` tokens, so that it takes ``ceil(log2((L - 1) / 2 + 1))``.
    """
    return max(1, seqlen.bit_length() - 1)


class DilatedConvolutions(nn.Module):
    """A temporal convolutional network (arXiv:1803.01271): kernel size 3, dilations 1, 2, 4, ... to full reach."""

    def __init__(self, size: int, seqlen: int) -> None:
        super().__init__()
        self.dilations = [2**i for i in range(full_reach(seqlen))]
        self.layers = nn.ModuleList(nn.Conv1d(size, size, 3, dilation=dilation) for dilation in self.dilations)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mT
        for layer, dilation in zip(self.layers, self.dilations):
            # A stack as deep as this needs the residual: without it nothing would be left of the signal
            x = x + _activation(layer(F.pad(x, (2 * dilation, 0))))
        return x.mT


class _Attention(nn.Module):
    """The parameters of a ``MultiheadAttention`` and a causal mask, True = hidden."""

    hidden: Tensor

    def __init__(self, attention: nn.MultiheadAttention, seqlen: int) -> None:
        super().__init__()
        self.attention = attention
        self.register_buffer("hidden", torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1), persistent=False)


class CausalSelfAttention(_Attention):
    """A ``MultiheadAttention`` of either make, told that its mask is the causal one."""

    def __init__(self, attention: nn.MultiheadAttention, seqlen: int, *, weights: bool) -> None:
        super().__init__(attention, seqlen)
        self.weights = weights

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        output, weights = self.attention(
            x, x, x, attn_mask=self.hidden, need_weights=self.weights, is_causal=not self.weights
        )
        return (output,) if weights is None else (output, weights)


Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class AttentionByHand(_Attention):
    """The projections of an ``nn.MultiheadAttention`` written out around ``attend(query, key, value, hidden)``."""

    def __init__(self, attention: nn.MultiheadAttention, seqlen: int, attend: Attend) -> None:
        super().__init__(attention, seqlen)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        attention = self.attention
        qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = qkv.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = self.attend(query, key, value, self.hidden)
        return attention.out_proj(attended.transpose(1, 2).flatten(2))


def attend_naively(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
    """The formula, every score and every weight a number in memory."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return scores.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ value


def attend_sdpa(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
    """torch's fused operator, which needs no mask for this."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)
