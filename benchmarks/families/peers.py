"""What others offer for a case of attention, each pinned, and what of it is at hand here.

A variant refuses what it cannot take and says why; none falls back to another kernel, whose time would then be its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import AttentionCase, Case
from benchmarks.families.masks import SOFTCAP, inputs, masks, step, window
from benchmarks.variants import Refused, Step, Variant
from fastattn.ops.attention.call import make_call
from fastattn.ops.attention.contract import AttentionCall
from fastattn.reference import distances, visibility

# Above this many scores a variant that makes them all is not worth its minutes: a training step of 2^27 took 7 s on a
# CPU's core
_MOST_SCORES = {"cpu": 1 << 25, "cuda": 1 << 30}

_IN_WORDS_OF_SDPA = ("none", "causal", "boolean", "sparse", "bias")

Build = Callable[[AttentionCase, torch.dtype], Step]
Applies = Callable[[AttentionCase], str | None]


# ------------------------------------------------------------------------------------------------------ what is at hand


def not_at_hand(module: str, package: str, case: Case) -> str | None:
    """Why a package of CUDA kernels cannot be used for a case, or None."""
    if importlib.util.find_spec(module) is None:
        return f"{package} is not installed"
    return None if _device(case) == "cuda" else "needs a CUDA device"


def imported(module: str, package: str) -> Any:
    """The module; one that is there and does not load, as kernels built for another torch do not, is refused."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Refused(f"{package} is installed, but does not load: {_in_a_line(str(error))}") from error


