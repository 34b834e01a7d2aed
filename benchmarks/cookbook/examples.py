"""The examples by name: what each is for, inputs for it, and the same without a function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cookbook import masks, scores
from benchmarks.cookbook.words import (
    bucket_bias,
    draft_mask,
    image_bias,
    noise_bias,
    window_mask,
    with_globals,
)

Inputs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What inputs are made for.

    Attributes:
        batch: sequences.
        heads: of each.
        queries: of a sequence.
        keys: of a sequence.
        draw: standard normal numbers of these sizes, in the dtype and on the device of the call. Learned tensors are
            drawn so, or made of numbers that every dtype has: the same ones have to come out in float64.
        device: of the call.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    draw: Callable[..., Tensor]
    device: str = "cpu"

    def integers(self, low: int, high: int, *sizes: int) -> Tensor:
        """Random ones from ``low`` to ``high - 1``, the same in every call and on every device."""
        generator = torch.Generator().manual_seed(self.keys)
        return torch.randint(low, high, sizes, generator=generator, dtype=torch.int32).to(self.device)


@dataclasses.dataclass(frozen=True)
class Example:
    """One function of the cookbook.

    Attributes:
        factory: makes it of what it captures.
        title: of its section.
        inputs: what it captures, by the factory's names. Floating tensors are what is learned.
        otherwise: what says the same, in a sentence.
        words: the same as arguments of ``fastattn.attention``, from query, key and what is captured.
        call: the code of its call, behind that of its factory.
        drafts: whether its queries are a few tokens behind a context of many keys.
    """

    factory: Callable[..., Callable[..., Tensor]]
    title: str
    otherwise: str
    inputs: Callable[[Setting], Inputs]
    words: Callable[..., Inputs]
    call: str
    drafts: bool = False

    @property
    def name(self) -> str:
        return self.factory.__name__

    def arguments(self, inputs: Inputs) -> Inputs:
        """As in ``{"mask_mod": function}``, for ``fastattn.attention``."""
        function = self.factory(**inputs)
        return {function.__name__: function}


def learned(inputs: Inputs) -> list[str]:
    """The names of what has a gradient."""
    return [name for name, t in inputs.items() if isinstance(t, Tensor) and t.is_floating_point()]


# ---------------------------------------------------------------------------------------------------------- the inputs


def _globals(setting: Setting) -> Inputs:
    """The first token, and one more at another place in each sequence."""
    is_global = torch.zeros(setting.batch, setting.keys, dtype=torch.bool, device=setting.device)
    is_global[:, 0] = True
    for entry in range(setting.batch):
        is_global[entry, (entry + 1) * setting.keys // (setting.batch + 1)] = True
    return {"window": setting.keys // 8, "is_global": is_global}


def _documents(setting: Setting) -> Inputs:
    """Of unequal lengths, about eight to a sequence."""
    ends = setting.integers(0, setting.keys, setting.batch, setting.keys) < 8
    return {"document_ids": ends.cumsum(1).int()}


def _tree(setting: Setting) -> Inputs:
    """Now and then a branch ends, and the next one begins at a node before it."""
    steps = setting.integers(0, 8, setting.batch, setting.keys).tolist()
    subtree_ends = torch.full((setting.batch, setting.keys), setting.keys, dtype=torch.int32)
    for entry, row in enumerate(steps):
        path: list[int] = []
        for node, step in enumerate(row):
            for _ in range(step if step > 5 else 0):
                if len(path) > 1:
                    subtree_ends[entry, path.pop()] = node
            path.append(node)
    return {"subtree_ends": subtree_ends.to(setting.device)}


def _drafts(setting: Setting) -> Inputs:
    """Trees of two or three branches at each draft, behind contexts of unequal lengths."""
    number = torch.arange(setting.queries, device=setting.device)
    parents = [(number - 1).clamp(min=0) // (2 + entry % 2) for entry in range(setting.batch)]
    longest = setting.keys - setting.queries
    return {
        "parents": torch.stack(parents).int(),
        "context_lengths": longest - setting.integers(0, longest // 4 + 1, setting.batch),
        "depth": setting.queries.bit_length(),
    }


def _image(setting: Setting) -> Inputs:
    """As square as the number of tokens allows."""
    height = next(n for n in range(int(setting.keys**0.5), 0, -1) if setting.keys % n == 0)
    return {"table": setting.draw(setting.heads, 2 * height - 1, 2 * (setting.keys // height) - 1)}


def _slopes(setting: Setting) -> Inputs:
    """Powers of two, which every dtype has."""
    slopes = 2.0 ** -(1.0 + torch.arange(setting.heads, device=setting.device) % 8)
    return {"slopes": slopes.to(setting.draw(0).dtype)}


# ------------------------------------------------------------------------------------------------------------ registry

EXAMPLES: tuple[Example, ...] = (
    Example(
        masks.prefix_lm,
        "Prefix and causal rest",
        "The arguments `is_causal` and `prefix` do the same.",
        lambda s: {"prefix_lengths": s.integers(0, s.keys, s.batch)},
        lambda query, key, prefix_lengths: {"is_causal": True, "prefix": prefix_lengths},
        """
