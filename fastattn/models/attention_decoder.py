"""A recurrent decoder and what it reads: one vector for all its steps, or at each step what attention finds anew.

Both translation and captioning end in it. At step ``t``, with ``h`` the vectors that an encoder found:

    e = w . tanh(W s[t-1] + U h),  a = softmax(e),  c[t] = sum a h        with attention (arXiv:1409.0473)
    c[t] = c, one summary of all the vectors                              without (arXiv:1406.1078)
    s[t] = GRU([y[t-1], c[t]], s[t-1]),  y[t] ~ softmax(head(s[t]))

``y[t-1]`` is the target's last token in training (teacher forcing), and what the decoder said itself in use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastattn.models._beam import Beams
from fastattn.models._checks import check_number, check_targets, check_token, check_tokens, cross_entropy, evaluating
from fastattn.modules.additive_attention import AdditiveAttention

# Of the states of K hypotheses [B, K, hidden] the contexts [B, K, memory_dim], and the weights [B, K, S] if asked for
_Reader = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class Memory(NamedTuple):
    """What an encoder found.

    Attributes:
        vectors: ``[B, S, D]``.
        summary: ``[B, D]``, one vector for all of them.
        padding: boolean ``[B, S]``, True = padding.
    """

    vectors: Tensor
    summary: Tensor
    padding: Tensor | None = None


class Decoded(NamedTuple):
    """What a decoder said.

    Attributes:
        tokens: ``[B, 1 + T]``, from the start token on; behind its end a sequence says nothing but the end.
        weights: ``[B, T, S]``: where it looked before each of the ``T``; None without attention, or if not asked for.
        log_probability: ``[B]``: of each sequence, in nats.
    """

    tokens: Tensor
    weights: Tensor | None
    log_probability: Tensor


class AttentionDecoder(nn.Module):
    """A GRU that says one token after the other.

    Args:
        vocabulary: number of tokens.
        memory_dim: size ``D`` of the vectors that it reads.
        hidden: size of its state.
        embedding: size of the vector that stands for a token.
        attention_dim: size of the layer that scores the vectors; None: no attention, the summary at every step.
    """

    def __init__(
        self, vocabulary: int, memory_dim: int, *, hidden: int = 64, embedding: int = 32, attention_dim: int | None = 64
    ) -> None:
        super().__init__()
        for name, size in (("vocabulary", vocabulary), ("hidden", hidden), ("embedding", embedding)):
            check_number(name, size)
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.first_state = nn.Linear(memory_dim, hidden)
        self.attention = None if attention_dim is None else AdditiveAttention(hidden, memory_dim, attention_dim)
        self.cell = nn.GRUCell(embedding + memory_dim, hidden)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor, memory: Memory, *, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Teacher forcing: what would be said behind each of ``tokens``, had all before it been said.

        Args:
            tokens: integers ``[B, T]``, from the start token on.
            memory: what to read.
            need_weights: also return the weights of the attention.

        Returns:
            Logits ``[B, T, vocabulary]`` of the tokens behind those, and the weights ``[B, T, S]`` or None.

        Raises:
            TypeError: ``tokens`` are no integers.
            ValueError: there are none, or they have another number of rows than the memory.
        """
        check_tokens("tokens", tokens, least=1, batch=memory.vectors.shape[0])
        read, state = self._reader(memory, need_weights), self._first_state(memory)
        states, weights = [], []
        for token in tokens.split(1, dim=1):
            state, seen = self._step(token, state, read)
            states.append(state)
            weights.append(seen)
        logits = self.head(torch.cat(states, dim=1))
        return logits, torch.cat(weights, dim=1) if need_weights and self.attention is not None else None

    def loss(self, tokens: Tensor, memory: Memory, padding: Tensor | None = None) -> Tensor:
        """Mean cross entropy, in nats, of each of ``tokens`` ``[B, T]`` but the first, given those before it.

        ``padding``, boolean ``[B, T]``, is True where nothing is asked.
        """
        check_targets("tokens", tokens, padding)
        return cross_entropy(self(tokens[:, :-1], memory)[0], tokens, padding)

    @torch.no_grad()
    def generate(
        self,
        memory: Memory,
        length: int,
        *,
        start: int,
        end: int | None = None,
        beam: int = 1,
        need_weights: bool = False,
    ) -> Decoded:
        """Free running: the likeliest tokens, each fed back, found by a beam search.

        Args:
            memory: what to read.
            length: number of tokens to say at most.
            start: the token that the decoder is started with.
            end: the token at which a sequence ends.
            beam: number of beginnings that are kept at each step; 1 takes the likeliest token each time (greedy).
            need_weights: also return the weights of the attention.

        Returns:
            Of each sequence the likeliest that was found; shorter than ``length`` where all of them ended.

        Raises:
            ValueError: ``length`` or ``beam`` is too small, or ``start`` or ``end`` is no token.
        """
        check_number("length", length, 0)
        check_number("beam", beam)
        for name, token in (("start", start), ("end", end)):
            if token is not None:
                check_token(name, token, self.head.out_features)
        with evaluating(self):
            return self._generate(memory, length, start, end, beam, need_weights)

    def _generate(
        self, memory: Memory, length: int, start: int, end: int | None, beam: int, need_weights: bool
    ) -> Decoded:
        """The search, of arguments that were checked."""
        read, state = self._reader(memory, need_weights), self._first_state(memory)
        batch = state.shape[0]
        beams = Beams(torch.full((batch, 1), start, device=state.device), beam, end)
        row = torch.arange(batch, device=state.device)[:, None]
        weights: Tensor | None = None  # [B, K, T, S]
        if need_weights and self.attention is not None:
            weights = state.new_empty(batch, 1, 0, memory.vectors.shape[1])
        for _ in range(length):
            state, seen = self._step(beams.last, state, read)
            origin = beams.extend(self.head(state))
            state = state[row, origin]
            if weights is not None and seen is not None:
                weights = torch.cat((weights, seen[:, :, None]), dim=2)[row, origin]
            if beams.finished:
                break
        return Decoded(beams.tokens[:, 0], None if weights is None else weights[:, 0], beams.log_probability[:, 0])

    # ------------------------------------------------------------------------------------------------------- one step

    def _first_state(self, memory: Memory) -> Tensor:
        """``s0``, ``[B, 1, hidden]``."""
        return self.first_state(memory.summary).tanh()[:, None]

    def _reader(self, memory: Memory, need_weights: bool) -> _Reader:
        """What a state sees of ``memory``. Whatever does not depend on the state is computed here, once."""
        attention = self.attention
        if attention is None:
            return lambda state: (memory.summary[:, None].expand(-1, state.shape[1], -1), None)
        projected = attention.project_key(memory.vectors)
        return lambda state: attention(
            state,
            memory.vectors,
            projected_key=projected,
            key_padding_mask=memory.padding,
            need_weights=need_weights,
        )

    def _step(self, token: Tensor, state: Tensor, read: _Reader) -> tuple[Tensor, Tensor | None]:
        """From ``token`` ``[B, K]`` and ``state`` ``[B, K, hidden]`` to the next state, and the weights on the way."""
        context, weights = read(state)
        entered = torch.cat((self.embedding(token), context), dim=-1)
        return self.cell(entered.flatten(0, 1), state.flatten(0, 1)).view_as(state), weights
