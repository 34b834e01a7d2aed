"""Functions of a short call in the words of plain attention: a mask, and a bias where a score_mod adds to the score.

The torch backend has fast paths for masks and biases, and a call's functions cost it many passes over the scores. Where
all pairs of a call are few, what a mask_mod says is made a mask, and what a score_mod adds to the score (``score +
table[bucket, head]``, most of those in use) a bias, differentiable in what the function captures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from fastattn.ops.attention.contract import AttentionCall, Options
from fastattn.ops.attention.functions import on_torch as functions
from fastattn.ops.attention.functions.program import Program, plain_indices
from fastattn.ops.attention.functions.writing import INDICES
from fastattn.ops.common.blocks import Block

_ADD, _SUB, _WHERE = "aten.add.Tensor", "aten.sub.Tensor", "aten.where.self"


# Elements of a mask or a bias that is made of a function, and differentiated: 16 MiB in float32, which saves training
# most of what the blocks would recompute. In evaluation tiles of rows are as fast, and need no memory.
MOST, MOST_TO_EVALUATE = 1 << 22, 1 << 20


def in_words(call: AttentionCall) -> AttentionCall:
    """The call with a mask in the place of its mask_mod and a bias in that of its score_mod, where these are not too
    large."""
    tensors = (call.query, call.key, call.value, *(() if call.score_mod is None else call.score_mod.captured))
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    most = MOST if trains else MOST_TO_EVALUATE
    if call.mask_mod is not None and _elements(call, Program.of(call.mask_mod.text)) <= most:
        call = with_mask(call)
    if call.score_mod is not None:
        program = Program.of(call.score_mod.text)
        if adds(program) and _elements(call, program) <= most:
            read = [_read(program, number, tensor) for number, tensor in enumerate(call.score_mod.captured)]
            if _has_finite_slopes(program, _places(call), read):
                bias = bias_of(program, _places(call), read, call.query.dtype)
                call = call._replace(score_mod=None, bias=bias if call.bias is None else call.bias + bias)
    return call


def _has_finite_slopes(program: Program, places: functions.Places, read: Sequence[Tensor]) -> bool:
    """Whether autograd may differentiate a score_mod in what it reads: a pair that is hidden has gradient 0, and an
    infinite slope, or one that is NaN, would make NaN of that."""
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in read)):
        return True
    score = places.batch.new_zeros((1, 1, 1, 1), dtype=torch.float32)
    own = functions.narrowed(places, [name for name in INDICES if program.depends_on(name)])
    with torch.no_grad():
        _, *slopes = functions.evaluated(program.gradient, (torch.ones_like(score), score), own, read)
    return all(bool(slope.isfinite().all()) for slope in slopes)


def bias_of(program: Program, places: functions.Places, read: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """``[b | 1, H | 1, n, s]``: what a score_mod that :func:`adds` adds to the scores of queries of this dtype."""
    nothing = places.batch.new_zeros((1, 1, 1, 1), dtype=torch.promote_types(dtype, torch.float32))
    own = functions.narrowed(places, [name for name in INDICES if program.depends_on(name)])
    bias = functions.evaluated(program, (nothing,), own, read).to(nothing.dtype)
    return bias.expand(*bias.shape[:2], places.query_index.shape[2], places.key_index.shape[3])


def _read(program: Program, number: int, tensor: Tensor) -> Tensor:
    """A captured tensor, in float64 where it is differentiated and read by indices: its gradient then adds up exactly,
    and one after the other. That of a float32 tensor torch adds up by atomics, and that of a narrower one in its own
    dtype."""
    is_summed = any(a.captured == number and not plain_indices(a.node) for a in program.accesses)
    return tensor.double() if is_summed and torch.is_grad_enabled() and tensor.requires_grad else tensor


def with_mask(call: AttentionCall) -> AttentionCall:
    """The call with a mask of all pairs in the place of its mask_mod."""
    if call.mask_mod is None:
        return call
    seen = functions.visible(_places(call), call.mask_mod.text, call.mask_mod.captured)
    return call._replace(mask_mod=None, mask=seen if call.mask is None else call.mask & seen)


def score_function(call: AttentionCall) -> Callable[..., Tensor] | None:
    """The call's score_mod for the reference."""
    function = call.score_mod
    if function is None:
        return None
    program = Program.of(function.text).function
    return lambda score, *places: program(score, *places, *function.captured)


def _places(call: AttentionCall) -> functions.Places:
    batch, heads, rows = call.query.shape[:3]
    whole = Block(slice(0, batch), slice(0, rows), slice(0, call.key.shape[2]))
    first = {name: getattr(call, name) for name in ("first_batch", "first_row", "first_key")}
    options = Options(None, None, 0, None, 1.0, 0.0, "none", "torch", **first)
    return functions.places_of(whole, heads, options, call.device)


def _elements(call: AttentionCall, program: Program) -> int:
    batch, heads, rows = call.query.shape[:3]
    return (
        (batch if program.depends_on("batch") else 1)
        * (heads if program.depends_on("head") else 1)
        * rows
        * call.key.shape[2]
    )


def adds(program: Program) -> bool:
    """Whether a score_mod only adds something to the score, ``-inf`` included."""
    return _is_sum(program.results[0])


def _is_sum(node: object) -> bool:
    """Whether a node is the score and something added to it that does not depend on it."""
    if not isinstance(node, fx.Node) or "score" not in node.meta["depends"]:
        return False
    if node.op == "placeholder":
        return True
    depend = [isinstance(each, fx.Node) and "score" in each.meta["depends"] for each in node.args]
    name = str(node.target)
    if name == _ADD and not node.kwargs:
        return depend.count(True) == 1 and _is_sum(node.args[depend.index(True)])
    if name == _SUB and not node.kwargs:
        return depend == [True, False] and _is_sum(node.args[0])
    if name == _WHERE:
        chosen, hidden = (1, 2) if depend == [False, True, False] else (2, 1)
        return depend.count(True) == 1 and not depend[0] and _is_sum(node.args[chosen]) and _hides(node.args[hidden])
    return False


def _hides(node: object) -> bool:
    """Whether a node is the constant ``-inf``."""
    is_constant = isinstance(node, fx.Node) and str(node.target) == "aten.full_like.default"
    return is_constant and node.args[1] == float("-inf")  # type: ignore[union-attr]
