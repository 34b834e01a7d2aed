"""Caches of keys and values: tokens as without one, in less time; and a beam search whose beginnings share their pages.

A decoder of 20 lines, with more heads of queries than of keys (arXiv:2305.13245), says one token after the other.
Without a cache each token costs a pass over all before it; with ``fastattn.KVCache`` one over itself alone.
``fastattn.PagedKVCache`` keeps the same in pages (arXiv:2309.06180): ``fork`` lets beginnings go on from the same past
without copying it. Expect the same logits but for rounding, the same tokens and beams from both caches, and a
prompt that four beams hold once. The weights are random, so that the tokens mean nothing.

    python examples/generation.py                         # some seconds
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastattn

VOCABULARY, HEADS, KV_HEADS, HEAD_DIM, PAGE = 64, 4, 2, 16, 16
Cache = fastattn.KVCache | fastattn.PagedKVCache


class Decoder(nn.Module):
    """Tokens ``[B, L]`` to logits ``[B, L, VOCABULARY]``; causal, pre-norm, without an MLP."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.norms = nn.ModuleList(fastattn.AddRMSNorm(width) for _ in range(layers))
        self.projections = nn.ModuleList(nn.Linear(width, width + 2 * KV_HEADS * HEAD_DIM) for _ in range(layers))
        self.outputs = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.slopes = 2.0 ** -torch.arange(1.0, HEADS + 1)  # ALiBi tells it where tokens stand (arXiv:2108.12409)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Of all tokens, or, with a cache, of those that come behind what it holds."""
        x = self.tokens(tokens)
        if cache is not None:
            cache.reserve(tokens.shape[1])
        for layer, (norm, project, output) in enumerate(zip(self.norms, self.projections, self.outputs)):
            heads = project(norm(x)).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            query, key, value = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
            attended: Any
            if cache is None:
                attended = fastattn.attention(query, key, value, is_causal=True, alibi_slopes=self.slopes)
            else:
                attended = cache.attend(layer, query, key, value, is_causal=True, alibi_slopes=self.slopes)
            x = x + output(attended.transpose(1, 2).flatten(2))
        if cache is not None:
            cache.advance(tokens.shape[1])
        return x @ self.tokens.weight.T


def greedy(model: Decoder, prompt: Tensor, count: int, cache: Cache | None) -> tuple[Tensor, Tensor]:
    """The likeliest tokens behind ``prompt`` ``[B, P]``, all of them ``[B, P + count]``, and the last logits."""
    tokens, new, logits = prompt, prompt, prompt
    for _ in range(count):
        logits = model(tokens if cache is None else new, cache)[:, -1]
        new = logits.argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, new), dim=1)
    return tokens, logits


def beam_search(model: Decoder, prompt: Tensor, count: int, beams: int, cache: Cache) -> Tensor:
    """The likeliest ``[beams, P + count]`` that a beam search finds behind ``prompt`` ``[1, P]``."""
    tokens, scores = prompt.expand(beams, -1), torch.full((beams,), -torch.inf)
    scores[0] = 0.0  # all beginnings are the same yet: only one may be gone on with
    logits = model(prompt.expand(beams, -1), cache)[:, -1]
    for i in range(count):
        totals = scores[:, None] + logits.log_softmax(-1)
        scores, best = totals.flatten().topk(beams)
        parents, new = best // VOCABULARY, best % VOCABULARY
        tokens = torch.cat((tokens[parents], new[:, None]), dim=1)
        if i + 1 < count:
            cache.fork(parents)  # beginning i goes on from what beginning parents[i] holds
            logits = model(new[:, None], cache)[:, -1]
    return tokens


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Generate in all ways and compare; returns differences and pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    layers, beams, given, count = 4, 4, (4 * PAGE, 12 * PAGE)[not options.quick], 24 if options.quick else 128
    model, longest = Decoder(layers).eval(), given + count
    pages = -(-longest // PAGE)
    prompt = torch.randint(VOCABULARY, (2, given))

    def new_cache(paged: bool, batch: int) -> Cache:
        if paged:
            return fastattn.PagedKVCache(layers, batch, KV_HEADS, batch * pages, HEAD_DIM, page_size=PAGE)
        return fastattn.KVCache(layers, batch, KV_HEADS, longest, HEAD_DIM)

    found = {}
    for name, cache in (("none", None), ("KVCache", new_cache(False, 2)), ("PagedKVCache", new_cache(True, 2))):
        began = time.perf_counter()
        found[name] = greedy(model, prompt, count, cache)
        print(f"{count} tokens behind {given}, cache {name}: {1e3 * (time.perf_counter() - began):.0f} ms")
    (tokens, logits), *others = found.values()
    differences = [(logits - other).abs().max().item() / logits.abs().max().item() for _, other in others]
    same = all(torch.equal(tokens, other) for other, _ in others)
    print(f"tokens are {'the same' if same else 'not the same'}; logits differ by {max(differences):.1e}")

    contiguous, paged = new_cache(False, beams), new_cache(True, beams)
    assert isinstance(paged, fastattn.PagedKVCache)
    one, other = (beam_search(model, prompt[:1], count, beams, cache) for cache in (contiguous, paged))
    print(f"{beams} beams: {'the same' if torch.equal(one, other) else 'not the same'} from both caches")
    alone = beams * -(-(longest - 1) // PAGE)
    print(f"pages of {PAGE} tokens held by {beams} beams: {paged.pages_held}; without sharing: {alone}")
    return {
        "same tokens": float(same),
        "difference": max(differences),
        "same beams": float(torch.equal(one, other)),
        "pages": paged.pages_held,
        "pages without sharing": alone,
    }


if __name__ == "__main__":
    main()
