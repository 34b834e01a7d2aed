"""Beam search: the likeliest beginnings of each sequence are kept, and each is tried with every next token."""

from __future__ import annotations

import torch
from torch import Tensor


class Beams:
    """The beginnings that are kept.

    Args:
        prompt: integers ``[B, P]``: what each sequence begins with.
        width: number of beginnings to keep of each sequence, at most.
        end: the token at which a sequence ends; one that said it says nothing but the end any more, at no cost.

    Attributes:
        tokens: ``[B, K, T]``: ``K`` beginnings of each, the likeliest first; ``K`` is 1 at first.
        log_probability: ``[B, K]``: of what they said behind the prompt, in nats.
        finished: nothing that could be said makes another beginning the likeliest.
    """

    def __init__(self, prompt: Tensor, width: int, end: int | None = None) -> None:
        self.tokens = prompt[:, None]
        self.log_probability = torch.zeros(len(prompt), 1, device=prompt.device)
        self.finished = False
        self._width, self._end = width, end
        self._ended = torch.zeros(len(prompt), 1, dtype=torch.bool, device=prompt.device)

    @property
    def last(self) -> Tensor:
        """The last token of each beginning, ``[B, K]``."""
        return self.tokens[..., -1]

    def extend(self, logits: Tensor) -> Tensor:
        """Say one token more.

        Args:
            logits: ``[B, K, vocabulary]``, of the token behind each beginning.

        Returns:
            ``[B, K']``: which of the ``K`` beginnings before each of those after goes on with.
        """
        vocabulary = logits.shape[-1]
        # 16 bits would round the logarithms of a long beginning's tokens by more than beginnings differ
        logs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        if self._end is not None:
            only_end = logs.new_full((vocabulary,), -torch.inf)
            only_end[self._end] = 0.0
            logs = torch.where(self._ended[..., None], only_end, logs)
        totals = (self.log_probability[..., None] + logs).flatten(1)
        self.log_probability, best = totals.topk(min(self._width, totals.shape[1]))
        origin, new = best // vocabulary, best % vocabulary
        row = torch.arange(len(origin), device=origin.device)[:, None]
        self.tokens = torch.cat((self.tokens[row, origin], new[..., None].to(self.tokens.dtype)), dim=2)
        if self._end is not None:
            self._ended = new == self._end
            # Saying more makes no beginning likelier, so that none overtakes one that has ended.
            self.finished = bool(self._ended[:, 0].all())
        return origin
