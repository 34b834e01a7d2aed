"""The transformer: self-attention, residual, norm, an MLP on each vector alone, residual, norm; and the same again.

Only the attention mixes vectors. One trunk, a stack of such blocks, serves four models (arXiv:1706.03762): without a
mask it is an encoder; causal it is a language model; two of them, the second reading the first, turn one sequence into
another; and with a linear layer on top it tells classes apart, for which it may have been a language model before.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.models._checks import (
    check_not_all_padding,
    check_number,
    check_padding,
    check_targets,
    check_token,
    check_tokens,
    cross_entropy,
    evaluating,
)
from fastattn.models._decoding import DecodingCache, decode, generate
from fastattn.modules import AddLayerNorm, TransformerDecoderLayer, TransformerEncoderLayer
from fastattn.modules.positional_encoding import LearnedPositionalEncoding

# Of embeddings and of positions, at first: what a token is and where it stands count alike. Small, so that training
# soon moves even the tokens that are rare; at torch's 1 they stay nearly as they were drawn
_STD = 0.1


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The sizes of a stack.

    Attributes:
        width: of each vector, ``E``.
        heads: of each attention; divides ``width``.
        layers: number of blocks.
        feed_forward: size between the two layers of an MLP; default four times ``width``.
        max_length: number of positions that are known.
        dropout: probability of dropping, in training, as in :class:`fastattn.TransformerEncoderLayer`.
        norm_first: normalise what enters each block (pre-norm, and a last norm behind the stack) instead of what leaves
            its add (post-norm, as the lecture and the paper draw it).
        activation: of the MLPs, ``"relu"`` or ``"gelu"``.

    Raises:
        TypeError: a size is no int.
        ValueError: a number is out of its range, or ``heads`` does not divide ``width``.
    """

    width: int
    heads: int
    layers: int
    feed_forward: int | None = None
    max_length: int = 256
    dropout: float = 0.0
    norm_first: bool = False
    activation: str = "relu"

    def __post_init__(self) -> None:
        for name in ("width", "heads", "layers", "feed_forward", "max_length"):
            if (size := getattr(self, name)) is not None:
                check_number(name, size)
        if self.width % self.heads:
            raise ValueError(f"width={self.width}: heads={self.heads} does not divide it")
        if not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"dropout={self.dropout}: expected a probability between 0 and 1")
        if self.activation not in ("relu", "gelu"):
            raise ValueError(f"activation={self.activation!r}: expected 'relu' or 'gelu'")

    def layer_arguments(self) -> dict[str, Any]:
        """What a layer of :mod:`fastattn.modules` is made with."""
        return {
            "d_model": self.width,
            "nhead": self.heads,
            "dim_feedforward": 4 * self.width if self.feed_forward is None else self.feed_forward,
            "dropout": self.dropout,
            "activation": self.activation,
            "batch_first": True,
            "norm_first": self.norm_first,
        }


