"""Decoding one token at a time: what the layers keep of the tokens before, and the choice of the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.models._checks import check_number, check_temperature, check_token, check_tokens
from fastattn.modules import MultiheadAttention, TransformerDecoderLayer
from fastattn.ops import attention


class LayerCache:
    """What one layer keeps: keys and values of the positions so far, and those of the memory that it reads.

    Args:
        max_length: number of positions that there may be.
        memory: keys and values ``[B, H, S, D]`` of what a decoder's layer reads, projected once for all steps.
        memory_padding: boolean ``[B, S]``, True = padding.
    """

    def __init__(
        self, max_length: int, memory: tuple[Tensor, Tensor] | None = None, memory_padding: Tensor | None = None
    ) -> None:
        self.max_length = max_length
        self.memory = memory
        self.memory_padding = memory_padding
        self.length = 0
        self._room: Tensor | None = None  # [2, B, H, max_length, D]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all positions, as views, once ``[B, H, T, D]`` of the next ``T`` are behind them."""
        if self._room is None:  # made here, where batch, device and dtype are known
            batch, heads, _, head_dim = keys.shape
            self._room = keys.new_empty(2, batch, heads, self.max_length, head_dim)
        first, self.length = self.length, self.length + keys.shape[2]
        room_for_keys, room_for_values = self._room[..., : self.length, :]
        room_for_keys[:, :, first:] = keys
        room_for_values[:, :, first:] = values
        return room_for_keys, room_for_values


class DecodingCache:
    """What a stack of layers keeps between two steps of decoding; without gradients, and without the graph that made
    the memory.

    Args:
        layers: of the stack.
        max_length: number of positions that there may be.
        memory: ``[B, S, E]``: what the layers of a decoder read.
        memory_padding: boolean ``[B, S]``, True = padding.
    """

    @torch.no_grad()
    def __init__(
        self,
        layers: Iterable[nn.Module],
        max_length: int,
        memory: Tensor | None = None,
        memory_padding: Tensor | None = None,
    ) -> None:
        self.length = 0
        self.layers: list[LayerCache] = []
        for layer in layers:
            keys_and_values = None
            if memory is not None:
                keys, values = _project(cast(MultiheadAttention, layer.multihead_attn), memory, 1, 3)
                keys_and_values = keys, values
            self.layers.append(LayerCache(max_length, keys_and_values, memory_padding))


def decode(layer: Any, x: Tensor, cache: LayerCache) -> Tensor:
    """What ``layer`` gives for the next positions of a causal sequence; by its own parameters, without dropout.

    Args:
        layer: a TransformerEncoderLayer or TransformerDecoderLayer of this package, post-norm or pre-norm, with the
            batch first.
        x: ``[B, T, E]``: the next ``T`` positions, one or more.
        cache: of this layer; it grows by ``T`` positions.

    Returns:
        ``[B, T, E]``: the last ``T`` rows of what the layer gives for the whole sequence under the causal mask.
    """

    def attend(x: Tensor) -> Tensor:
        query, keys, values = _project(layer.self_attn, x, 0, 3)
        keys, values = cache.append(keys, values)
        # The queries are the last positions; a single one sees everything, and needs no mask to be told so
        causal: dict[str, Any] = {"is_causal": x.shape[1] > 1, "causal_alignment": "bottom_right"}
        return _merge(layer.self_attn, attention(query, keys, values, **causal, backend=layer.self_attn.backend))

    def read_memory(x: Tensor) -> Tensor:
        assert cache.memory is not None
        (query,) = _project(layer.multihead_attn, x, 0, 1)
        padding, backend = cache.memory_padding, layer.multihead_attn.backend
        attended = attention(query, *cache.memory, key_padding_mask=padding, backend=backend)
        return _merge(layer.multihead_attn, attended)

    def feed_forward(x: Tensor) -> Tensor:
        return layer.linear2(layer.activation(layer.linear1(x)))

    blocks = [(layer.norm1, attend), (layer.norm2, feed_forward)]
    if isinstance(layer, TransformerDecoderLayer):
        blocks = [(layer.norm1, attend), (layer.norm2, read_memory), (layer.norm3, feed_forward)]
    for norm, block in blocks:
        x = x + block(norm(x)) if layer.norm_first else norm(block(x), x)
    return x


def generate(
    step: Callable[[Tensor], Tensor],
    prompt: Tensor,
    length: int,
    vocabulary: int,
    *,
    temperature: float = 0.0,
    seed: int | None = None,
    end: int | None = None,
) -> Tensor:
    """Let ``step`` say how ``prompt`` goes on, feeding it what it said.

    Args:
        step: takes the tokens that it has not seen yet, ``[B, T]``, and gives ``[B, vocabulary]``: the logits of the
            token behind them.
        prompt: ``[B, P]``, ``P`` at least 1.
        length: number of tokens to add at most.
        vocabulary: number of tokens that there are.
        temperature: 0 takes the likeliest token, else one is drawn from ``softmax(logits / temperature)``.
        seed: of the draws; None: torch's global generator.
        end: a sequence that said it says nothing else any more; when all have, generation stops.

    Returns:
        ``[B, P + length]``, or fewer where all sequences ended.

    Raises:
        TypeError: the prompt is not of integers.
        ValueError: the prompt is empty, a number is negative, or ``end`` is no token.
    """
    check_tokens("prompt", prompt, least=1)
    check_number("length", length, 0)
    check_temperature(temperature)
    if end is not None:
        check_token("end", end, vocabulary)
    generator = None if seed is None else torch.Generator(prompt.device).manual_seed(seed)
    tokens = new = prompt
    ended = torch.zeros_like(prompt[:, :1], dtype=torch.bool)
    for _ in range(length):
        logits = step(new)
        if temperature == 0.0:
            new = logits.argmax(-1, keepdim=True)
        else:
            below = logits - logits.amax(-1, keepdim=True)  # so that no quotient is inf
            new = torch.multinomial(torch.softmax(below / temperature, dim=-1), 1, generator=generator)
        if end is not None:
            new = torch.where(ended, end, new)
            ended |= new == end
        tokens = torch.cat((tokens, new), dim=1)
        if end is not None and bool(ended.all()):
            break
    return tokens


def _project(attention: MultiheadAttention, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
    """Of queries (0), keys (1) and values (2) those from ``first`` to before ``last``, each ``[B, H, T, D]``."""
    assert attention.in_proj_weight is not None, "the layers of a transformer have one size for all three"
    rows = slice(first * attention.embed_dim, last * attention.embed_dim)
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias[rows]
    projected = F.linear(x, attention.in_proj_weight[rows], bias)
    return projected.unflatten(-1, (last - first, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def _merge(attention: MultiheadAttention, attended: Any) -> Tensor:
    """The heads ``[B, H, T, D]`` side by side, through the output's projection."""
    return attention.out_proj(attended.transpose(1, 2).flatten(2))