def cannot_compile(case: Case) -> str | None:
    """Why ``torch.compile`` can make no code for a case's device, or None."""
    if _device(case) != "cpu":
        return None if importlib.util.find_spec("triton") else "torch.compile needs triton, which is not installed"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # where torch looks
    if shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler: {compiler} is not on the path (the variable CXX names another)"
    return None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a function, with nothing left over from its like.

    Of all functions of one code object torch keeps eight graphs, and then runs the next eagerly: every case gets a code
    object of its own. ``torch.compiler.reset`` would make room too, but throw away what other variants have compiled.
    """
    code = function.__code__.replace()
    own = types.FunctionType(code, function.__globals__, None, function.__defaults__, function.__closure__)
    return torch.compile(own, dynamic=False, fullgraph=True)


def no_weights(case: AttentionCase) -> str | None:
    """Why what only gives the output cannot take a case, or None."""
    return "returns no weights" if case.weights else None


def too_many_scores(case: AttentionCase) -> str | None:
    """Why what makes every score does not take a case, or None."""
    scores, device = case.batch * case.heads * case.seqlen**2, _device(case)
    most = _MOST_SCORES.get(device, _MOST_SCORES["cuda"])
    return f"makes all {scores} scores: on {device} only up to {most} are taken" if scores > most else None


def _device(case: Case) -> str:
    return torch.device(case.device).type


def _in_a_line(text: str) -> str:
    return " ".join(text.split())[:300]


# ----------------------------------------------------------------------------------------------------------------- SDPA


def sdpa(case: AttentionCase, dtype: torch.dtype) -> Step:
    """``F.scaled_dot_product_attention`` as it picks its kernel itself."""
    return step(_attend_sdpa(case, dtype), inputs(case, dtype), case)


def sdpa_applies(case: AttentionCase) -> str | None:
    """Why SDPA cannot take a case, or None."""
    return "SDPA has no softcap" if case.mask == "softcap" else no_weights(case)


def _attend_sdpa(case: AttentionCase, dtype: torch.dtype) -> Callable[..., tuple[Tensor, ...]]:
    arguments = _in_words_of_sdpa(case, dtype)
    return lambda *qkv: (F.scaled_dot_product_attention(*qkv, **arguments),)


def _in_words_of_sdpa(case: AttentionCase, dtype: torch.dtype) -> dict[str, Any]:
    """What rules the scores, a mask made whole where SDPA has no word for it."""
    arguments = masks(case, dtype)
    if case.mask in _IN_WORDS_OF_SDPA:
        return arguments
    query, key, value, _ = inputs(case, dtype)
    return {"attn_mask": whole_mask(make_call(query, key, value, **arguments))}


def _mask_mib(case: AttentionCase) -> float:
    """Of a mask that the case does not give, but SDPA needs."""
    mask = _in_words_of_sdpa(case, case.dtype).get("attn_mask")
    return 0.0 if mask is None or case.mask in _IN_WORDS_OF_SDPA else mask.nbytes / 2**20


def whole_mask(call: AttentionCall) -> Tensor | None:
    """All that a call adds to its scores and hides, but softcap and sinks, as one mask in the shape of the scores.

    It is boolean where the call only hides, of the query's dtype where it adds, and None where it does neither.
    """
    rows, keys = call.query.shape[2], call.key.shape[2]
    names = ("lower", "upper", "prefix", "mask", "key_padding_mask", "query_documents", "key_documents")
    rules = {name: getattr(call, name) for name in names}
    bias = call.bias
    if call.alibi_slopes is not None:
        slopes = call.alibi_slopes[..., None, None]
        alibi = -slopes * distances(rows, keys, call.shift, call.device)
        bias = alibi if bias is None else bias + alibi
    bias = bias if bias is None else bias.to(call.query.dtype)
    if all(rule is None for rule in rules.values()):
        return bias
    visible = visibility(rows, keys, **rules, device=call.device)
    return visible if bias is None else torch.where(visible, bias, float("-inf"))


def _sdpa_pinned(kind: str, backend: SDPBackend) -> Variant[AttentionCase]:
    def build(case: AttentionCase, dtype: torch.dtype) -> Step:
        attend = _attend_sdpa(case, dtype)

        def function(*qkv: Tensor) -> tuple[Tensor, ...]:
            with sdpa_kernel(backend):
                return attend(*qkv)

        # Here and not in each step, whose time it would lengthen: torch gives its reasons as warnings
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                made = step(function, inputs(case, dtype), case)
                made()
            except RuntimeError as error:
                if not str(error).startswith(("No available kernel", "No viable backend")):
                    raise
                why = _reasons(kind, [str(warning.message) for warning in said])
                raise Refused(f"torch has no {kind} kernel for it{why and ': '}{why}") from None
        return made

    def applies(case: AttentionCase) -> str | None:
        if _device(case) == "cpu" and kind in ("efficient", "cudnn"):
            return f"torch has no {kind} kernel on a CPU"
        return sdpa_applies(case) or (too_many_scores(case) if kind == "math" else None)

    return Variant(f"sdpa-{kind}", build, applies, holds=_mask_mib)


def _reasons(kind: str, said: list[str]) -> str:
    """Of what torch warns when no kernel is left, the part under this kernel's heading; the others are switched off."""
    reasons, under_its_heading = [], False
    for message in said:
        message = message.split("(Triggered internally")[0].strip()
        if "not used because" in message:
            under_its_heading = kind in message.lower()
        elif under_its_heading:
            reasons.append(message)
    return _in_a_line("; ".join(reasons))


# -------------------------------------------------------------------------------------------------------- FlexAttention


