"""Calls with functions of scores and masks: their tensors, and what our backends and the reference make of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops.attention import dropout
from fastattn.ops.attention.call import make_call
from fastattn.reference import AttentionResult
from fastattn.reference import attention as reference
from fastattn.testing import attention_inputs, random_tensor
from tests.ops.attention_cases import attend, kept_weights
from tests.ops.functions_cases import ADDRESSED, MASKS, SCORES, FunctionCase, Sizes, numbers


@contextlib.contextmanager
def numbers_of_python_in(dtype: torch.dtype) -> Generator[None]:
    """Floating numbers that come of integers and of Python's numbers are at least float32, and else of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(dtype, torch.float32))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def differentiated(
    run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    leaves: Mapping[str, Tensor],
    upstream: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """What ``run`` makes of leaves, and ``d_...`` of each leaf for gradients ``upstream`` of the results."""
    own = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    found = dict(run(own))
    if upstream is None:
        return {name: tensor.detach() for name, tensor in found.items()}
    pairs = [(t, upstream[name].to(t.dtype)) for name, t in found.items() if t.requires_grad]
    d_leaves = torch.autograd.grad([t for t, _ in pairs], list(own.values()), [d for _, d in pairs], allow_unused=True)
    for (name, leaf), d_leaf in zip(own.items(), d_leaves):
        found[f"d_{name}"] = torch.zeros_like(leaf) if d_leaf is None else d_leaf
    return {name: tensor.detach() for name, tensor in found.items()}


class Call(NamedTuple):
    """A call with functions, and what else it says.

    Attributes:
        score: of :data:`SCORES` or :data:`ADDRESSED`.
        mask: of :data:`MASKS`.
        words: of :func:`fastattn.attention`, without tensors.
        more: of :data:`MORE`: further tensors.
    """

    score: str | None = None
    mask: str | None = None
    dtype: torch.dtype = torch.float32
    words: Mapping[str, Any] = {}
    more: tuple[str, ...] = ()
    sizes: Sizes = Sizes()
    kv_heads: int = 1
    of_captured: torch.dtype = torch.float32

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.words.items()]
        told = [self.score, self.mask, *words, *self.more, str(self.dtype).removeprefix("torch.")]
        told += [] if self.sizes == Sizes() else ["x".join(map(str, self.sizes))]
        told += [] if self.of_captured == torch.float32 else [f"captured {self.of_captured}"]
        return "-".join(each for each in told if each)


def _score(name: str) -> FunctionCase:
    return SCORES[name] if name in SCORES else ADDRESSED[name]


def _padding(n: Sizes) -> Tensor:
    return torch.arange(n.keys) >= torch.arange(n.keys, n.keys - 9 * n.batch, -9)[:, None]


# Further tensors of a call, by their names in the reference; floating ones have gradients.
MORE: dict[str, Callable[[Sizes], Tensor]] = {
    "bias": lambda n: numbers(n.batch, 1, n.rows, n.keys, seed=11),
    "alibi_slopes": lambda n: numbers(1, n.heads, seed=12).abs(),
    "sinks": lambda n: numbers(1, n.heads, seed=13),
    "key_padding_mask": _padding,
}


def bounds_of(call: Call) -> dict[str, Any]:
    """The bounds of causality and window as the reference has them."""
    words, n = call.words, call.sizes
    left, right = words.get("window", (None, None))
    right = 0 if words.get("is_causal") else right
    shift = n.keys - n.rows if words.get("causal_alignment") == "bottom_right" else 0
    return {
        "lower": None if left is None else shift - left, "upper": None if right is None else shift + right,
        "shift": shift,
    }  # fmt: skip


def places_of(n: Sizes) -> tuple[Tensor, ...]:
    """Batch entries, heads, rows and keys, int32, that broadcast to ``[B, H, L, S]``."""
    shapes = [[-1 if axis == own else 1 for axis in range(4)] for own in range(4)]
    return tuple(torch.arange(size, dtype=torch.int32).view(shape) for size, shape in zip(n, shapes))


class Drawn(NamedTuple):
    """The tensors of a call, of which ``leaves`` have gradients."""

    leaves: dict[str, Tensor]
    flags: dict[str, Tensor]
    captured: list[Tensor]  # of score_mod, where a leaf stands for those that have gradients
    read: tuple[Tensor, ...]  # of mask_mod
    upstream: dict[str, Tensor]


