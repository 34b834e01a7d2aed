"""Peak memory of attention on the torch backend at one length and at twice that length, by feature, as JSON.

Run in a process of its own (``python -m tests.ops.memory_growth``): what other tests leave in the allocator would hide
what a call takes.
"""

import json
import sys
from typing import Any

import torch

import fastattn
from benchmarks.measure.memory import peak_mib
from fastattn.ops.attention import cutting, dropout, sdpa
from fastattn.ops.attention.functions import as_words

B, H, D = 1, 2, 8
LENGTH = 1024
TABLE = torch.linspace(0, 1, 4 * LENGTH, requires_grad=True).expand(H, 4 * LENGTH)  # what functions on scores read


def draw(*shape, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), **options)


def _added(score, batch, head, query_index, key_index, table):
    return score + table[head, query_index - key_index]


def _bent(score, *places):
    return torch.tanh(_added(score, *places))


def inputs(name, length):
    """Query, key, value and what else the call of this name is given."""
    query, key, value = (draw(B, H, length, D) for _ in range(3))
    padding = (torch.arange(length) >= length - length // 8).expand(B, length)
    more: dict[str, Any] = {
        "plain": {},
        "causal": {"is_causal": True},
        "bottom_right": {"is_causal": True, "causal_alignment": "bottom_right"},
        "more_keys_bottom_right": {"is_causal": True, "causal_alignment": "bottom_right"},
        "more_keys_top_left": {"is_causal": True},
        "padding": {"key_padding_mask": padding},
        "causal_padding": {"is_causal": True, "key_padding_mask": padding},
        "window": {"window": (100, 20)},
        "window_to_the_right": {"window": (None, 20)},
        "prefix": {"is_causal": True, "prefix": 100},
        "documents": {"document_ids": (torch.arange(length) // 300).expand(B, length)},
        "alibi": {"alibi_slopes": torch.linspace(0.1, 0.4, H)},
        "softcap": {"softcap": 20.0},
        "sinks": {"sinks": torch.zeros(H)},
        "dropout": {"dropout_p": 0.1},
        "causal_dropout": {"is_causal": True, "dropout_p": 0.1},
        "dropout_padding": {"dropout_p": 0.1, "key_padding_mask": padding},
        "lse": {"return_lse": True},
        "mask": {"attn_mask": draw(length, length) < 0},
        "mask_of_heads": {"attn_mask": draw(1, H, length, length) < 0},
        "mask_of_rows": {"attn_mask": draw(length, 1) < 0},
        "mask_of_keys_causal": {"attn_mask": draw(1, length) < 1, "is_causal": True},
        "bias": {"attn_mask": draw(length, length)},
        "bias_of_heads_causal": {"attn_mask": draw(1, H, length, length), "is_causal": True},
        "bias_padding": {"attn_mask": draw(length, length), "key_padding_mask": padding},
        "bias_of_keys": {"attn_mask": draw(length)},
        "bias_of_keys_causal": {"attn_mask": draw(length), "is_causal": True},
        "bias_with_gradient": {"attn_mask": draw(length)},
        "bias_in_float64": {"attn_mask": draw(length).double()},
        "bias_of_minus_1e9": {"attn_mask": torch.full((length,), -1e9)},
        "no_scale": {"scale": 0.0, "is_causal": True},
        "grouped_heads_padding": {"key_padding_mask": padding},
        "feature_map": {},
        "bfloat16_causal_padding": {"is_causal": True, "key_padding_mask": padding},
        "float16": {},
        "wider_value": {"key_padding_mask": padding},
        "score_mod": {"score_mod": (_bent, TABLE[:, : 2 * length])},
        "score_mod_that_adds": {"score_mod": (_added, TABLE[:, : 2 * length])},
        "mask_mod": {"mask_mod": lambda b, h, i, j: (i - j) % 7 < 3},
    }
    if name.startswith("more_keys"):
        query = query[:, :, length // 2 :]
    if name.startswith("grouped"):
        key, value = key[:, :1], value[:, :1]
    if name == "feature_map":
        query, key, value = (t.mT.contiguous().mT for t in (query, key, value))
    if name.startswith(("bfloat16", "float16")):
        query, key, value = (t.to(getattr(torch, name.split("_")[0])) for t in (query, key, value))
    if name == "wider_value":
        value = draw(B, H, length, D + 8)
    return [query, key, value], more.get(name, more)


NAMES = list(inputs("", 8)[1])


def peak(name, length, training):
    tensors, more = inputs(name, length)
    leaves = [t.requires_grad_(training) for t in tensors]
    if name == "bias_with_gradient":
        more["attn_mask"].requires_grad_(training)

    def step():
        with torch.set_grad_enabled(training):
            results: Any = fastattn.attention(*leaves, **more, backend="torch")
            results = results if isinstance(results, tuple) else (results,)
            if training:
                torch.autograd.backward(results, [torch.ones_like(t) for t in results])
        return results

    return peak_mib(step, "cpu")  # of two steps: what is made once in a process is there in the second


def main():
    torch.set_num_threads(1)
    # A quarter of what a call may hold whole, so that calls of half the length, which take a quarter of the time, are
    # as far beyond it.
    cutting.BLOCK_ELEMENTS //= 4
    sdpa.MOST_MERGED //= 4
    dropout.MOST_DRAWN_WHOLE //= 4
    as_words.MOST //= 4
    as_words.MOST_TO_EVALUATE //= 4
    found = {
        f"{name}-{mode}": [peak(name, length, mode == "training") for length in (LENGTH, 2 * LENGTH)]
        for name in NAMES
        for mode in ("training", "evaluation")
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