def _flex(case: AttentionCase, dtype: torch.dtype) -> Step:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    arguments = masks(case, dtype)
    names = ("attn_mask", "key_padding_mask", "document_ids", "alibi_slopes")
    mask, padding, documents, slopes = (arguments.get(name, torch.empty(0)) for name in names)
    left = window(case)
    hides: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
        "padding": lambda b, h, i, j: ~padding[b, j],
        "boolean": lambda b, h, i, j: mask[i, j],
        "sparse": lambda b, h, i, j: mask[i, j],
        "documents": lambda b, h, i, j: (i >= j) & (documents[b, i] == documents[b, j]),
        "window": lambda b, h, i, j: (i >= j) & (i - j <= left),
        **dict.fromkeys(("causal", "alibi", "softcap"), lambda b, h, i, j: i >= j),
    }
    changes: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
        "bias": lambda score, b, h, i, j: score + mask[0, h, i, j],
        "alibi": lambda score, b, h, i, j: score - slopes[h] * (i - j).abs(),
        "softcap": lambda score, b, h, i, j: SOFTCAP * torch.tanh(score / SOFTCAP),
    }
    block_mask = None
    if case.mask in hides:
        batch = case.batch if case.mask in ("padding", "documents") else None
        block_mask = create_block_mask(hides[case.mask], batch, None, case.seqlen, case.seqlen, device=case.device)
    change = changes.get(case.mask)

    def function(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return (flex_attention(query, key, value, block_mask=block_mask, score_mod=change),)

    return step(compiled(function), inputs(case, dtype), case)


def _flex_applies(case: AttentionCase) -> str | None:
    if case.backward and _device(case) == "cpu":
        return "FlexAttention has no backward on a CPU"
    return no_weights(case) or cannot_compile(case)


# --------------------------------------------------------------------------------------- packages, over [B, L, H, D]


def _flash(module: str, package: str) -> Build:
    def build(case: AttentionCase, dtype: torch.dtype) -> Step:
        attend = imported(module, package).flash_attn_func
        words = masks(case, dtype)
        words["causal"] = words.pop("is_causal", False)
        if "window" in words:
            words["window_size"] = (words.pop("window")[0], 0)

        def function(*qkv: Tensor) -> tuple[Tensor, ...]:
            result = attend(*(t.transpose(1, 2) for t in qkv), **words)
            # The third version's beta returns the log-sum-exp too
            output = result[0] if isinstance(result, tuple) else result
            return (output.transpose(1, 2),)

        return step(function, inputs(case, dtype), case)

    return build


def _flash_applies(module: str, package: str, *known: str) -> Applies:
    def applies(case: AttentionCase) -> str | None:
        if (reason := not_at_hand(module, package, case) or no_weights(case)) is not None:
            return reason
        if case.dtype not in (torch.float16, torch.bfloat16):
            return f"takes float16 and bfloat16, not {case.dtype_name}"
        if case.head_dim > 256:
            return f"head_dim={case.head_dim}: it takes up to 256"
        return None if case.mask in known else f"flash_attn_func has no {case.mask} mask"

    return applies


def _xformers(case: AttentionCase, dtype: torch.dtype) -> Step:
    ops = imported("xformers.ops", "xformers")
    words = _in_words_of_sdpa(case, dtype)
    bias = ops.LowerTriangularMask() if "is_causal" in words else words.get("attn_mask")
    if isinstance(bias, Tensor):  # added to the scores, and of their whole shape
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=dtype).masked_fill(~bias, float("-inf"))
        bias = bias.expand(case.batch, case.heads, case.seqlen, case.seqlen)

    def function(*qkv: Tensor) -> tuple[Tensor, ...]:
        try:
            output = ops.memory_efficient_attention(*(t.transpose(1, 2) for t in qkv), attn_bias=bias)
        except NotImplementedError as error:  # none of its kernels can, and the message says why of each
            raise Refused(_in_a_line(str(error))) from error
        return (output.transpose(1, 2),)

    return step(function, inputs(case, dtype), case)


def _xformers_applies(case: AttentionCase) -> str | None:
    if (reason := not_at_hand("xformers", "xformers", case) or no_weights(case)) is not None:
        return reason
    return "xformers has no softcap" if case.mask == "softcap" else None


def _flash_variant(package: str, module: str, *known: str) -> Variant[AttentionCase]:
    return Variant(package, _flash(module, package), _flash_applies(module, package, *known))


VARIANTS: tuple[Variant[AttentionCase], ...] = (
    Variant("sdpa", sdpa, sdpa_applies, holds=_mask_mib),
    _sdpa_pinned("flash", SDPBackend.FLASH_ATTENTION),
    _sdpa_pinned("efficient", SDPBackend.EFFICIENT_ATTENTION),
    _sdpa_pinned("cudnn", SDPBackend.CUDNN_ATTENTION),
    _sdpa_pinned("math", SDPBackend.MATH),
    Variant("flex", _flex, _flex_applies, slow=True),
    _flash_variant("flash-attn", "flash_attn", "none", "causal", "window", "softcap", "alibi"),
    _flash_variant("flash-attn-3", "flash_attn_interface", "none", "causal", "window", "softcap"),
    Variant("xformers", _xformers, _xformers_applies, holds=_mask_mib),
)
