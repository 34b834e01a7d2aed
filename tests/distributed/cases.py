"""Calls on shards beside the same call in one process: what each rank runs, and how far apart the two are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fastattn
from fastattn import distributed
from fastattn.ops.attention import dropout

BATCH, HEAD_DIM = 2, 16
METHODS = ("allgather", "ring", "ulysses", "2d")
BALANCES = ("none", "zigzag", "stripe")
attend_on_shards: Any = distributed.context_parallel_attention  # of lists and dictionaries of arguments
# float32 beside float32: sums in another order
MOST = 2e-6


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the whole sequence."""

    world: int
    rows: int
    keys: int
    heads: int
    kv_heads: int

    @property
    def scores(self) -> tuple[int, int, int, int]:
        return BATCH, self.heads, self.rows, self.keys


Group = dist.ProcessGroup | dist.DeviceMesh  # of all processes
Words = Callable[[Sizes], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A call; ``words`` makes its arguments, of the whole sequence, those that need gradients among them."""

    words: Words
    rows: int = 12  # on each rank
    keys: int = 12
    shared: int = 1  # query heads to a key head; 0: there is one key head
    value_dim: int = HEAD_DIM
    seeds: bool = False  # dropout by a seed and not by weights that are drawn whole
    poisoned: bool = False  # padding holds NaN and inf


def _documents(length: int, of: int) -> Tensor:
    """Documents of different lengths, in order in one batch entry and mixed in the other."""
    ids = torch.arange(length) // of
    return torch.stack((ids, ids.flip(0).roll(3)))


def _padding(sizes: Sizes) -> Tensor:
    lengths = torch.tensor([[sizes.keys - 5], [sizes.keys // 3]])
    return torch.arange(sizes.keys) >= lengths


def _bias(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def _slopes(sizes: Sizes) -> Tensor:
    return torch.rand(sizes.heads).add(0.05).requires_grad_()


def _learned(score, batch, head, query_index, key_index, table):
    return score * 0.7 + table[head, (query_index - key_index).abs().clamp(max=9)]


def _of_pairs(score, batch, head, query_index, key_index, table):
    return score + table[head, query_index, key_index] * (batch + 1)


def _checkered(batch, head, query_index, key_index):
    return ((query_index // 3 + key_index + head) % 4 != 1) | (query_index == key_index)


def _of_one_group(sizes: Sizes) -> Callable[..., Tensor]:
    groups = torch.arange(sizes.keys) // 5 % 2
    return lambda batch, head, query_index, key_index: groups[query_index] == groups[key_index]


def _everything(sizes: Sizes) -> dict[str, Any]:
    return {
        "is_causal": True,
        "window": (sizes.keys // 2, None),
        "prefix": torch.tensor([3, 0]),
        "document_ids": _documents(sizes.rows, 2 * sizes.rows // 3),
        "key_padding_mask": _padding(sizes),
        "alibi_slopes": _slopes(sizes),
        "softcap": 5.0,
        "sinks": torch.randn(sizes.heads, requires_grad=True),
        "attn_mask": _bias(*sizes.scores),
        "return_lse": True,
    }


CASES: dict[str, Case] = {
    "plain": Case(lambda s: {}),
    "causal": Case(lambda s: {"is_causal": True}),
    "causal-lse": Case(lambda s: {"is_causal": True, "return_lse": True}),
    "fewer-rows-bottom-right": Case(lambda s: {"is_causal": True, "causal_alignment": "bottom_right"}, rows=6),
    "more-rows-bottom-right": Case(lambda s: {"is_causal": True, "causal_alignment": "bottom_right"}, keys=6),
    "window": Case(lambda s: {"window": (5, 2)}),
    "narrow-window": Case(lambda s: {"window": (0, 0), "return_lse": True}),
    "causal-window-scale": Case(lambda s: {"is_causal": True, "window": (7, 0), "scale": -0.3}),
    "prefix": Case(lambda s: {"is_causal": True, "prefix": s.keys // 2 + 1}),
    "prefix-of-entries": Case(lambda s: {"window": (2, 0), "prefix": torch.tensor([0, 9])}),
    "documents": Case(lambda s: {"document_ids": _documents(s.rows, 7)}),
    "documents-causal": Case(lambda s: {"is_causal": True, "document_ids": _documents(s.rows, s.rows // 2)}),
    "documents-pair": Case(lambda s: {"document_ids": (_documents(s.rows, 4), _documents(s.keys, 8))}, rows=6),
    "padding": Case(lambda s: {"key_padding_mask": _padding(s), "return_lse": True}),
    "poisoned-padding": Case(lambda s: {"key_padding_mask": _padding(s), "is_causal": True}, poisoned=True),
    "documents-of-all-entries": Case(lambda s: {"document_ids": _documents(s.rows, 5)[:1], "window": (9, None)}),
    "alibi": Case(lambda s: {"alibi_slopes": _slopes(s)}),
    "alibi-causal": Case(lambda s: {"is_causal": True, "alibi_slopes": _slopes(s).detach()}),
    "softcap": Case(lambda s: {"softcap": 2.0, "is_causal": True}),
    "sinks": Case(lambda s: {"sinks": torch.randn(s.heads, requires_grad=True), "is_causal": True, "return_lse": True}),
    "mask": Case(lambda s: {"attn_mask": torch.rand(s.scores) > 0.4}),
    "mask-for-all-heads": Case(lambda s: {"attn_mask": torch.rand(1, 1, s.rows, s.keys) > 0.4}),
    "mask-of-keys": Case(lambda s: {"attn_mask": torch.rand(BATCH, 1, 1, s.keys) > 0.4}),
    "bias": Case(lambda s: {"attn_mask": _bias(*s.scores), "is_causal": True}),
    "bias-for-all-heads": Case(lambda s: {"attn_mask": _bias(1, 1, s.rows, s.keys)}),
    "bias-of-keys": Case(lambda s: {"attn_mask": _bias(s.heads, 1, s.keys)}),
    "bias-of-rows": Case(lambda s: {"attn_mask": _bias(1, s.heads, s.rows, 1)}),
    "mask-by-columns": Case(lambda s: {"attn_mask": torch.rand(s.scores) > 0.4, "attn_mask_by": "columns"}, keys=8),
    "mask-of-keys-by-columns": Case(
        lambda s: {"attn_mask": torch.rand(BATCH, 1, 1, s.keys) > 0.4, "attn_mask_by": "columns"}
    ),
    "bias-by-columns": Case(
        lambda s: {"attn_mask": _bias(*s.scores), "attn_mask_by": "columns", "is_causal": True}, rows=8
    ),
    "bias-for-all-heads-by-columns": Case(
        lambda s: {"attn_mask": _bias(1, 1, s.rows, s.keys), "attn_mask_by": "columns"}
    ),
    "bias-of-keys-by-columns": Case(lambda s: {"attn_mask": _bias(s.heads, 1, s.keys), "attn_mask_by": "columns"}),
    "bias-of-rows-by-columns": Case(lambda s: {"attn_mask": _bias(1, s.heads, s.rows, 1), "attn_mask_by": "columns"}),
    "grouped": Case(lambda s: {"is_causal": True}, shared=2),
    "one-key-head": Case(lambda s: {"window": (9, 9)}, shared=0),
    "narrow-values": Case(lambda s: {"is_causal": True}, value_dim=8),
    "dropout": Case(lambda s: {"dropout_p": 0.3, "is_causal": True}),
    "dropout-by-seed": Case(lambda s: {"dropout_p": 0.3, "window": (9, 9), "return_lse": True}, seeds=True),
    "mask-mod": Case(lambda s: {"mask_mod": _checkered, "is_causal": True, "return_lse": True}),
    "score-mod": Case(lambda s: {"score_mod": _learned, "captured": _bias(s.heads, 10), "window": (9, None)}),
    "both-mods": Case(
        lambda s: {"score_mod": _of_pairs, "captured": _bias(*s.scores[1:]), "mask_mod": _of_one_group(s)}, shared=2
    ),
    "everything": Case(_everything, shared=2),
}


def calls(world: int) -> Iterator[tuple[str, str, str]]:
    """``(case, method, balance)`` of everything that there is, on eight ranks. Fewer than four share it out with four:
    they have each case with one of the balances of a method, in turn, and four ranks have the others."""
    for number, method in enumerate(METHODS):
        if method == "2d" and world % 2:
            continue
        of_ring = {"2d": world // 2, "ulysses": 1}.get(method, world)
        for balance_number, balance in enumerate(BALANCES):
            for case_number, name in enumerate(CASES):
                slopes = name in ("alibi", "alibi-causal", "everything")
                if slopes and balance == "stripe" and of_ring > 1:
                    continue  # refused
                is_turn = (number + case_number) % len(BALANCES) == balance_number
                if world <= 4 and is_turn == (world == 4):
                    continue
                yield name, method, balance


def sharded(words: dict[str, Any], group: Group, balance: Any) -> dict[str, Any]:
    """A rank's arguments, of those of the whole sequence."""
    own = dict(words)
    for name, dim in (("key_padding_mask", 1), ("document_ids", 1), ("attn_mask", _dim_of_mask(words))):
        given = words.get(name)
        if isinstance(given, tuple):
            own[name] = tuple(distributed.shard(t, dim, group, balance=balance) for t in given)
        elif given is not None and given.shape[dim] != 1:
            own[name] = distributed.shard(given, dim, group, balance=balance)
    return own


def _as_words(words: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, in which a function and what it captures are one."""
    words = dict(words)
    if "captured" in words:
        words["score_mod"] = (words["score_mod"], words.pop("captured"))
    return words


def _dim_of_mask(words: dict[str, Any]) -> int:
    return -1 if words.get("attn_mask_by") == "columns" else -2


@dataclasses.dataclass
class Outcome:
    """What a call has given, and the gradients of a loss of it."""

    results: list[Tensor]
    gradients: dict[str, Tensor]


def _run(attend: Callable[[], Any], weights: list[Tensor], leaves: dict[str, Tensor]) -> Outcome:
    torch.manual_seed(11)  # of the dropout
    found = attend()
    results = list(found) if isinstance(found, tuple) else [found]
    # a row that sees nothing has an LSE of -inf
    loss: Any = sum((r.masked_fill(r == float("-inf"), 0) * w).sum() for r, w in zip(results, weights))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return Outcome([r.detach() for r in results], dict(zip(leaves, gradients)))


def both(
    name: str, method: Any, balance: Any, group: Group, backend: str = "torch", attend: Any = attend_on_shards
) -> tuple[Outcome, Outcome]:
    """``(ours, expected)`` of this rank, for a case, ours by a backend; gradients of what all ranks have alike are
    added up."""
    case, world = CASES[name], dist.get_world_size()
    heads = max(4, world)
    kv_heads = heads // case.shared if case.shared else 1
    sizes = Sizes(world, case.rows * world, case.keys * world, heads, kv_heads)
    torch.manual_seed(sum(map(ord, name)))
    query = torch.randn(BATCH, heads, sizes.rows, HEAD_DIM, requires_grad=True)
    key = torch.randn(BATCH, kv_heads, sizes.keys, HEAD_DIM, requires_grad=True)
    value = torch.randn(BATCH, kv_heads, sizes.keys, case.value_dim, requires_grad=True)
    words = case.words(sizes)
    if case.poisoned:
        hidden = words["key_padding_mask"][:, None, :, None]
        key.data.masked_fill_(hidden, math.nan), value.data.masked_fill_(hidden, math.inf)
    weights = [torch.randn(BATCH, heads, sizes.rows, case.value_dim), torch.randn(BATCH, heads, sizes.rows)]
    extra = {k: v for k, v in words.items() if isinstance(v, Tensor) and v.requires_grad}

    leaves = {"query": query, "key": key, "value": value, **extra}
    most = dropout.MOST_DRAWN_WHOLE
    dropout.MOST_DRAWN_WHOLE = 0 if case.seeds else most
    try:
        of_whole = {n: word for n, word in _as_words(words).items() if n != "attn_mask_by"}
        whole = _run(lambda: fastattn.attention(query, key, value, **of_whole, backend="torch"), weights, leaves)
        own_leaves = {
            n: distributed.shard(t.detach(), 2, group, balance=balance).clone().requires_grad_()
            for n, t in (("query", query), ("key", key), ("value", value))
        }
        own_words = sharded(words, group, balance)
        for n in extra:
            own_words[n] = own_leaves[n] = own_words[n].detach().clone().requires_grad_()
        ours = _run(
            lambda: attend(
                *(own_leaves[n] for n in ("query", "key", "value")), group, method=method, balance=balance,
                **_as_words(own_words), backend=backend,
            ),
            [distributed.shard(w, 2, group, balance=balance) for w in weights],
            own_leaves,
        )  # fmt: skip
    finally:
        dropout.MOST_DRAWN_WHOLE = most
    results = [distributed.shard(r, 2, group, balance=balance) for r in whole.results]
    expected = Outcome(results, {})
    for n, gradient in whole.gradients.items():
        if n in ("query", "key", "value"):
            expected.gradients[n] = distributed.shard(gradient, 2, group, balance=balance)
        elif n == "attn_mask" and words[n].shape[_dim_of_mask(words)] != 1:
            expected.gradients[n] = distributed.shard(gradient, _dim_of_mask(words), group, balance=balance)
        else:
            expected.gradients[n] = gradient
            dist.all_reduce(ours.gradients[n])
    return ours, expected


def distance(ours: Outcome, expected: Outcome) -> tuple[float, str]:
    """The largest difference of anything, beside the largest number or 1, and of what it is."""
    pairs = {
        **{f"result {i}": pair for i, pair in enumerate(zip(ours.results, expected.results))},
        **{f"gradient of {n}": (g, expected.gradients[n]) for n, g in ours.gradients.items()},
    }
    found = []
    for what, (a, b) in pairs.items():
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf"), f"{what}: {a.dtype}{tuple(a.shape)} beside {b.dtype}{tuple(b.shape)}"
        same = a == b
        difference = (a - b).abs().masked_fill(same, 0)
        largest = b.masked_fill(b.isinf(), 0).abs().max().clamp(min=1)
        if what == "gradient of attn_mask" and b.shape[-1] == 1:
            # One number for all keys of a row changes nothing: its gradient is 0, and what is computed is the rounding
            # of terms that cancel, which are products of rows of an output's gradient and of values.
            largest = HEAD_DIM
        found.append(((difference.max() / largest).item(), what))
    return max(found)


def is_same(one: Outcome, other: Outcome) -> bool:
    """Are two outcomes equal bit by bit?"""
    return all(map(torch.equal, one.results, other.results)) and all(
        torch.equal(g, other.gradients[n]) for n, g in one.gradients.items()
    )
