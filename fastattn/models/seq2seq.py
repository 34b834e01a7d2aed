"""One sequence into another by two recurrent networks, with attention between them and without."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn.models._checks import check_number, check_padding, check_targets, check_tokens, evaluating
from fastattn.models.attention_decoder import AttentionDecoder, Decoded, Memory


class Seq2Seq(nn.Module):
    """An encoder reads a sequence, a decoder says another (arXiv:1406.1078; with attention arXiv:1409.0473).

    The encoder's last state makes the decoder's first one. Without attention it is also the one context vector of every
    step, and has to hold the whole sequence, however long. With attention each step gets a context of its own: the
    weighted sum of the encoder's states, weighted by what the decoder's last state asks for. Nobody tells it where to
    look; the weights are learned with everything else.

    Args:
        source_vocabulary: number of tokens of the source.
        target_vocabulary: number of tokens of the target.
        hidden: size of the states of both.
        embedding: size of the vector that stands for a token.
        attention_dim: size of the layer that scores the encoder's states; None: no attention.
    """

    def __init__(
        self,
        source_vocabulary: int,
        target_vocabulary: int,
        *,
        hidden: int = 64,
        embedding: int = 32,
        attention_dim: int | None = 64,
    ) -> None:
        super().__init__()
        for name, size in (("source_vocabulary", source_vocabulary), ("target_vocabulary", target_vocabulary)):
            check_number(name, size)
        self.embedding = nn.Embedding(source_vocabulary, embedding)
        self.encoder = nn.GRU(embedding, hidden, batch_first=True)
        self.decoder = AttentionDecoder(
            target_vocabulary, hidden, hidden=hidden, embedding=embedding, attention_dim=attention_dim
        )

    def encode(self, source: Tensor, source_padding: Tensor | None = None) -> Memory:
        """The encoder's states, and the last of them.

        Args:
            source: integers ``[B, S]``.
            source_padding: boolean ``[B, S]``, True = padding, which stands behind the tokens.

        Returns:
            Vectors ``[B, S, hidden]`` and the summary ``[B, hidden]``.

        Raises:
            TypeError: ``source`` is not of integers, or ``source_padding`` is not boolean.
            ValueError: their shapes do not fit, or a sequence has no token, or padding before one.
        """
        check_tokens("source", source, least=1)
        check_padding("source_padding", source_padding, source.shape)
        states, last = self.encoder(self.embedding(source))
        if source_padding is None:
            return Memory(states, last[0])
        if bool(source_padding[:, 0].any()):
            raise ValueError("source_padding: a sequence begins with padding: expected at least one token before it")
        if bool((source_padding[:, :-1] & ~source_padding[:, 1:]).any()):
            raise ValueError("source_padding: a token stands behind padding: expected padding at the end alone")
        lengths = (~source_padding).sum(dim=1)
        return Memory(states, states[torch.arange(len(states), device=states.device), lengths - 1], source_padding)

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        source_padding: Tensor | None = None,
        *,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Teacher forcing: what would be said behind each of the target's tokens, had all before it been said.

        Args:
            source: integers ``[B, S]``.
            target: integers ``[B, T]``, from the start token on.
            source_padding: boolean ``[B, S]``, True = padding, which stands behind the tokens.
            need_weights: also return the weights of the attention.

        Returns:
            Logits ``[B, T, target_vocabulary]``, and the weights ``[B, T, S]`` or None.

        Raises:
            TypeError, ValueError: as for :meth:`encode`.
        """
        return self.decoder(target, self.encode(source, source_padding), need_weights=need_weights)

    def loss(
        self,
        source: Tensor,
        target: Tensor,
        source_padding: Tensor | None = None,
        target_padding: Tensor | None = None,
    ) -> Tensor:
        """Mean cross entropy, in nats, of each of the target's tokens behind its first that is no padding."""
        check_targets("target", target, target_padding)
        return self.decoder.loss(target, self.encode(source, source_padding), target_padding)

    @torch.no_grad()
    def generate(
        self,
        source: Tensor,
        length: int,
        *,
        start: int,
        source_padding: Tensor | None = None,
        end: int | None = None,
        beam: int = 1,
        need_weights: bool = False,
    ) -> Decoded:
        """The translation of ``source`` ``[B, S]``; the rest as for :meth:`AttentionDecoder.generate`."""
        with evaluating(self):
            memory = self.encode(source, source_padding)
            return self.decoder.generate(memory, length, start=start, end=end, beam=beam, need_weights=need_weights)