def draw(call: Call, device: Any = "cpu") -> Drawn:
    """The tensors of a call."""
    n = call.sizes
    inputs = attention_inputs(*n, 16, kv_heads=call.kv_heads, value_dim=24, dtype=call.dtype, device=device)
    leaves = dict(zip(("query", "key", "value"), inputs))
    more = {name: MORE[name](n).to(device) for name in call.more}
    leaves |= {name: t.to(call.dtype) for name, t in more.items() if t.is_floating_point()}
    captured = [t.to(device) for t in (_score(call.score).draw(n) if call.score else ())]
    leaves |= {f"captured_{i}": t.to(call.of_captured) for i, t in enumerate(captured) if t.is_floating_point()}
    read = tuple(t.to(device) for t in (MASKS[call.mask].draw(n) if call.mask else ()))
    shapes = {"output": (*n[:3], 24), "weights": (n.batch, n.rows, n.keys), "lse": n[:3]}
    upstream = {
        name: random_tensor(*shape, seed=20 + i, device=device) for i, (name, shape) in enumerate(shapes.items())
    }
    upstream["output"] = upstream["output"].to(call.dtype)
    return Drawn(leaves, {k: t for k, t in more.items() if not t.is_floating_point()}, captured, read, upstream)


def functions_of(call: Call, drawn: Drawn, leaves: Mapping[str, Tensor]) -> dict[str, Any]:
    functions: dict[str, Any] = {}
    if call.score:
        own = (leaves.get(f"captured_{i}", t) for i, t in enumerate(drawn.captured))
        functions["score_mod"] = _score(call.score).bind(*own)
    if call.mask:
        functions["mask_mod"] = MASKS[call.mask].bind(*drawn.read)
    return functions


def _names(call: Call) -> list[str]:
    """Of the results."""
    return [
        "output", *(["weights"] if call.words.get("need_weights") else []),
        *(["lse"] if call.words.get("return_lse") else []),
    ]  # fmt: skip


def of_ours(call: Call, drawn: Drawn, backend: str, seed: int = 0) -> tuple[dict[str, Tensor], Tensor | None]:
    """The results and gradients of the public function, and the weights that dropout kept."""
    kept: list[Tensor] = []

    def run(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        words: dict[str, Any] = {**functions_of(call, drawn, leaves), **call.words, **drawn.flags}
        words |= {"attn_mask" if name == "bias" else name: leaves[name] for name in call.more if name in leaves}
        for name in ("alibi_slopes", "sinks"):
            words |= {name: words[name][0]} if name in words else {}
        qkv = [leaves[name] for name in ("query", "key", "value")]
        if "dropout_p" in words:
            torch.manual_seed(seed)
            made = make_call(*qkv, **words)
            state = (
                torch.randint(0, 2**31 - 1, (2,), device=qkv[0].device)
                if backend == "triton"
                else dropout.draw(qkv[0], qkv[1].shape[2], words["dropout_p"])
            )
            kept.append(kept_weights(made, state, backend))
            torch.manual_seed(seed)
        found = attend(*qkv, **words, backend=backend)
        return dict(zip(_names(call), found if isinstance(found, tuple) else (found,)))

    found = differentiated(run, drawn.leaves, drawn.upstream)
    return found, kept[0] if kept else None


def run_reference(
    call: Call, drawn: Drawn, leaves: Mapping[str, Tensor], keep: Tensor | None = None
) -> AttentionResult:
    """The reference in the dtype of the leaves, the function itself run on all pairs at once."""
    words: dict[str, Any] = {name: t for name, t in leaves.items() if "captured" not in name}
    words |= {**drawn.flags, **bounds_of(call), **functions_of(call, drawn, leaves)}
    words |= {name: word for name, word in call.words.items() if name in ("softcap", "scale")}
    with numbers_of_python_in(leaves["query"].dtype):
        return reference(**words, dropout_keep=keep, dropout_p=call.words.get("dropout_p", 0.0))


def of_reference(call: Call, drawn: Drawn, keep: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """What :func:`of_ours` gives, by the reference; captured tensors that are wider stay so."""

    def run(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = run_reference(call, drawn, leaves, keep)
        results = {"output": found.output.to(dtype), "weights": found.weights.mean(1).to(dtype), "lse": found.lse}
        return {name: results[name] for name in _names(call)}

    def of_leaf(name: str, leaf: Tensor) -> Tensor:
        return leaf.to(torch.promote_types(leaf.dtype, dtype) if "captured" in name else dtype)

    leaves = {name: of_leaf(name, leaf) for name, leaf in drawn.leaves.items()}
    return differentiated(run, leaves, drawn.upstream)