prefix_lengths = torch.tensor([20, 50])
output = fastattn.attention(query, key, value, mask_mod=prefix_lm(prefix_lengths))

same = fastattn.attention(query, key, value, is_causal=True, prefix=prefix_lengths)
torch.testing.assert_close(output, same)
""",
    ),
    Example(
        masks.window_with_globals,
        "Sliding window with global tokens",
        "Without a function it needs a boolean mask `[B, 1, L, L]`.",
        _globals,
        with_globals,
        """
is_global = torch.zeros(2, 64, dtype=torch.bool)
is_global[:, 0] = True
output = fastattn.attention(query, key, value, mask_mod=window_with_globals(8, is_global))
""",
    ),
    Example(
        masks.dilated_window,
        "Dilated window",
        "Without a function it needs a boolean mask `[L, L]`.",
        lambda s: {"window": max(1, s.keys // 32), "dilation": 4},
        window_mask,
        """
output = fastattn.attention(query, key, value, mask_mod=dilated_window(window=4, dilation=3))
""",
    ),
    Example(
        masks.documents,
        "Packed documents",
        "The argument `document_ids` does the same.",
        _documents,
        lambda query, key, document_ids: {"document_ids": document_ids},
        """
document_ids = torch.arange(64).expand(2, 64) // 20
output = fastattn.attention(query, key, value, mask_mod=documents(document_ids))

same = fastattn.attention(query, key, value, document_ids=document_ids)
torch.testing.assert_close(output, same)
""",
    ),
    Example(
        masks.tree,
        "A tree of continuations",
        "Without a function it needs a boolean mask `[B, 1, L, L]`.",
        _tree,
        lambda query, key, subtree_ends: {
            "attn_mask": torch.ones(key.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()
            & (torch.arange(key.shape[2], device=key.device)[:, None] < subtree_ends[:, None, None, :])
        },
        """
# A beginning of 32 tokens, and behind it two continuations of 16.
subtree_ends = torch.tensor([64] * 32 + [48] * 16 + [64] * 16).expand(2, 64)
output = fastattn.attention(query, key, value, mask_mod=tree(subtree_ends))
""",
    ),
    Example(
        masks.speculative_decoding,
        "Speculative decoding",
        "Without a function it needs a boolean mask `[B, 1, L, S]`, made anew for each step.",
        _drafts,
        draft_mask,
        """
# Seven drafts: the first two are guesses for the next token, each of the others follows one before it.
parents = torch.tensor([0, 1, 0, 0, 1, 1, 5]).expand(2, 7)
context_lengths = torch.tensor([57, 40])
mask = speculative_decoding(parents, context_lengths, depth=2)
output = fastattn.attention(query[:, :, :7], key, value, mask_mod=mask)
""",
        drafts=True,
    ),
    Example(
        scores.t5_bias,
        "T5's bias by buckets of distances",
        "Without a function it needs a bias `[H, L, L]`, made anew in each step of training.",
        lambda s: {"table": s.draw(32, s.heads)},
        bucket_bias,
        """