class TransformerTrunk(nn.Module):
    """Embeddings of tokens and of positions, and a stack of blocks.

    Args:
        vocabulary: number of tokens.
        config: the sizes.
        causal: no position sees a later one.
        reads_memory: each block also attends to the ``memory`` that :meth:`forward` takes (a decoder's).
    """

    def __init__(
        self, vocabulary: int, config: TransformerConfig, *, causal: bool = False, reads_memory: bool = False
    ) -> None:
        super().__init__()
        check_number("vocabulary", vocabulary)
        self.config = config
        self.causal = causal
        self.reads_memory = reads_memory
        self.tokens = nn.Embedding(vocabulary, config.width)
        nn.init.normal_(self.tokens.weight, std=_STD)
        self.positions = LearnedPositionalEncoding(config.max_length, config.width, std=_STD)
        self.dropout = nn.Dropout(config.dropout)
        kind = TransformerDecoderLayer if reads_memory else TransformerEncoderLayer
        self.layers = nn.ModuleList(kind(**config.layer_arguments()) for _ in range(config.layers))
        self.norm = AddLayerNorm(config.width) if config.norm_first else nn.Identity()

    def forward(
        self,
        tokens: Tensor,
        padding: Tensor | None = None,
        *,
        memory: Tensor | None = None,
        memory_padding: Tensor | None = None,
    ) -> Tensor:
        """A vector for each token.

        Args:
            tokens: integers ``[B, L]``.
            padding: boolean ``[B, L]``, True where a token is padding that nobody may see.
            memory: ``[B, S, E]``, for a trunk that reads it.
            memory_padding: boolean ``[B, S]``, True = padding.

        Returns:
            ``[B, L, E]``.

        Raises:
            TypeError: an argument is not of the type that is said here.
            ValueError: shapes do not fit, there are more tokens than positions, or there is a memory and the trunk
                reads none, or the other way round.
        """
        check_tokens("tokens", tokens)
        check_padding("padding", padding, tokens.shape)
        self._check_memory(memory, memory_padding, tokens.shape[0])
        x = self.dropout(self.positions(self.tokens(tokens)))
        mask = self._causal_mask(tokens, padding) if self.causal else None
        for layer in self.layers:
            if memory is None:
                x = layer(x, mask, padding, is_causal=self.causal)
            else:
                x = layer(
                    x,
                    memory,
                    mask,
                    tgt_key_padding_mask=padding,
                    memory_key_padding_mask=memory_padding,
                    tgt_is_causal=self.causal,
                )
        return self.norm(x)

    def new_cache(
        self,
        batch: int,
        memory: Tensor | None = None,
        memory_padding: Tensor | None = None,
        *,
        max_length: int | None = None,
        page_size: int | None = None,
        pages: int | None = None,
    ) -> DecodingCache:
        """What :meth:`step` keeps between its calls.

        Args:
            batch: number of sequences that there may be.
            memory: as for :meth:`forward`, once for all sequences that read it.
            memory_padding: as there.
            max_length: of a sequence; None: all positions that are known.
            page_size: tokens in a page of a :class:`fastattn.PagedKVCache`; None: a :class:`fastattn.KVCache`.
            pages: number of pages; None: as many as all sequences may take.
        """
        self._check_memory(memory, memory_padding, None)
        most = self.config.max_length if max_length is None else max_length
        return DecodingCache(list(self.layers), batch, most, memory, memory_padding, page_size=page_size, pages=pages)

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: DecodingCache) -> Tensor:
        """What :meth:`forward` gives for tokens behind those of the steps before, without computing those again.

        Args:
            tokens: integers ``[B, T]``: the next ``T`` tokens, one or more, of the first ``B`` sequences.
            cache: from :meth:`new_cache`; these sequences grow by ``T`` positions.

        Returns:
            ``[B, T, E]``, without gradients and without dropout.

        Raises:
            TypeError: ``tokens`` are no integers.
            ValueError: the trunk is not causal, there are more tokens than positions, or the number of sequences is
                no multiple of that of the memory.
            CacheFullError: the cache has no room for them.
        """
        self._check_step(tokens, cache)
        return self._decoded(self.positions(self.tokens(tokens), start=cache.length), cache)

    def _check_step(self, tokens: Tensor, cache: DecodingCache) -> None:
        """Raise unless these may be the next tokens."""
        check_tokens("tokens", tokens)
        if not self.causal:
            raise ValueError("causal=False: what later tokens change cannot be kept")
        sources = len(cache.memory[0][0]) if cache.memory else 1
        if sources and len(tokens) % sources:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}: expected a multiple of the memory's {sources}")

    def _decoded(self, x: Tensor, cache: DecodingCache) -> Tensor:
        """What all layers make of the next positions; the cache then holds them."""
        sequences = slice(0, len(x))
        cache.reserve(x.shape[1], sequences)
        for index, layer in enumerate(self.layers):
            x = decode(layer, x, cache, index)
        cache.advance(x.shape[1], sequences)
        return self.norm(x)

    def _check_memory(self, memory: Tensor | None, padding: Tensor | None, batch: int | None) -> None:
        """Raise unless there is a memory where one is read, for a batch of so many."""
        if memory is None:
            if self.reads_memory:
                raise ValueError("memory=None: a trunk with reads_memory=True reads one, [batch, length, width]")
            return
        shape, width = tuple(memory.shape), self.config.width
        if not self.reads_memory:
            raise ValueError(f"memory has shape {shape}: a trunk with reads_memory=False reads none")
        if len(shape) != 3 or shape[2] != width or batch not in (None, shape[0]):
            raise ValueError(f"memory has shape {shape}: expected [{batch or 'batch'}, length, {width}]")
        check_padding("memory_padding", padding, memory.shape[:2])

    @staticmethod
    def _causal_mask(tokens: Tensor, padding: Tensor | None) -> Tensor:
        """Boolean ``[L, L]``, True = hidden."""
        length = tokens.shape[1]
        if padding is None:
            # Never read, since the layers are told is_causal: one element stands for all of it
            return torch.ones(1, 1, dtype=torch.bool, device=tokens.device).expand(length, length)
        return torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)


