"""Decoding one token at a time: what the layers keep of the tokens before, and the choice of the next one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.models._beam import Beams
from fastattn.models._checks import check_number, check_temperature, check_token, check_tokens
from fastattn.modules import KVCache, MultiheadAttention, PagedKVCache, TransformerDecoderLayer
from fastattn.ops import attention
from fastattn.ops.common.checks import under_autocast


class DecodingCache:
    """What a stack of layers keeps between two steps of decoding; without gradients, and without the graph that made
    the memory.

    Args:
        layers: of the stack.
        batch: number of sequences that there may be, with all beginnings that a beam search keeps of each.
        max_length: number of positions that there may be.
        memory: ``[M, S, E]``: what the layers of a decoder read. It is kept once for all beginnings of a sequence:
            neighbours, as many for each of the ``M``.
        memory_padding: boolean ``[M, S]``, True = padding.
        page_size: tokens in a page; None: no pages, each sequence has ``max_length`` slots.
        pages: number of pages; None: as many as ``batch`` sequences of ``max_length`` take.

    Attributes:
        kv: a :class:`fastattn.KVCache` or :class:`fastattn.PagedKVCache`: what the layers hold of the tokens so far.
        memory: for each layer keys and values ``[M, H, S, D]`` of what it reads; empty where there is no memory.
    """

    @torch.no_grad()
    def __init__(
        self,
        layers: Sequence[Any],
        batch: int,
        max_length: int,
        memory: Tensor | None = None,
        memory_padding: Tensor | None = None,
        *,
        page_size: int | None = None,
        pages: int | None = None,
    ) -> None:
        with self.reading(layers[0]):
            heads, weight, _ = self.projection(layers[0].self_attn)
            (like,) = under_autocast(weight[:0])  # what the projections of a step give
        head_dim = layers[0].self_attn.head_dim
        made: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.kv: KVCache | PagedKVCache
        if page_size is None:
            self.kv = KVCache(len(layers), batch, heads, max_length, head_dim, **made)
        else:
            check_number("page_size", page_size)
            pages = batch * -(-max_length // page_size) if pages is None else pages
            made |= {"page_size": page_size, "max_length": max_length}
            self.kv = PagedKVCache(len(layers), batch, heads, pages, head_dim, **made)
        self.memory: list[tuple[Tensor, ...]] = []
        self.memory_padding = memory_padding
        if memory is not None:
            for layer in layers:
                with self.reading(layer):
                    self.memory.append(self.project(layer.multihead_attn, memory, 1, 3))

    @property
    def length(self) -> int:
        """How many positions the sequences have; all are as long as the first."""
        return self.kv.lengths_on_host[0]

    # ------------------------------------------------------------- what a model that is shared out does in another way

    def reading(self, layer: Any) -> contextlib.AbstractContextManager[Any]:
        """While it lasts, the layer's parameters can be read."""
        return contextlib.nullcontext()

    def projection(self, attention: MultiheadAttention) -> tuple[int, Tensor, Tensor | None]:
        """How many heads this process has, and the weight and the bias that give their queries, keys and values."""
        assert attention.in_proj_weight is not None, "the layers of a transformer have one size for all three"
        return attention.num_heads, attention.in_proj_weight, attention.in_proj_bias

    def project_back(self, attention: MultiheadAttention, merged: Tensor) -> Tensor:
        """The features of this process's heads, side by side, through the output's projection."""
        return attention.out_proj(merged)

    def attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, backend: Any) -> Any:
        """Of the first sequences' next positions, ``[B, H, T, D]``, to all that a layer holds and to themselves."""
        return self.kv.attend(index, query, key, value, sequences=slice(0, len(query)), backend=backend)

    def reserve(self, tokens: int, sequences: slice) -> None:
        """Make room for the next positions of some sequences."""
        self.kv.reserve(tokens, sequences)

    def advance(self, tokens: int, sequences: slice) -> None:
        """Hold them, once all layers have written them."""
        self.kv.advance(tokens, sequences)

    def check_alike(self, prompt: Tensor, words: dict[str, Any]) -> None:
        """Raise where processes that generate together were called with different arguments."""

    def agreed(self, tensor: Tensor) -> Tensor:
        """What the first of the processes has that say the same tokens."""
        return tensor

    def everywhere(self, is_done: bool) -> bool:
        """Whether all processes that compute together are done."""
        return is_done

    # ------------------------------------------------------------------------------------------------ in all processes

    def project(self, attention: MultiheadAttention, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        """Of queries (0), keys (1) and values (2) those from ``first`` to before ``last``, each ``[B, H, T, D]``."""
        heads, weight, bias = self.projection(attention)
        width = heads * attention.head_dim
        rows = slice(first * width, last * width)
        projected = F.linear(x, weight[rows], None if bias is None else bias[rows])
        return projected.unflatten(-1, (last - first, heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def merge(self, attention: MultiheadAttention, attended: Any) -> Tensor:
        """The heads ``[B, H, T, D]`` side by side, through the output's projection."""
        return self.project_back(attention, attended.transpose(1, 2).flatten(2))


def decode(layer: Any, x: Tensor, cache: DecodingCache, index: int) -> Tensor:
    """What ``layer`` gives for the next positions of a causal sequence; by its own parameters, without dropout.

    Args:
        layer: a TransformerEncoderLayer or TransformerDecoderLayer of this package, post-norm or pre-norm, with the
            batch first.
        x: ``[B, T, E]``: the next ``T`` positions, one or more, of the first ``B`` sequences.
        cache: with room for them; it is written, and its lengths stay.
        index: of the layer in its stack.

    Returns:
        ``[B, T, E]``: the last ``T`` rows of what the layer gives for the whole sequence under the causal mask.
    """

    def attend(x: Tensor) -> Tensor:
        query, key, value = cache.project(layer.self_attn, x, 0, 3)
        return cache.merge(layer.self_attn, cache.attend(index, query, key, value, layer.self_attn.backend))

    def read_memory(x: Tensor) -> Tensor:
        keys, values = cache.memory[index]
        # All beginnings of a sequence read one memory, and no query sees another: they are its rows of queries
        rows = x.reshape(len(keys), x[..., 0].numel() // max(1, len(keys)), x.shape[2])
        (query,) = cache.project(layer.multihead_attn, rows, 0, 1)
        padding, backend = cache.memory_padding, layer.multihead_attn.backend
        attended = attention(query, keys, values, key_padding_mask=padding, backend=backend)
        return cache.merge(layer.multihead_attn, attended).view_as(x)

    def feed_forward(x: Tensor) -> Tensor:
        return layer.linear2(layer.activation(layer.linear1(x)))

    blocks = [(layer.norm1, attend), (layer.norm2, feed_forward)]
    if isinstance(layer, TransformerDecoderLayer):
        blocks = [(layer.norm1, attend), (layer.norm2, read_memory), (layer.norm3, feed_forward)]
    with cache.reading(layer):
        for norm, block in blocks:
            x = x + block(norm(x)) if layer.norm_first else norm(block(x), x)
    return x


# Takes tokens that it has not seen yet, [B, T], and gives the logits of the token behind them, [B, vocabulary]. Between
# them, sequence i becomes what sequence parents[i] was, if there are parents [B]
_Step = Callable[[Tensor, "Tensor | None"], Tensor]


def generate(
    trunk: Any,
    head: Any,
    prompt: Tensor,
    length: int,
    *,
    memory: Callable[[], tuple[Tensor | None, Tensor | None]] = lambda: (None, None),
    temperature: float,
    seed: int | None,
    end: int | None,
    beam: int,
    page_size: int | None,
) -> Tensor:
    """Let a causal trunk say how ``prompt`` goes on, feeding it what it said.

    Args:
        trunk: a :class:`fastattn.models.TransformerTrunk`.
        head: a linear layer on its vectors, which gives logits.
        prompt: ``[B, P]``, ``P`` at least 1.
        length: number of tokens to add at most.
        memory: makes what the trunk reads, ``[B, S, E]``, and its padding; called when the arguments were checked.
        temperature: 0 takes the likeliest token, else one is drawn from ``softmax(logits / temperature)``.
        seed: of the draws; None: torch's global generator.
        end: a sequence that said it says nothing else any more; when all have, generation stops.
        beam: number of beginnings that are kept of each sequence.
        page_size: of a cache in pages; None: a contiguous one.

    Returns:
        ``[B, P + length]``, or fewer where all sequences ended.

    Raises:
        TypeError: the prompt is not of integers.
        ValueError: the prompt is empty, a number is out of its range, ``end`` is no token, or a beam search is asked to
            draw.
    """
    vocabulary = head.out_features
    check_tokens("prompt", prompt, least=1)
    check_number("length", length, 0)
    check_temperature(temperature)
    if end is not None:
        check_token("end", end, vocabulary)
    check_number("beam", beam)
    if beam > 1 and temperature != 0.0:
        raise ValueError(f"beam={beam}, temperature={temperature}: a beam search draws nothing, expected temperature=0")
    if page_size is not None:
        check_number("page_size", page_size)
    if length == 0:
        return prompt
    (batch, given), longest = prompt.shape, trunk.config.max_length
    room = min(given + length - 1, longest)  # the last token is said, never read
    pages = None
    if page_size is not None:  # full pages of the prompt are held once for all beginnings, which differ behind it
        shared = min(given, room) // page_size
        pages = max(1, batch * (shared + beam * (-(-room // page_size) - shared)))
    cache = trunk.new_cache(max(1, batch * beam), *memory(), max_length=room, page_size=page_size, pages=pages)
    cache.check_alike(prompt, {"length": length, "temperature": temperature, "seed": seed, "end": end, "beam": beam})

    def step(new: Tensor, parents: Tensor | None) -> Tensor:
        if parents is not None:
            cache.kv.fork(parents)
        return head(trunk.step(new, cache)[:, -1])

    if beam > 1:
        return _search(step, cache, prompt, length, beam, end)
    return _go_on(step, cache, prompt, length, temperature, seed, end)


def _go_on(
    step: _Step,
    cache: DecodingCache,
    prompt: Tensor,
    length: int,
    temperature: float,
    seed: int | None,
    end: int | None,
) -> Tensor:
    """The prompt with one token behind the other, the likeliest or one that is drawn."""
    generator = None if seed is None else torch.Generator(prompt.device).manual_seed(seed)
    tokens = new = prompt
    ended = torch.zeros_like(prompt[:, :1], dtype=torch.bool)
    for _ in range(length):
        logits = step(new, None)
        if temperature == 0.0:
            new = logits.argmax(-1, keepdim=True)
        else:
            below = logits - logits.amax(-1, keepdim=True)  # so that no quotient is inf
            new = torch.multinomial(torch.softmax(below / temperature, dim=-1), 1, generator=generator)
        new = cache.agreed(new.to(prompt.dtype))
        if end is not None:
            new = torch.where(ended, end, new)
            ended |= new == end
        tokens = torch.cat((tokens, new), dim=1)
        if end is not None and cache.everywhere(bool(ended.all())):
            break
    return tokens


def _search(step: _Step, cache: DecodingCache, prompt: Tensor, length: int, beam: int, end: int | None) -> Tensor:
    """The likeliest of what a beam search finds behind the prompt."""
    beams = Beams(prompt, beam, end)
    new, parents = prompt, None
    for _ in range(length):
        batch, kept = beams.last.shape
        origin = beams.extend(cache.agreed(step(new, parents)).unflatten(0, (batch, kept)))
        if end is not None and cache.everywhere(beams.finished):
            break
        first = kept * torch.arange(batch, device=origin.device)[:, None]  # of each sequence's beginnings
        new, parents = beams.last.reshape(-1, 1), (first + origin).flatten()
    return beams.tokens[:, 0]