table = torch.nn.Parameter(torch.randn(32, 8))
output = fastattn.attention(query, key, value, score_mod=t5_bias(table))
output.square().sum().backward()
assert table.grad is not None
""",
    ),
    Example(
        scores.pair_bias,
        "AlphaFold's pair bias",
        "`attn_mask` does the same with a bias that exists already, and returns its gradient.",
        lambda s: {"bias": s.draw(s.heads, s.queries, s.keys)},
        lambda query, key, bias: {"attn_mask": bias},
        """
pairs, to_heads = torch.randn(64, 64, 16), torch.nn.Linear(16, 8, bias=False)
bias = to_heads(pairs).permute(2, 0, 1)
output = fastattn.attention(query, key, value, score_mod=pair_bias(bias))
output.square().sum().backward()
assert to_heads.weight.grad is not None

same = fastattn.attention(query, key, value, attn_mask=bias)
torch.testing.assert_close(output, same)
""",
    ),
    Example(
        scores.alibi,
        "ALiBi by hand",
        "The argument `alibi_slopes` does the same.",
        _slopes,
        lambda query, key, slopes: {"alibi_slopes": slopes},
        """
slopes = torch.nn.Parameter(2.0 ** -torch.arange(1.0, 9.0))
output = fastattn.attention(query, key, value, score_mod=alibi(slopes), is_causal=True)
output.square().sum().backward()
assert slopes.grad is not None

same = fastattn.attention(query, key, value, alibi_slopes=slopes, is_causal=True)
torch.testing.assert_close(output, same)
""",
    ),
    Example(
        scores.swin_bias,
        "Swin's bias by rows and columns",
        "Without a function it needs a bias `[H, L, L]`, made anew in each step of training.",
        _image,
        image_bias,
        """
table = torch.nn.Parameter(torch.randn(8, 2 * 4 - 1, 2 * 16 - 1))  # images of 4 x 16 pixels
output = fastattn.attention(query, key, value, score_mod=swin_bias(table))
output.square().sum().backward()
assert table.grad is not None
""",
    ),
    Example(
        scores.softcap,
        "Softcap by hand",
        "The argument `softcap` does the same.",
        lambda s: {"cap": 2.0},
        lambda query, key, cap: {"softcap": cap},
        """
output = fastattn.attention(query, key, value, score_mod=softcap(30.0))

same = fastattn.attention(query, key, value, softcap=30.0)
torch.testing.assert_close(output, same)
""",
    ),
    Example(
        scores.head_scale,
        "A scale for each head",
        "Queries that are multiplied before the call give the same scores.",
        lambda s: {"overall": s.draw().abs(), "per_head": s.draw(s.heads).abs()},
        lambda query, key, overall, per_head: {"query": query * (overall * per_head)[:, None, None]},
        """
overall, per_head = torch.nn.Parameter(torch.tensor(1.0)), torch.nn.Parameter(torch.ones(8))
output = fastattn.attention(query, key, value, score_mod=head_scale(overall, per_head))
output.square().sum().backward()
assert overall.grad is not None and per_head.grad is not None

same = fastattn.attention(query * (overall * per_head)[:, None, None], key, value)
torch.testing.assert_close(output, same)
""",
    ),
    Example(
        scores.logit_noise,
        "Noise on the scores",
        "Without a function it needs a bias `[B, H, L, S]`, made anew in each step of training.",
        lambda s: {"scale": s.draw().abs(), "seed": s.integers(0, 2**20)},
        noise_bias,
        """
scale, seed = torch.nn.Parameter(torch.tensor(0.5)), torch.tensor(17)
output = fastattn.attention(query, key, value, score_mod=logit_noise(scale, seed))
output.square().sum().backward()
assert scale.grad is not None

other = fastattn.attention(query, key, value, score_mod=logit_noise(scale, seed + 1))
assert not torch.equal(output, other)
""",
    ),
)


def by_name(name: str) -> Example:
    """The example whose factory is called so."""
    return next(example for example in EXAMPLES if example.name == name)