class TransformerLanguageModel(nn.Module):
    """A causal trunk that says which token comes next.

    Args:
        vocabulary: number of tokens.
        config: the sizes.
    """

    def __init__(self, vocabulary: int, config: TransformerConfig) -> None:
        super().__init__()
        self.trunk = TransformerTrunk(vocabulary, config, causal=True)
        self.head = nn.Linear(config.width, vocabulary)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Logits ``[B, L, vocabulary]``: at each position those of the token behind it. Arguments as for the trunk."""
        return self.head(self.trunk(tokens, padding))

    def loss(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Mean cross entropy, in nats, of each token that is no padding but the first, given those before it."""
        check_targets("tokens", tokens, padding)
        return cross_entropy(self(tokens[:, :-1], None if padding is None else padding[:, :-1]), tokens, padding)

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        length: int,
        *,
        temperature: float = 0.0,
        seed: int | None = None,
        end: int | None = None,
        beam: int = 1,
        page_size: int | None = None,
    ) -> Tensor:
        """Go on with ``prompt``, one token after the other, by a cache.

        Args:
            prompt: integers ``[B, P]``, ``P`` at least 1, without padding.
            length: number of tokens to add at most.
            temperature: 0 takes the likeliest token, else one is drawn from ``softmax(logits / temperature)``.
            seed: of the draws; None: torch's global generator.
            end: the token at which a sequence ends; what follows it is ``end`` again.
            beam: number of beginnings that are kept of each sequence at each step (a beam search); 1 keeps the one
                that is said.
            page_size: keep keys and values in pages of so many tokens (:class:`fastattn.PagedKVCache`), which the
                beginnings of a beam search share; None: each in a row of its own (:class:`fastattn.KVCache`).

        Returns:
            ``[B, P + length]``, or fewer where all sequences ended; of a beam search the likeliest that was found.

        Raises:
            TypeError: the prompt is not of integers.
            ValueError: the prompt is empty, a number is out of its range, there are more tokens than positions, or a
                beam search is given a temperature.
        """
        choice: dict[str, Any] = {"temperature": temperature, "seed": seed, "end": end, "beam": beam}
        with evaluating(self):
            return generate(self.trunk, self.head, prompt, length, page_size=page_size, **choice)


