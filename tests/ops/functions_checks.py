"""The error budgets of calls with functions of scores and masks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn.testing import assert_within_budget
from tests.ops.functions_calls import (
    Call,
    Drawn,
    bounds_of,
    draw,
    functions_of,
    numbers_of_python_in,
    of_ours,
    of_reference,
    places_of,
    run_reference,
)

_DRAWS = 6


def allowances(call: Call, drawn: Drawn, keep: Tensor | None) -> dict[str, float]:
    """What roundings may do to gradients beyond what they did to the peer's, by name.

    A weight is computed again in the backward and has relative roundings of its own. The gradient of a score, ``P * (dP
    - delta)``, has these for each pair, and those of ``delta``, the sum of a row of ``O * dO``, one for the row, in
    which the output is rounded to its dtype. In eager PyTorch they cancel exactly for a row that sees one key; and of a
    sum over pairs that is a few numbers, as those of captured tensors are, the peer's error is a sample of few. Torch's
    own pullback says what becomes of random roundings: three standard deviations of that are allowed.
    """
    leaves = {name: t.double().requires_grad_() for name, t in drawn.leaves.items()}
    scores, value = _scores_and_values(call, drawn, leaves)
    weights = _weights(call, drawn, leaves)
    d_output = drawn.upstream["output"].double()
    kept = 1.0 if keep is None else keep / (1 - call.words["dropout_p"])
    d_weights = d_output @ value.detach().mT
    if call.words.get("need_weights"):
        d_weights = d_weights.abs() + drawn.upstream["weights"].double().abs()[:, None] / call.sizes.heads
    d_weights = (d_weights * kept).abs()
    delta = (weights * d_weights).sum(-1, keepdim=True)
    if call.words.get("return_lse"):
        delta = delta + drawn.upstream["lse"].double().abs()[..., None]
    size = 1 + scores.detach().nan_to_num(neginf=0.0).abs()
    single = torch.finfo(torch.float32).eps
    of_weights = single * weights * (size + size.amax(-1, keepdim=True))
    products = ((weights * kept) @ value.detach()) * d_output
    of_rows = single * delta + torch.finfo(call.dtype).eps * products.square().sum(-1, keepdim=True).sqrt()

    generator = torch.Generator().manual_seed(0)
    squares = dict.fromkeys(leaves, 0.0)
    for _ in range(_DRAWS):
        each, row = (torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (of_weights, of_rows))
        d_scores = of_weights * each * (d_weights + delta) + weights * of_rows * row
        d_value = (of_weights * each * kept).mT @ d_output
        strays = torch.autograd.grad(
            (scores, value), list(leaves.values()), (d_scores, d_value), retain_graph=True, materialize_grads=True
        )
        squares = {name: squares[name] + t.square().max().item() / _DRAWS for name, t in zip(leaves, strays)}
    return {f"d_{name}": 3 * math.sqrt(square) for name, square in squares.items()}


def _scores_and_values(call: Call, drawn: Drawn, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The scores ``[B, H, L, S]`` of all pairs, and the values of all heads, differentiable."""
    query, key, value = (leaves[name] for name in ("query", "key", "value"))
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = query @ key.mT * call.words.get("scale", query.shape[-1] ** -0.5)
    if "softcap" in call.words:
        scores = call.words["softcap"] * torch.tanh(scores / call.words["softcap"])
    places = places_of(call.sizes)
    with numbers_of_python_in(torch.float64):
        scores = functions_of(call, drawn, leaves).get("score_mod", lambda score, *_: score)(scores, *places)
    if "alibi_slopes" in leaves:
        distance = (places[2] + bounds_of(call)["shift"] - places[3]).abs()
        scores = scores - leaves["alibi_slopes"][..., None, None] * distance
    return scores.expand(*call.sizes) + leaves.get("bias", 0.0), value


def _weights(call: Call, drawn: Drawn, leaves: dict[str, Tensor]) -> Tensor:
    """``[B, H, L, S]``, before dropout."""
    return run_reference(call, drawn, leaves).weights.detach()


def check(call: Call, backend: str, device: Any = "cpu") -> dict[str, Tensor]:
    """Hold every result and gradient of a call to its error budget, and return them."""
    drawn = draw(call, device)
    found, keep = of_ours(call, drawn, backend)
    truth, peer = (of_reference(call, drawn, keep, dtype) for dtype in (torch.float64, call.dtype))
    assert set(found) == set(truth)
    allowed = allowances(call, drawn, keep)
    for name, tensor in found.items():
        if name.startswith("d_"):
            assert tensor.dtype == drawn.leaves[name[2:]].dtype, name
        assert_within_budget(
            tensor, truth=truth[name], peer=peer[name], name=name, allowance=allowed.get(name, 0.0),
            feature="functions of scores and masks", backend=backend,
        )  # fmt: skip
    return found
