"""Functions of scores and masks written by hand: their text for the kernels, and the same in plain torch.

``attend`` runs all kernels of a problem with them, ``expected_of`` is the formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.testing import random_tensor
from fastattn_kernels.attention import backward, forward
from fastattn_kernels.attention.bias_gradient import launch_attention_bias_bwd, launch_attention_captured_bwd
from fastattn_kernels.attention.weights import (
    launch_attention_weights,
    launch_attention_weights_delta,
    launch_dropout_keep,
)
from fastattn_kernels.common.delta import Delta
from fastattn_kernels.common.functions import Modifier, compiled
from fastattn_kernels.common.gradients import Gradients, WeightsGradient
from fastattn_kernels.common.tile_map import tile_map_for

ARGUMENTS = "score, batch, head, q, k, captured"


class Partial(NamedTuple):
    """The derivative by one of the captured tensors: an expression, the axes by which it is addressed, and how the
    gradients of all pairs become that of the tensor."""

    expression: str
    footprint: tuple[bool, bool, bool, bool]
    collect: Callable[[Tensor, Any], Tensor]


class Function(NamedTuple):
    """A function of scores. ``captured`` draws its tensors for ``B, H, L, S``."""

    lines: str
    result: str
    gradient: str
    eager: Callable[..., Tensor]
    captured: Callable[[int, int, int, int], tuple[Tensor, ...]] = lambda *_: ()
    partials: tuple[Partial, ...] = ()

    def text(self) -> str:
        """The function ``score_mod``, its ``gradient``, and ``partial_0`` and so on."""
        bodies = {"score_mod": self.result, "gradient": self.gradient}
        bodies |= {f"partial_{i}": partial.expression for i, partial in enumerate(self.partials)}
        return "\n".join(
            f"@triton.jit\ndef {name}({'' if name == 'score_mod' else 'd, '}{ARGUMENTS}):\n"
            f"{''.join(f'    {line.strip()}' + chr(10) for line in self.lines.splitlines() if line.strip())}"
            f"    return {body}\n"
            for name, body in bodies.items()
        )

    def modifier(self, tensors: tuple[Tensor, ...]) -> Modifier:
        return Modifier(compiled(self.text(), "score_mod"), compiled(self.text(), "gradient"), tensors)


class Mask(NamedTuple):
    """A function that hides keys."""

    result: str
    eager: Callable[..., Tensor]
    captured: Callable[[int, int, int, int], tuple[Tensor, ...]] = lambda *_: ()
    batches: bool = False
    heads: bool = False

    def modifier(self, tensors: tuple[Tensor, ...]) -> Modifier:
        text = f"@triton.jit\ndef mask_mod(batch, head, q, k, captured):\n    return {self.result}\n"
        return Modifier(compiled(text, "mask_mod"), None, tensors, self.batches, self.heads)


# ------------------------------------------------------------------------------------------------------------- scores


def _of_buckets(pairs: Tensor, table: Tensor) -> Tensor:
    """``[buckets, H]`` of ``[1, H, L, S]``."""
    rows, keys = torch.arange(pairs.shape[2]), torch.arange(pairs.shape[3])
    buckets = (rows[:, None] - keys + 5).clamp(0, len(table) - 1).flatten()
    return torch.zeros(table.shape, dtype=pairs.dtype).index_add(0, buckets, pairs[0].flatten(1).T)


def _table(b: int, h: int, rows: int, keys: int) -> tuple[Tensor, ...]:
    return (random_tensor(h, 11, seed=1).T,)


def _pairs(b: int, h: int, rows: int, keys: int) -> tuple[Tensor, ...]:
    return (random_tensor(b, rows, h, keys + 3, seed=2).transpose(1, 2)[..., 3:],)


def _scales(b: int, h: int, rows: int, keys: int) -> tuple[Tensor, ...]:
    return random_tensor(h, seed=3), random_tensor(2 * b, seed=4)[::2], random_tensor(1, seed=5)[0]


def _of_rows(b: int, h: int, rows: int, keys: int) -> tuple[Tensor, ...]:
    return random_tensor(1, rows, seed=6), torch.arange(keys) % 3 == 0


FUNCTIONS: dict[str, Function] = {
    "softcap": Function(
        "t = tanh(score / 2.0)", "2.0 * t", "d * (1.0 - t * t)", lambda s, b, h, q, k: 2.0 * torch.tanh(s / 2.0)
    ),
    "table of differences": Function(
        """bucket = tl.minimum(tl.maximum(q - k + 5, 0), captured[0].sizes[0] - 1)
        found = tl.load(captured[0].ptr + bucket * captured[0].strides[0] + head * captured[0].strides[1])""",
        "score + found",
        "d",
        lambda s, b, h, q, k, table: s + table[(q - k + 5).clamp(0, len(table) - 1), h],
        _table,
        (Partial("d", (False, True, True, True), _of_buckets),),
    ),
    "pairs": Function(
        """x = captured[0]
        row = x.ptr + batch.to(tl.int64) * x.strides[0] + head * x.strides[1] + q * x.strides[2]
        found = tl.load(row + k * x.strides[3])""",
        "score * found - 0.5 * found",
        "d * found",
        lambda s, b, h, q, k, x: s * x[b, h, q, k] - 0.5 * x[b, h, q, k],
        _pairs,
        (Partial("d * (score - 0.5)", (True, True, True, True), lambda pairs, _: pairs),),
    ),
    "scales": Function(
        """of_head = tl.load(captured[0].ptr + head * captured[0].strides[0])
        of_batch = tl.load(captured[1].ptr + batch * captured[1].strides[0])
        of_all = tl.load(captured[2].ptr)""",
        "score * of_head + of_batch * k * 0.02 + of_all * score * score",
        "d * (of_head + 2.0 * of_all * score)",
        lambda s, b, h, q, k, x, y, z: s * x[h] + y[b] * k * 0.02 + z * s * s,
        _scales,
        (
            Partial("d * score", (False, True, False, False), lambda pairs, _: pairs[0, :, 0, 0]),
            Partial("d * k * 0.02", (True, False, False, False), lambda pairs, _: pairs[:, 0, 0, 0]),
            Partial("d * score * score", (False, False, False, False), lambda pairs, _: pairs[0, 0, 0, 0]),
        ),
    ),
    "rows and flags": Function(
        """of_row = tl.load(captured[0].ptr + q * captured[0].strides[1])
        flag = tl.load(captured[1].ptr + k * captured[1].strides[0])""",
        "tl.where(flag != 0, of_row * score, score)",
        "tl.where(flag != 0, of_row * d, d)",
        lambda s, b, h, q, k, x, flags: torch.where(flags[k], x[0, q] * s, s),
        _of_rows,
        (Partial("tl.where(flag != 0, d * score, 0.0)", (False, False, True, False), lambda p, _: p[:, 0, :, 0]),),
    ),
    "hidden": Function(
        "hidden = ((q * 7 + k * 3) % 5 == 0) | (q == 3) | ((q >= 64) & (k < 40))",
        'tl.where(hidden, float("-inf"), 1.5 * score)',
        "tl.where(hidden, 0.0, 1.5 * d)",
        lambda s, b, h, q, k: torch.where(
            ((q * 7 + k * 3) % 5 == 0) | (q == 3) | ((q >= 64) & (k < 40)), -torch.inf, 1.5 * s
        ),
    ),
    "of the indices alone": Function(
        "", "head * 0.1 - k * 0.03", "0.0", lambda s, b, h, q, k: (h * 0.1 - k * 0.03).to(s.dtype)
    ),
}

# -------------------------------------------------------------------------------------------------------------- masks


def _document_of(column: str) -> str:
    return f"tl.load(captured[0].ptr + batch * captured[0].strides[0] + {column} * captured[0].strides[1])"


MASKS: dict[str, Mask] = {
    "documents": Mask(
        f"{_document_of('q')} == {_document_of('k')}",
        lambda b, h, q, k, ids: ids[b, q] == ids[b, k],
        lambda b, h, rows, keys: (
            torch.stack([(torch.arange(max(rows, keys)) + 25 * i).div(70, rounding_mode="floor") for i in range(b)]),
        ),
        batches=True,
    ),
    "of the head": Mask("(q + k) // 60 % 2 == head", lambda b, h, q, k: (q + k) // 60 % 2 == h, heads=True),
    "dilated": Mask("((q - k) % 3 == 0) & (q >= k)", lambda b, h, q, k: ((q - k) % 3 == 0) & (q >= k)),
    "first keys": Mask("k < 70", lambda b, h, q, k: k < 70),
    "nothing": Mask("(q >= 0) & (k < 0)", lambda b, h, q, k: (q >= 0) & (k < 0)),
    "flags of keys": Mask(
        "tl.load(captured[0].ptr + k * captured[0].strides[0]) != 0",
        lambda b, h, q, k, flags: flags[k],
        lambda b, h, rows, keys: (torch.arange(keys) % 7 != 2,),
    ),
}

# ------------------------------------------------------------------------------------------------------------ running


class Upstream(NamedTuple):
    """The gradients that come in."""

    d_output: Tensor
    d_lse: Tensor
    d_weights: Tensor | None = None


class Drawn(NamedTuple):
    """A problem, the functions in it, and the gradients that come in."""

    problem: Any
    function: Function | None
    mask: Mask | None
    upstream: Upstream


def attend(drawn: Drawn, launch_bwd: Any = backward.launch_attention_bwd) -> dict[str, Tensor]:
    """Everything that the kernels compute."""
    problem, function, _, upstream = drawn
    batch, heads, rows, _ = problem.query.shape
    keys, dtype, device = problem.key.shape[2], problem.query.dtype, problem.query.device
    output = torch.empty(batch, heads, rows, problem.value.shape[3], dtype=dtype, device=device)
    lse, statistics = (torch.empty(batch, heads, *shape, rows, device=device) for shape in ((), (2,)))
    tile_map = tile_map_for(problem)
    forward.launch_attention_fwd(problem, output, lse, statistics, tile_map)
    found = {"output": output, "lse": lse}
    delta = Delta(output, upstream.d_output, upstream.d_lse)
    d_weights = None
    if upstream.d_weights is not None:
        found["weights"] = torch.empty(batch, rows, keys, dtype=dtype, device=device)
        launch_attention_weights(problem, statistics, found["weights"], average=True)
        d_weights = WeightsGradient(upstream.d_weights, heads)
        launch_attention_weights_delta(problem, statistics, d_weights, delta.tensor)
    gradients = Gradients(*(torch.empty_like(each) for each in (problem.query, problem.key, problem.value)))
    saved = problem, upstream.d_output, statistics
    launch_bwd(*saved, delta, d_weights, gradients, tile_map)
    found |= {"d_query": gradients.d_query, "d_key": gradients.d_key, "d_value": gradients.d_value}
    if problem.bias is not None:
        found["d_bias"] = launch_attention_bias_bwd(*saved, delta.tensor, d_weights)
    if function is not None:
        for number, partial in enumerate(function.partials):
            derivative = compiled(function.text(), f"partial_{number}")
            pairs = launch_attention_captured_bwd(*saved, delta.tensor, d_weights, derivative, partial.footprint)
            found[f"d_captured_{number}"] = partial.collect(pairs, problem.score_mod.captured[number])
    return found


def expected_of(drawn: Drawn, dtype: torch.dtype, first: int = 0) -> dict[str, Tensor]:
    """The same by the formula, in ``dtype``; a bias and captured tensors stay float32 or wider. Batch entries are
    counted from ``first``."""
    problem, function, mask, upstream = drawn
    wide = torch.promote_types(dtype, torch.float32)
    leaves: dict[str, Any] = {
        f"d_{name}": getattr(problem, name).detach().to(dtype) for name in ("query", "key", "value")
    }
    if problem.bias is not None:
        leaves["d_bias"] = problem.bias.to(wide)
    captured = [] if function is None else list(problem.score_mod.captured)
    for number, tensor in enumerate(captured):
        if tensor.is_floating_point():
            captured[number] = leaves[f"d_captured_{number}"] = tensor.to(wide, copy=True)
    for leaf in leaves.values():
        leaf.requires_grad_()
    query, key, value = (leaves[f"d_{name}"] for name in ("query", "key", "value"))
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    group = heads // key.shape[1]
    b, h = first + torch.arange(batch)[:, None, None, None], torch.arange(heads)[:, None, None]
    q, k = torch.arange(rows)[:, None], torch.arange(keys)
    scores = query @ key.repeat_interleave(group, 1).mT * problem.scale
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    if function is not None:
        scores = function.eager(scores, b, h, q, k, *captured).to(dtype).expand(scores.shape)
    if problem.bias is not None:
        scores = scores + leaves["d_bias"].to(dtype)
    if problem.alibi_slopes is not None:
        scores = scores - problem.alibi_slopes[..., None, None].to(dtype) * (q + problem.shift - k).abs()
    seen = torch.ones(batch, heads, rows, keys, dtype=torch.bool)
    if problem.upper is not None:
        seen = seen & (k <= q + problem.upper)
    if problem.lower is not None:
        seen = seen & (k >= q + problem.lower)
    if problem.key_padding_mask is not None:
        seen = seen & ~problem.key_padding_mask[:, None, None]
    if mask is not None:
        seen = seen & mask.eager(b, h, q, k, *problem.mask_mod.captured)
    scores = scores.masked_fill(~seen, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    lse = torch.logsumexp(scores.masked_fill(empty, 0.0), -1).masked_fill(empty[..., 0], -torch.inf)
    p = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    if problem.seed is not None:
        keep = torch.empty(first + batch, heads, rows, keys, dtype=torch.bool)
        launch_dropout_keep(problem.seed, problem.dropout_p, keep)
        p = p * keep[first:] / (1.0 - problem.dropout_p)
    output = p @ value.repeat_interleave(group, 1)
    found = {"output": output, "lse": lse}
    outputs, gradients = [output, lse.masked_fill(empty[..., 0], 0.0)], [upstream.d_output.to(dtype), upstream.d_lse]
    if upstream.d_weights is not None:
        found["weights"] = p.mean(1)
        outputs, gradients = [*outputs, found["weights"]], [*gradients, upstream.d_weights.to(dtype)]
    pairs = [(out, gradient.to(out.dtype)) for out, gradient in zip(outputs, gradients) if out.requires_grad]
    gradients = torch.autograd.grad(
        [out for out, _ in pairs], list(leaves.values()), [d for _, d in pairs], allow_unused=True
    )
    for (name, leaf), gradient in zip(leaves.items(), gradients):
        found[name] = torch.zeros_like(leaf) if gradient is None else gradient
    return {name: tensor.detach() for name, tensor in found.items()}
