"""A case of the attention parity tests: what it is called, its inputs, how each side computes it, and the check."""

import contextlib
import dataclasses
import functools
import math
import unittest.mock
import zlib
from typing import Any

import torch

import fastattn
from fastattn.ops.attention import flash, formula, on_torch, operator, sdpa
from fastattn.ops.attention import tiles as torch_tiles
from fastattn.ops.attention.call import make_call
from fastattn.ops.attention.operator import implementation
from fastattn.reference import attention as reference
from fastattn.reference import visibility
from fastattn.testing import (
    alibi_slopes,
    assert_within_budget,
    attention_inputs,
    attention_mask,
    attention_sinks,
    document_ids,
    key_padding_mask,
    prefix_lengths,
    random_tensor,
)
from tests import pairwise

# What it returns depends on its arguments; a test knows which it gave.
attend: Any = fastattn.attention

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What a mask is, and along which axis it broadcasts; `wide` is float32 whatever the query is; `blocks` hides whole
# tiles of 64 x 64, `ragged` blocks that do not fit tiles; `scalar` has one number a head.
MASKS = {
    "none": None,
    **{f"bool-{b}": ("bool", b) for b in ("full", "batch", "head", "query", "key", "2d", "blocks")},
    **{f"additive-{b}": ("additive", b) for b in ("full", "batch", "head", "query", "key", "2d", "ragged", "scalar")},
    "additive-wide": ("wide", "head"),
}
_BROADCAST: dict[str, Any] = {"full": "none", "2d": "batch_head", "blocks": "none", "ragged": "head", "scalar": "batch"}
_BLOCK = {"blocks": 64, "ragged": 40}
# The shortest and the longest document: about a tile each, from a token up, and shorter than any tile.
DOCUMENTS: dict[str, Any] = {"none": (), "self": (40, 100), "cross": (1, 60), "shared": (5, 30)}

# The plainest level first.
AXES: dict[str, list[Any]] = {
    "dtype": list(DTYPES),
    "batch": [1, 2],
    "causal": [False, True],
    "alignment": ["top_left", "bottom_right"],
    "window": [None, (0, 0), (5, 3), (70, 90), (40, None), (None, 25)],
    "prefix": ["none", "int", "tensor"],
    "documents": list(DOCUMENTS),
    "mask": list(MASKS),
    "padding": [False, True],
    "alibi": ["none", "head", "batch"],
    "softcap": [None, 1.5, 30.0],
    "sinks": ["none", "own", "wide"],
    "scale": [None, 0.6, -0.2, 0.0],
    "heads": [(1, 1), (2, 2), (4, 2), (3, 1)],  # of queries and of keys
    "dropout": [0.0, 0.3],
    "outputs": ["plain", "average", "heads", "lse", "average+lse"],
    "garbage": [None, "nan", "inf", "-inf", "huge"],
    "layout": ["dense", "heads_inside", "feature_map", "packed", "broadcast", "every_other"],
    "value": ["same", "smaller", "larger"],
    "seqlen_q": [1, 3, 97, 130, 200],
    "seqlen_k": [1, 3, 97, 130, 257],
    "head_dim": [1, 8, 59, 64, 80, 128, 192, 256, 320, 512],
}


