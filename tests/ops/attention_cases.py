"""A case of the attention parity tests: what it is called, its inputs, and how each side computes it."""

import dataclasses
import math
from typing import Any

import torch

import fastattn
from fastattn.ops import _autograd
from fastattn.ops._call import make_call
from fastattn.ops._contract import implementation
from fastattn.reference import attention as reference
from fastattn.testing import attention_inputs, attention_mask, key_padding_mask, random_tensor

# What it returns depends on its arguments; a test knows which it gave.
attend: Any = fastattn.attention

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Query heads and key heads.
HEADS = {"mha": (2, 2), "gqa": (4, 2), "mqa": (3, 1)}
# How much of an additive mask's dtype is its own: `wide` is float32 whatever the query is.
MASKS = {
    "none": None,
    **{f"bool-{b}": ("bool", b) for b in ("full", "batch", "head", "query", "key", "2d")},
    **{f"additive-{b}": ("additive", b) for b in ("full", "batch", "head", "query", "key", "2d")},
    "additive-wide": ("wide", "head"),
}
_BROADCAST: dict[str, Any] = {"full": "none", "2d": "batch_head"}

AXES: dict[str, list[Any]] = {
    "dtype": list(DTYPES),
    "causal": ["none", "top_left", "bottom_right"],
    "mask": list(MASKS),
    "padding": [False, True],
    "heads": list(HEADS),
    "dropout": [0.0, 0.3],
    "outputs": ["plain", "average", "heads", "lse", "average+lse"],
    "layout": ["dense", "heads_inside", "feature_map", "packed", "broadcast", "every_other"],
    "value": ["same", "smaller", "larger"],
    "seqlen_q": [1, 3, 97, 130],
    "seqlen_k": [1, 3, 97, 130],
    "head_dim": [1, 8, 59, 64, 80, 128, 192, 256],
}