class TransformerClassifier(nn.Module):
    """A trunk, new or pretrained, and a linear layer on the mean of its vectors.

    Args:
        trunk: taken as it is, not copied: a language model's goes on learning here.
        classes: number of classes.
    """

    def __init__(self, trunk: TransformerTrunk, classes: int) -> None:
        super().__init__()
        check_number("classes", classes)
        self.trunk = trunk
        self.head = nn.Linear(trunk.config.width, classes)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Logits ``[B, classes]`` of token sequences ``[B, L]``; ``padding`` as for the trunk, not all of a row."""
        check_tokens("tokens", tokens, least=1)
        check_padding("padding", padding, tokens.shape)
        check_not_all_padding("padding", padding)
        x = self.trunk(tokens, padding)
        if padding is None:
            return self.head(x.mean(dim=1))
        kept = ~padding[..., None]
        return self.head(torch.where(kept, x, 0).sum(dim=1) / kept.sum(dim=1))


class TransformerEncoderDecoder(nn.Module):
    """One sequence into another: an encoder reads the source, a causal decoder reads what it found.

    Args:
        source_vocabulary: number of tokens of the source.
        target_vocabulary: number of tokens of the target.
        config: the sizes of both.
    """

    def __init__(self, source_vocabulary: int, target_vocabulary: int, config: TransformerConfig) -> None:
        super().__init__()
        self.encoder = TransformerTrunk(source_vocabulary, config)
        self.decoder = TransformerTrunk(target_vocabulary, config, causal=True, reads_memory=True)
        self.head = nn.Linear(config.width, target_vocabulary)

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        source_padding: Tensor | None = None,
        target_padding: Tensor | None = None,
    ) -> Tensor:
        """Logits of the token behind each of the target's.

        Args:
            source: integers ``[B, S]``.
            target: integers ``[B, L]``, from the start token on.
            source_padding: boolean ``[B, S]``, True = padding.
            target_padding: boolean ``[B, L]``, True = padding.

        Returns:
            ``[B, L, target_vocabulary]``.

        Raises:
            ValueError: there are more tokens than positions.
        """
        check_tokens("source", source, least=1)
        memory = self.encoder(source, source_padding)
        return self.head(self.decoder(target, target_padding, memory=memory, memory_padding=source_padding))

    def loss(
        self,
        source: Tensor,
        target: Tensor,
        source_padding: Tensor | None = None,
        target_padding: Tensor | None = None,
    ) -> Tensor:
        """Mean cross entropy, in nats, of each of the target's tokens behind its first; arguments as for the model."""
        check_targets("target", target, target_padding)
        padding = None if target_padding is None else target_padding[:, :-1]
        return cross_entropy(self(source, target[:, :-1], source_padding, padding), target, target_padding)

    @torch.no_grad()
    def generate(
        self,
        source: Tensor,
        length: int,
        *,
        start: int,
        source_padding: Tensor | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        end: int | None = None,
        beam: int = 1,
        page_size: int | None = None,
    ) -> Tensor:
        """The target of ``source``, from ``start`` on, by a cache.

        Args:
            source: integers ``[B, S]``.
            length: number of tokens to say at most.
            start: the token that the decoder is started with.
            source_padding: boolean ``[B, S]``, True = padding.
            temperature: as for :meth:`TransformerLanguageModel.generate`, and so are the others.
            seed: as there.
            end: as there.
            beam: as there. What the encoder found is kept once for all beginnings of a sequence.
            page_size: as there.

        Returns:
            ``[B, 1 + length]``, or fewer where all sequences ended.

        Raises:
            TypeError: the source is not of integers.
            ValueError: the source is empty, a number is out of its range, there are more tokens than positions, or a
                beam search is given a temperature.
        """
        check_tokens("source", source, least=1)
        check_token("start", start, self.head.out_features)
        choice: dict[str, Any] = {"temperature": temperature, "seed": seed, "end": end, "beam": beam}
        with evaluating(self):
            return generate(
                self.decoder,
                self.head,
                torch.full_like(source[:, :1], start),
                length,
                memory=lambda: (self.encoder(source, source_padding), source_padding),
                page_size=page_size,
                **choice,
            )