@dataclasses.dataclass(frozen=True)
class Case:
    """The levels of :data:`AXES`; the defaults exercise nothing but odd lengths."""

    dtype: str = "fp32"
    batch: int = 1
    causal: bool = False
    alignment: str = "top_left"
    window: tuple[int | None, int | None] | None = None
    prefix: str = "none"
    documents: str = "none"
    mask: str = "none"
    padding: bool = False
    alibi: str = "none"
    softcap: float | None = None
    sinks: str = "none"
    scale: float | None = None
    heads: tuple[int, int] = (2, 2)
    dropout: float = 0.0
    outputs: str = "plain"
    garbage: str | None = None  # what stands where nobody may see it; None: numbers like the others
    layout: str = "dense"
    value: str = "same"
    seqlen_q: int = 97
    seqlen_k: int = 130
    head_dim: int = 64
    seed: int = 0  # another one draws other numbers

    @property
    def value_dim(self):
        smaller, larger = max(1, self.head_dim // 2 - 1), min(512, self.head_dim + 13)
        return {"same": self.head_dim, "smaller": smaller, "larger": larger}[self.value]

    @property
    def id(self):
        heads, kv_heads = self.heads
        parts = [f"b{self.batch}", f"h{heads}"]
        parts += [f"kv{kv_heads}"] * (heads != kv_heads)
        parts += [f"m{self.seqlen_q}", f"n{self.seqlen_k}", f"d{self.head_dim}"]
        parts += [f"dv{self.value_dim}"] * (self.value_dim != self.head_dim)
        parts += ["causal"] * self.causal + [self.alignment] * (self.alignment != "top_left")
        if self.window is not None:
            left, right = ("" if side is None else side for side in self.window)
            parts += [f"window{left}_{right}"]
        parts += [f"{name}_{level}" for name in ("prefix", "documents") if (level := getattr(self, name)) != "none"]
        parts += [self.mask] * (self.mask != "none") + ["padding"] * self.padding
        parts += [f"{name}_{level}" for name in ("alibi", "sinks") if (level := getattr(self, name)) != "none"]
        parts += [f"{name}{level:g}" for name in ("softcap", "scale") if (level := getattr(self, name)) is not None]
        parts += ["dropout"] * (self.dropout > 0) + [self.outputs] * (self.outputs != "plain")
        parts += [] if self.garbage is None else [f"hides_{self.garbage}"]
        parts += [self.layout] * (self.layout != "dense") + [f"seed{self.seed}"] * (self.seed != 0)
        return "-".join([*parts, self.dtype])

    @property
    def weights(self):
        return {"average": "average", "average+lse": "average", "heads": "heads"}.get(self.outputs, "none")

    @property
    def wants_lse(self):
        return self.outputs.endswith("lse")

    @property
    def makes_sense(self):
        """Does every level that is not plain change anything?"""
        bounded = self.causal or self.window is not None
        hides = bounded or self.mask != "none" or self.padding or self.documents != "none"
        return (
            (hides or self.garbage is None)
            and (bounded or self.prefix == "none")
            and (bounded or self.alibi != "none" or self.alignment == "top_left")
        )

    @property
    def cost(self):
        """About how many tiles of scores a kernel visits, in tiles of head size 64 without dropout. In Triton's
        interpreter each takes about 30 ms, all passes together."""
        tiles = self.batch * self.heads[0] * -(-self.seqlen_q // 64) * -(-self.seqlen_k // 32)
        return tiles * (32 + self.head_dim) / 96 * (4 if self.dropout else 1)

    @property
    def band(self):
        """``(lower, upper, shift)``: query ``i`` of position ``i + shift`` sees keys ``i + lower`` to ``i + upper``."""
        shift = self.seqlen_k - self.seqlen_q if self.alignment == "bottom_right" else 0
        left, right = self.window or (None, None)
        right = 0 if self.causal else right
        return None if left is None else shift - left, None if right is None else shift + right, shift


@dataclasses.dataclass
class Problem:
    """A case's tensors."""

    case: Case
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    key_padding_mask: torch.Tensor | None
    prefix: int | torch.Tensor | None
    document_ids: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None
    d_output: torch.Tensor
    d_weights: torch.Tensor | None
    d_lse: torch.Tensor | None

    @property
    def is_additive(self):
        return self.attn_mask is not None and self.attn_mask.is_floating_point()

    @property
    def leaves(self):
        """Everything that has a gradient, by the name of its argument."""
        names = ["query", "key", "value", *["attn_mask"] * self.is_additive]
        names += [name for name in ("alibi_slopes", "sinks") if getattr(self, name) is not None]
        return {name: getattr(self, name).detach().requires_grad_() for name in names}


def make_problem(case, device, seed):
    (heads, kv_heads), batch, length, keys = case.heads, case.batch, case.seqlen_q, case.seqlen_k
    dtype = DTYPES[case.dtype]
    query, key, value = attention_inputs(
        batch, heads, length, keys, case.head_dim, kv_heads=kv_heads, value_dim=case.value_dim, dtype=dtype,
        device=device, layout=case.layout, seed=seed,
    )  # fmt: skip
    mask = padding = slopes = sinks = prefix = documents = None
    if (kind := MASKS[case.mask]) is not None:
        mask = attention_mask(
            batch, heads, length, keys, dtype={"bool": torch.bool, "additive": dtype, "wide": torch.float32}[kind[0]],
            broadcast=_BROADCAST.get(kind[1], kind[1]), block=_BLOCK.get(kind[1], 1), device=device, seed=seed + 1,
        )  # fmt: skip
        if kind[1] == "scalar":
            mask = mask[:, :, :1, :1]
    if case.padding:
        padding = key_padding_mask(batch, keys, device=device, seed=seed + 2)
    if case.alibi != "none":
        wide: dict[str, Any] = {"batch": batch, "dtype": torch.float32} if case.alibi == "batch" else {"dtype": dtype}
        slopes = alibi_slopes(heads, **wide, device=device, seed=seed + 6)
    if case.sinks != "none":
        own = dtype if case.sinks == "own" else torch.float32
        sinks = attention_sinks(heads, dtype=own, device=device, seed=seed + 7)
    if case.prefix != "none":
        prefix = prefix_lengths(batch, keys, device=device, seed=seed + 8) if case.prefix == "tensor" else 20
    if case.documents != "none":
        shortest, longest = DOCUMENTS[case.documents]
        draw: Any = functools.partial(document_ids, shortest=shortest, longest=longest, device=device)
        entries = 1 if case.documents == "shared" else batch
        documents = draw(entries, length, seed=seed + 9)
        if case.documents == "cross" or length != keys:
            documents = documents, draw(entries, keys, seed=seed + 10)
    d_weights = d_lse = None
    if case.weights != "none":
        shape = (batch, length, keys) if case.weights == "average" else (batch, heads, length, keys)
        d_weights = random_tensor(*shape, seed=seed + 3, dtype=dtype, device=device)
    if case.wants_lse:
        d_lse = random_tensor(batch, heads, length, seed=seed + 4, device=device)
    d_output = random_tensor(batch, heads, length, case.value_dim, seed=seed + 5, dtype=dtype, device=device)
    return Problem(
        case, query, key, value, mask, slopes, sinks, padding, prefix, documents, d_output, d_weights, d_lse
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------- what nobody may see

GARBAGE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def hidden_places(problem):
    """Boolean tensors by the name of what they are about, True where its elements reach no pair that may be seen.

    Of queries and keys whole rows, of an additive mask the elements that something else hides, of gradients what comes
    in for a row that sees nothing, or for the weight of a hidden pair.
    """
    case, device = problem.case, problem.query.device
    lower, upper, _ = case.band
    ids = problem.document_ids
    of_queries, of_keys = ids if isinstance(ids, tuple) else (ids, ids)
    prefix = None if problem.prefix is None else torch.as_tensor(problem.prefix, device=device).view(-1)
    mask = problem.attn_mask
    others = visibility(
        case.seqlen_q, case.seqlen_k, lower=lower, upper=upper, prefix=None if lower is upper is None else prefix,
        mask=None if problem.is_additive else mask, key_padding_mask=problem.key_padding_mask,
        query_documents=of_queries, key_documents=of_keys, device=device,
    )  # fmt: skip
    (heads, kv_heads), shape = case.heads, (case.batch, case.heads[0], case.seqlen_q, case.seqlen_k)
    visible = (others & (mask != -math.inf) if problem.is_additive else others).expand(shape)
    blind, unseen = ~visible.any(dim=-1), ~visible.any(dim=-2)
    unseen = unseen.unflatten(1, (kv_heads, heads // kv_heads)).all(dim=2)
    places = {"query": blind, "key": unseen, "value": unseen, "d_output": blind}
    if problem.is_additive:
        reaches = others.expand(shape).float().sum_to_size((1,) * (4 - mask.dim()) + mask.shape).view(mask.shape)
        places["attn_mask"] = (reaches == 0) & (mask != -math.inf)
    if problem.alibi_slopes is not None:
        blind_heads = blind.all(dim=2)
        places["alibi_slopes"] = blind_heads if problem.alibi_slopes.dim() == 2 else blind_heads.all(dim=0)
    if problem.d_weights is not None:
        places["d_weights"] = ~visible.any(dim=1) if problem.d_weights.dim() == 3 else ~visible
    if problem.d_lse is not None and problem.sinks is None:
        places["d_lse"] = blind
    return places


def hiding(problem):
    """The problem with the case's garbage wherever nobody may see it. Huge numbers overflow in products with others."""
    if (garbage := problem.case.garbage) is None:
        return problem
    changed = {}
    for name, place in hidden_places(problem).items():
        tensor = getattr(problem, name)
        value = GARBAGE.get(garbage, torch.finfo(tensor.dtype).max / 8)
        changed[name] = tensor.masked_fill(place[(..., *(None,) * (tensor.dim() - place.dim()))], value)
    return dataclasses.replace(problem, **changed)


# --------------------------------------------------------------------------------------------------- the two sides


def _with_gradients(problem, results, leaves):
    """The results by name, and beside them the gradient of every leaf, pulled back from all of the results."""
    cotangents = {"output": problem.d_output, "weights": problem.d_weights, "lse": problem.d_lse}
    pulled = [cotangents[name].to(result.dtype) for name, result in results.items()]
    gradients = torch.autograd.grad(list(results.values()), list(leaves.values()), pulled)
    return {**results, **{f"d_{name}": gradient for name, gradient in zip(leaves, gradients)}}


# The paths of the torch backend, each of which can be made to take a call that it serves, whichever comes first.
PATHS = ("tiles", "sdpa", "unseen", "formula", "flash", "blocks")


def run_path(path, call):
    """``(output, weights or None, lse or None)`` of a call without dropout on one path, or None where it declines."""
    if path == "blocks":
        return operator.apply(call, None, "torch")
    if path == "flash":
        inputs, options = operator.operands(call, None, "torch")
        return operator.apply(call, None, "torch") if flash.takes(inputs, options) else None
    if path == "formula":
        found = formula.run(call, None) if formula.takes(call) else None
        return None if found is None else (*found, None)
    output = None
    if path == "unseen" and on_torch.sdpa_takes_unseen(call):
        output = sdpa.run_unseen(call)
    elif path == "sdpa" and sdpa.takes(call) and sdpa.is_tame(call):
        output = sdpa.run(call)
    elif path == "tiles" and torch_tiles.takes(call) and sdpa.is_tame(call):
        output = torch_tiles.run(call, *operator.operands(call, None, "torch"), may_decline=False)
    return None if output is None else (output, None, None)


def run_backend(problem, backend):
    """``(results and gradients by name, the kept weights or None)`` of fastattn on a backend, or on one of
    :data:`PATHS`, which may have no results."""
    if backend == "blocks":  # which leave what they can to tiles of torch's kernel, forward and backward
        with unittest.mock.patch.object(flash, "takes", return_value=False):
            return _run_backend(problem, backend)
    return _run_backend(problem, backend)


def _run_backend(problem, backend):
    case, leaves = problem.case, problem.leaves
    arguments: dict[str, Any] = {
        "attn_mask": problem.attn_mask,
        "alibi_slopes": problem.alibi_slopes,
        "sinks": problem.sinks,
        **leaves,
        "key_padding_mask": problem.key_padding_mask,
        "prefix": problem.prefix,
        "document_ids": problem.document_ids,
        "is_causal": case.causal,
        "causal_alignment": case.alignment,
        "window": case.window,
        "softcap": case.softcap,
        "scale": case.scale,
        "need_weights": case.weights != "none",
        "average_attn_weights": case.weights != "heads",
        "return_lse": case.wants_lse,
    }
    keep = None
    if case.dropout:
        # Below the public function, where the state is known: there the kept weights can be exported.
        call = make_call(**arguments, dropout_p=case.dropout)
        state = dropout_state(call, backend)
        keep = kept_weights(call, state, backend)
        found = operator.apply(call, state, backend)
    elif backend in PATHS:
        gradients = contextlib.nullcontext() if backend != "tiles" else torch.no_grad()  # which tiles do not take
        with gradients:
            found = run_path(backend, make_call(**arguments))
        if found is None:
            return {}, None
        if backend == "tiles":
            return {"output": found[0]}, None
    else:
        found = attend(**arguments, backend=backend)
        if isinstance(found, torch.Tensor):
            found = (found,)
    names = ["output", *["weights"] * (case.weights != "none"), *["lse"] * case.wants_lse]
    results = dict(zip(names, (t for t in found if t is not None), strict=True))
    return _with_gradients(problem, results, leaves), keep


def reference_words(problem, leaves, dtype):
    """The arguments of the reference, spelled from the case and not by the code under test. ``leaves`` are those of the
    problem, in ``dtype``."""
    case, words = problem.case, {name: leaves[name] for name in ("query", "key", "value")}
    words["lower"], words["upper"], words["shift"] = case.band
    if problem.attn_mask is not None:
        words["bias" if problem.is_additive else "mask"] = leaves.get("attn_mask", problem.attn_mask)
    for name in ("alibi_slopes", "sinks"):
        if name in leaves:
            words[name] = leaves[name] if leaves[name].dim() == 2 else leaves[name][None]
    if problem.prefix is not None:
        words["prefix"] = torch.as_tensor(problem.prefix, device=problem.query.device).view(-1)
    if (ids := problem.document_ids) is not None:
        words["query_documents"], words["key_documents"] = ids if isinstance(ids, tuple) else (ids, ids)
    return {**words, "key_padding_mask": problem.key_padding_mask, "softcap": case.softcap, "scale": case.scale}


def run_reference(problem, keep, dtype):
    """The same of the reference in ``dtype``: float64 is the truth, the case's own dtype the peer."""
    case = problem.case
    leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in problem.leaves.items()}
    found = reference(**reference_words(problem, leaves, dtype), dropout_keep=keep, dropout_p=case.dropout)
    results = {"output": found.output}
    if case.weights != "none":
        results["weights"] = found.weights.mean(dim=1) if case.weights == "average" else found.weights
    if case.wants_lse:
        results["lse"] = found.lse
    return _with_gradients(problem, results, leaves)


def dropout_state(call, backend):
    """A dropout state of the backend, drawn from torch's generator."""
    if backend == "triton":
        return torch.randint(0, 2**31 - 1, (2,), device=call.query.device)
    shape = (*call.query.shape[:3], call.key.shape[2])
    return torch.rand(shape, device=call.query.device) >= call.dropout_p


def kept_weights(call, state, backend):
    """Boolean ``[B, H, L, S]``: the weights that this state keeps."""
    return implementation(backend).dropout_keep(*operator.operands(call, state, backend))


def check(feature, case, backend, device):
    """Hold every result and every gradient of a case to its error budget, and count the case as met."""
    seed = zlib.crc32(case.id.encode())
    torch.manual_seed(seed)
    problem = make_problem(case, device, seed)
    actual, keep = run_backend(hiding(problem), backend)
    truth = run_reference(problem, keep, torch.float64)
    peer = run_reference(problem, keep, DTYPES[case.dtype])
    allowed = allowances(problem, keep)
    for name, tensor in actual.items():
        assert_within_budget(
            tensor,
            truth=truth[name],
            peer=peer[name],
            name=name,
            allowance=allowed[name],
            feature=feature,
            backend=backend,
        )
    pairwise.met.append(("attention", backend, {axis: getattr(case, axis) for axis in AXES}))


# ------------------------------------------------------------------------------------------------------ the budgets


def allowances(problem, keep):
    """What attention in linear memory may lose beyond eager PyTorch, in absolute numbers, by the result's name.

    It keeps two things of a row: the softmax statistics, in float32, and the output, in the inputs' dtype. So a weight
    is ``exp(score - maximum) / sum`` of a score computed again, in another tile and with other roundings, and has the
    absolute error of the two scores for a relative one; and the mean of a row of ``dP`` is ``sum(output * d_output)``,
    with roundings that ``dP`` has not got. In eager PyTorch both differences are exact where they cancel (a row that
    sees one key has the weight 1 and the gradient 0), so the peer's error says nothing of them. Elsewhere they are
    small beside it: over many keys a row's error spreads out.

    And where a result has few elements, as the gradients of slopes and sinks have, the peer's error is a sample of few:
    it strays from what eager roundings lose on average by one part in ``sqrt(2 n)``. Three such parts are allowed. No
    result is a larger sample than the different weights whose errors make it, and few make it where rows attend
    sharply: their participation number, ``sum(e)^2 / sum(e^2)`` of the squared errors, says how many.
    """
    case, dtype = problem.case, problem.query.dtype
    leaves = {name: leaf.detach().double() for name, leaf in problem.leaves.items()}
    query, key, value, d_output = (*(leaves[name] for name in ("query", "key", "value")), problem.d_output.double())
    groups = query.shape[1] // key.shape[1]
    kept = 1.0 if keep is None else keep / (1 - case.dropout)
    scale = 1 / math.sqrt(case.head_dim) if case.scale is None else abs(case.scale)
    found = reference(**reference_words(problem, leaves, torch.float64))
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    weights, output = found.weights, (found.weights * kept) @ value
    visible = weights > 0

    # The magnitudes of what is rounded: in float32 every product of rows loses about an ulp of the sum of its terms'
    # magnitudes; in the inputs' dtype, products are summed up exactly, roundings are independent and squares add up.
    scores, squared = scale * query.abs() @ key.abs().mT, scale**2 * query.square() @ key.square().mT
    bend = torch.ones(())
    if case.softcap is not None:
        bent = torch.tanh((scale if case.scale is None else case.scale) * query @ key.mT / case.softcap)
        bend = 1 - bent.square()
        scores = scores * bend + 2 * case.softcap * bent.abs()
        squared = squared * bend.square() + (case.softcap * bent).square()
    positions = torch.arange(case.seqlen_q, device=query.device)[:, None] + case.band[2]
    distance = (positions - torch.arange(case.seqlen_k, device=query.device)).abs().double()
    added = []
    if problem.is_additive:
        added.append(leaves["attn_mask"].abs().nan_to_num(posinf=0.0))
    if "alibi_slopes" in leaves:
        added.append(leaves["alibi_slopes"].view(-1, query.shape[1], 1, 1) * distance)
    for term in added:
        scores, squared = scores + term, squared + term.square()
    top, top_squared = ((t * visible).amax(dim=-1, keepdim=True) for t in (scores, squared))
    of_sinks = sink = torch.zeros(())
    if "sinks" in leaves:
        sink = leaves["sinks"][:, None, None].abs()
        of_sinks = torch.exp(leaves["sinks"][:, None, None] - found.lse[..., None])
        top, top_squared = torch.maximum(top, sink), torch.maximum(top_squared, sink.square())
    d_weights, d_weights_squared = d_output.abs() @ value.abs().mT, d_output.square() @ value.square().mT
    if problem.d_weights is not None:
        given = problem.d_weights.double().abs().view(case.batch, -1, case.seqlen_q, case.seqlen_k)
        d_weights, d_weights_squared = d_weights + given, d_weights_squared + given.square()
    d_weights, d_weights_squared = d_weights * kept, d_weights_squared * kept * kept
    d_lse = torch.zeros(()) if problem.d_lse is None else problem.d_lse.double().abs()[..., None]

    relative = weights * (1 + scores + top)  # 1: the roundings of the exponential and of the sum that it goes into
    means = (weights * d_weights).sum(dim=-1, keepdim=True) + d_lse
    d_scores = relative * (d_weights + means)
    d_products = d_scores * bend
    if case.softcap is not None:
        d_products = d_products + 3 * weights * (d_weights + means)  # the error of the bend, which is not relative
    float32 = {
        "output": (relative * kept) @ value.abs(),
        "weights": relative * kept,
        "lse": 1 + top,
        "d_query": scale * d_products @ key.abs(),
        "d_key": scale * d_products.mT @ query.abs(),
        "d_value": (relative * kept).mT @ d_output.abs(),
        "d_attn_mask": d_scores,
        "d_alibi_slopes": d_scores * distance,
        "d_sinks": of_sinks * (1 + sink + top) * means,
    }
    # The roundings of a row's output, which are one number for the whole row, and those of a query that is scaled
    # before the product.
    mean = (output * d_output).square().sum(dim=-1, keepdim=True).sqrt()
    of_bias = mean * weights
    if problem.is_additive and problem.attn_mask.shape[-1] == 1:
        of_bias = of_bias.sum(dim=-1, keepdim=True)
    rounded = {  # squared
        "lse": squared * visible,
        "d_query": (scale * mean * ((weights * bend) @ key)).square(),
        "d_key": (scale * mean * weights * bend).mT.square() @ query.square(),
        "d_attn_mask": of_bias.square(),
        "d_alibi_slopes": (mean * (weights * distance).sum(dim=-1, keepdim=True)).square(),
        "d_sinks": (of_sinks * mean).square(),
    }
    # What eager PyTorch rounds, on average.
    weights_squared = (weights * kept).square() * (1 + squared + top_squared)
    means_squared = (weights * d_weights_squared).sum(dim=-1, keepdim=True) + d_lse.square()
    d_scores_squared = weights.square() * (1 + squared + top_squared) * (d_weights_squared + means_squared)
    d_products_squared = d_scores_squared * bend.square()
    if case.softcap is not None:  # the bend is 1 - t^2, of a rounded t
        d_products_squared = d_products_squared + (2 * (1 - bend) * weights).square() * (
            d_weights_squared + means_squared
        )
    eager = {  # squared
        "output": weights_squared @ value.square(),
        "weights": weights_squared,
        "lse": 1 + top_squared,
        "d_query": scale**2 * d_products_squared @ key.square(),
        "d_key": scale**2 * d_products_squared.mT @ query.square(),
        "d_value": weights_squared.mT @ d_output.square(),
        "d_attn_mask": d_scores_squared,
        "d_alibi_slopes": d_scores_squared * distance.square(),
        "d_sinks": (of_sinks.square() * (1 + sink.square() + top_squared)) * means_squared,
    }

    def largest(name, terms):
        """Of the terms, added up as the result adds them: over query heads, or over the axes that broadcast."""
        if name in ("d_key", "d_value"):
            terms = terms.unflatten(1, (-1, groups)).sum(dim=2)
        elif name == "d_attn_mask":
            terms = terms.expand(*weights.shape[:3], terms.shape[3]).sum_to_size(problem.attn_mask.shape)
        elif name in ("d_alibi_slopes", "d_sinks"):
            terms = terms.sum(dim=(2, 3)).sum_to_size(leaves[name[2:]].shape)
        return terms.amax().item()

    sizes = {"output": problem.d_output, "weights": problem.d_weights, "lse": problem.d_lse}
    sizes |= {f"d_{name}": leaf for name, leaf in leaves.items()}
    energy = weights_squared.double()
    different = weights[visible].round(decimals=12).unique().numel()
    pairs = max(1.0, min(different, (energy.sum().square() / energy.square().sum()).nan_to_num(1.0).item()))
    result = {}
    for name, size in sizes.items():
        if size is not None:
            result[name] = torch.finfo(torch.float32).eps * largest(name, float32[name])
            sample = min(size.numel(), pairs)
            stray = min(1.0, 3 / math.sqrt(2 * sample)) * math.sqrt(largest(name, eager[name]))
            if name in rounded:
                stray += math.sqrt(largest(name, rounded[name]))
            result[name] += torch.finfo(dtype).eps * stray
    return result