@dataclasses.dataclass(frozen=True)
class Case:
    """The levels of :data:`AXES`; the defaults exercise nothing but odd lengths."""

    dtype: str = "fp32"
    causal: str = "none"
    mask: str = "none"
    padding: bool = False
    heads: str = "mha"
    dropout: float = 0.0
    outputs: str = "plain"
    layout: str = "dense"
    value: str = "same"
    seqlen_q: int = 97
    seqlen_k: int = 130
    head_dim: int = 64
    batch: int = 2

    @property
    def value_dim(self):
        smaller, larger = max(1, self.head_dim // 2 - 1), min(256, self.head_dim + 13)
        return {"same": self.head_dim, "smaller": smaller, "larger": larger}[self.value]

    @property
    def id(self):
        heads, kv_heads = HEADS[self.heads]
        parts = [f"b{self.batch}", f"h{heads}"]
        parts += [f"kv{kv_heads}"] * (heads != kv_heads)
        parts += [f"m{self.seqlen_q}", f"n{self.seqlen_k}", f"d{self.head_dim}"]
        parts += [f"dv{self.value_dim}"] * (self.value_dim != self.head_dim)
        parts += [f"causal_{self.causal}"] * (self.causal != "none")
        parts += [self.mask] * (self.mask != "none") + ["padding"] * self.padding
        parts += ["dropout"] * (self.dropout > 0) + [self.outputs] * (self.outputs != "plain")
        parts += [self.layout] * (self.layout != "dense")
        return "-".join([*parts, self.dtype])

    @property
    def weights(self):
        return {"average": "average", "average+lse": "average", "heads": "heads"}.get(self.outputs, "none")

    @property
    def wants_lse(self):
        return self.outputs.endswith("lse")


@dataclasses.dataclass
class Problem:
    """A case's tensors."""

    case: Case
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None
    key_padding_mask: torch.Tensor | None
    d_output: torch.Tensor
    d_weights: torch.Tensor | None
    d_lse: torch.Tensor | None

    @property
    def is_additive(self):
        return self.attn_mask is not None and self.attn_mask.is_floating_point()


def make_problem(case, device, seed):
    heads, kv_heads = HEADS[case.heads]
    batch, length, keys, dtype = case.batch, case.seqlen_q, case.seqlen_k, DTYPES[case.dtype]
    query, key, value = attention_inputs(
        batch,
        heads,
        length,
        keys,
        case.head_dim,
        kv_heads=kv_heads,
        value_dim=case.value_dim,
        dtype=dtype,
        device=device,
        layout=case.layout,
        seed=seed,
    )
    mask = padding = None
    if (kind := MASKS[case.mask]) is not None:
        mask_dtype = {"bool": torch.bool, "additive": dtype, "wide": torch.float32}[kind[0]]
        broadcast: Any = _BROADCAST.get(kind[1], kind[1])
        mask = attention_mask(
            batch, heads, length, keys, dtype=mask_dtype, broadcast=broadcast, device=device, seed=seed + 1
        )
    if case.padding:
        padding = key_padding_mask(batch, keys, device=device, seed=seed + 2)
    d_weights = d_lse = None
    if case.weights != "none":
        shape = (batch, length, keys) if case.weights == "average" else (batch, heads, length, keys)
        d_weights = random_tensor(*shape, seed=seed + 3, dtype=dtype, device=device)
    if case.wants_lse:
        d_lse = random_tensor(batch, heads, length, seed=seed + 4, device=device)
    d_output = random_tensor(batch, heads, length, case.value_dim, seed=seed + 5, dtype=dtype, device=device)
    return Problem(case, query, key, value, mask, padding, d_output, d_weights, d_lse)


# --------------------------------------------------------------------------------------------------- the two sides


def _leaves(problem, bias_gradient):
    leaves = {name: getattr(problem, name).detach().requires_grad_() for name in ("query", "key", "value")}
    if bias_gradient and problem.is_additive:
        leaves["attn_mask"] = problem.attn_mask.detach().requires_grad_()
    return leaves


def _with_gradients(problem, results, leaves):
    """The results by name, and beside them the gradient of every leaf, pulled back from all of the results."""
    cotangents = {"output": problem.d_output, "weights": problem.d_weights, "lse": problem.d_lse}
    pulled = [cotangents[name].to(result.dtype) for name, result in results.items()]
    gradients = torch.autograd.grad(list(results.values()), list(leaves.values()), pulled)
    return {**results, **{f"d_{name}": gradient for name, gradient in zip(leaves, gradients)}}


def run_backend(problem, backend, *, bias_gradient=False):
    """``(results and gradients by name, the kept weights or None)`` of fastattn."""
    case, leaves = problem.case, _leaves(problem, bias_gradient)
    arguments: dict[str, Any] = {
        "attn_mask": leaves.get("attn_mask", problem.attn_mask),
        "key_padding_mask": problem.key_padding_mask,
        "is_causal": case.causal != "none",
        "causal_alignment": "bottom_right" if case.causal == "bottom_right" else "top_left",
        "need_weights": case.weights != "none",
        "average_attn_weights": case.weights != "heads",
        "return_lse": case.wants_lse,
    }
    qkv = leaves["query"], leaves["key"], leaves["value"]
    keep = None
    if case.dropout:
        # Below the public function, where the state is known: there the kept weights can be exported.
        call = make_call(*qkv, **arguments, dropout_p=case.dropout)
        state = dropout_state(call, backend)
        keep = kept_weights(call, state, backend)
        found = _autograd.apply(call, state, backend)
    else:
        found = attend(*qkv, **arguments, backend=backend)
        if isinstance(found, torch.Tensor):
            found = (found,)
    names = ["output", *["weights"] * (case.weights != "none"), *["lse"] * case.wants_lse]
    results = dict(zip(names, (t for t in found if t is not None), strict=True))
    return _with_gradients(problem, results, leaves), keep


def run_reference(problem, keep, dtype, *, bias_gradient=False):
    """The same of the reference in ``dtype``: float64 is the truth, the case's own dtype the peer."""
    case, leaves = problem.case, _leaves(problem, bias_gradient)
    cast = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
    mask = cast.get("attn_mask", problem.attn_mask)
    diagonal = {"none": None, "top_left": 0, "bottom_right": case.seqlen_k - case.seqlen_q}[case.causal]
    found = reference(
        cast["query"],
        cast["key"],
        cast["value"],
        bias=mask.to(dtype) if problem.is_additive else None,
        mask=None if problem.is_additive else mask,
        key_padding_mask=problem.key_padding_mask,
        upper=diagonal,
        dropout_keep=keep,
        dropout_p=case.dropout,
    )
    results = {"output": found.output}
    if case.weights != "none":
        results["weights"] = found.weights.mean(dim=1) if case.weights == "average" else found.weights
    if case.wants_lse:
        results["lse"] = found.lse
    return _with_gradients(problem, results, cast)


def dropout_state(call, backend):
    """A dropout state of the backend, drawn from torch's generator."""
    if backend == "triton":
        return torch.randint(0, 2**31 - 1, (2,), device=call.query.device)
    shape = (*call.query.shape[:3], call.key.shape[2])
    return torch.rand(shape, device=call.query.device) >= call.dropout_p


def kept_weights(call, state, backend):
    """Boolean ``[B, H, L, S]``: the weights that this state keeps."""
    return implementation(backend).dropout_keep(*_autograd.operands(call, state, backend))


def allowances(problem, keep):
    """What attention in linear memory may lose beyond eager PyTorch, in absolute numbers, by the result's name.

    It keeps two things of a row: the softmax statistics, in float32, and the output, in the inputs' dtype. So a weight
    is ``exp(score - maximum) / sum`` of a score computed again, in another tile and with other roundings, and has the
    absolute error of the two scores for a relative one; and the mean of a row of ``dP`` is ``sum(output * d_output)``,
    with roundings that ``dP`` has not got. In eager PyTorch both differences are exact where they cancel (a row that
    sees one key has the weight 1 and the gradient 0), so the peer's error says nothing of them. Elsewhere they are
    small beside it: over many keys a row's error spreads out.
    """
    case, dtype = problem.case, problem.query.dtype
    query, key, value, d_output = (t.double() for t in (problem.query, problem.key, problem.value, problem.d_output))
    groups = query.shape[1] // key.shape[1]
    kept = 1.0 if keep is None else keep / (1 - case.dropout)
    scale = 1 / math.sqrt(case.head_dim)
    additive = problem.is_additive
    found = reference(
        query,
        key,
        value,
        bias=problem.attn_mask.double() if additive else None,
        mask=None if additive else problem.attn_mask,
        key_padding_mask=problem.key_padding_mask,
        upper={"none": None, "top_left": 0, "bottom_right": case.seqlen_k - case.seqlen_q}[case.causal],
    )
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    weights, output = found.weights, (found.weights * kept) @ value

    # Float32: every product of rows loses about an ulp of the sum of its terms' magnitudes.
    scores = scale * query.abs() @ key.abs().mT
    if additive:
        scores = scores + problem.attn_mask.double().abs().nan_to_num(posinf=0.0)
    visible = weights > 0
    relative = weights * (scores + (scores * visible).amax(dim=-1, keepdim=True))
    d_weights = d_output.abs() @ value.abs().mT
    if problem.d_weights is not None:
        d_weights = d_weights + problem.d_weights.double().abs().view(case.batch, -1, case.seqlen_q, case.seqlen_k)
    d_weights = d_weights * kept
    d_scores = (weights + relative) * (d_weights + (weights * d_weights).sum(dim=-1, keepdim=True))
    float32 = {
        "output": (relative * kept) @ value.abs(),
        "weights": relative * kept,
        "lse": (scores * visible).amax(dim=-1),
        "d_query": scale * d_scores @ key.abs(),
        "d_key": scale * d_scores.mT @ query.abs(),
        "d_value": (relative * kept).mT @ d_output.abs(),
        "d_attn_mask": d_scores,
    }
    # The inputs' dtype: the roundings of a row's output are independent of one another, so their squares add up.
    mean = (output * d_output).square().sum(dim=-1, keepdim=True).sqrt()
    # So are those of a query that is scaled before the product.
    rounded = {  # squared
        "lse": scale**2 * query.square() @ key.mT.square() * visible,
        "d_query": (scale * mean * (weights @ key)).square(),
        "d_key": (scale * mean * weights).mT.square() @ query.square(),
        "d_attn_mask": (mean * weights).square(),
    }

    def largest(name, terms):
        """Of the terms, added up as the result adds them: over query heads, or over a mask's broadcast axes."""
        if name in ("d_key", "d_value"):
            terms = terms.unflatten(1, (-1, groups)).sum(dim=2)
        elif name == "d_attn_mask":
            terms = terms.sum_to_size(problem.attn_mask.shape)
        return terms.amax().item()

    result = {}
    for name, terms in float32.items():
        if name != "d_attn_mask" or additive:
            result[name] = torch.finfo(torch.float32).eps * largest(name, terms)
            if name in rounded:
                result[name] += torch.finfo(dtype).eps * math.sqrt(largest(name, rounded[name]))
    return result
