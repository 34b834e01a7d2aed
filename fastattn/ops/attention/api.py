"""The public functions: exact softmax attention, and torch's own spelling of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from fastattn.ops.attention import direct, on_torch, on_triton
from fastattn.ops.attention.call import make_call
from fastattn.ops.attention.contract import Alignment, Arguments, AttentionCall, MaskMod, ScoreMod
from fastattn.ops.attention.functions.contract import ModifiedCall, modified_call
from fastattn.ops.attention.jagged import attention_jagged
from fastattn.ops.common import backends
from fastattn.ops.common.row_short_way import RowShortWay
from fastattn.ops.common.sharded import Axes, are_sharded, on_local
from fastattn.ops.common.short_way import ShortWay, lies_with_kernels
from fastattn.ops.common.tracing import is_symbolically_traced, recorded


def _short_of_arguments() -> RowShortWay:
    from fastattn.ops.attention import short  # imports triton

    return short.OF_ARGUMENTS


def _short_of_call() -> RowShortWay:
    from fastattn.ops.attention import short  # imports triton

    return short.OF_CALL


def _short_of_modified() -> RowShortWay:
    from fastattn.ops.attention import short  # imports triton

    return short.OF_MODIFIED


_ARGUMENTS = ShortWay(_short_of_arguments, Arguments, casts=3)
_CALLS = ShortWay(_short_of_call, AttentionCall)
_MODIFIED = ShortWay(_short_of_modified, ModifiedCall)
_TENSORS = AttentionCall._fields.index("lower")  # so many fields of a call are tensors, the first of them


def run(call: AttentionCall, backend: backends.Backend | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(output, weights or None, lse or None)`` of a validated call on the backend that ``backends.choose`` names."""
    signature = None
    if lies_with_kernels(call.query) and not call.is_modified:
        values = call[:_TENSORS]
        signature = _CALLS.key(values, (*call[_TENSORS:], backend))
        if signature is not None and (entry := _CALLS.find(signature, call)) is not None:
            return _results(call, entry(values))
    chosen = backends.choose(call, backend, on_triton.refusals)
    if signature is not None and chosen == "triton":
        _CALLS.remember(signature)
    return _run(call, chosen)


def _run(call: AttentionCall, backend: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """:func:`run` on this backend."""
    if are_sharded(call.query):
        return _run_on_local(call, backend)
    # A branch and not a table of modules: torch.compile follows it without guarding on module attributes.
    if backend != "triton":
        return on_torch.run(call)
    if not call.is_modified:
        return on_triton.run(call)
    values, words = modified_call(call)
    signature = _MODIFIED.key(values, words)
    if signature is not None and (entry := _MODIFIED.find(signature, values + words)) is not None:
        return _results(call, entry(values))
    found = on_triton.run(call)
    if signature is not None:
        _MODIFIED.remember(signature)
    return found


# What of a call may be cut: batch entries, and heads, of which those of keys may be fewer.
_AXES: dict[str, Axes] = {
    "query": ("batch", "heads", None, None),
    "key": ("batch", "heads", None, None),
    "value": ("batch", "heads", None, None),
    "bias": ("batch", "heads", None, None),
    "alibi_slopes": ("batch", "heads"),
    "sinks": ("batch", "heads"),
    "mask": ("batch", "heads", None, None),
    "key_padding_mask": ("batch", None),
    "query_documents": ("batch", None),
    "key_documents": ("batch", None),
    "prefix": ("batch",),
}


# What a user calls them.
_SHOWN = {"bias": "attn_mask", "mask": "attn_mask", "query_documents": "document_ids", "key_documents": "document_ids"}


def _run_on_local(call: AttentionCall, backend: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """:func:`run` of DTensors, on this backend."""
    if call.is_modified:
        raise NotImplementedError(
            "score_mod or mask_mod of DTensors: expected plain tensors, since a function would be told places in shards"
        )

    def function(**own: Any) -> tuple[Tensor | None, ...]:
        return _run(AttentionCall(**own), backend)

    weights = {"none": None, "average": ("batch", None, None), "heads": ("batch", "heads", None, None)}[call.weights]
    results = ("batch", "heads", None, None), weights, ("batch", "heads", None)
    averaged = (1, "heads") if call.weights == "average" else None
    output, weights, lse = on_local(function, _AXES, call._asdict(), results, averaged, call.dropout_p, _SHOWN)
    return output, weights, lse


def _results(call: AttentionCall, found: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(output, weights or None, lse or None)`` of what the short way has returned."""
    output, *rest = found if isinstance(found, tuple) else (found,)
    weights = rest.pop(0) if call.weights != "none" else None
    return output, weights, rest.pop() if call.return_lse else None


def _run_in_graph(
    query: Tensor, key: Tensor, value: Tensor, words: dict[str, Any], backend: backends.Backend | None
) -> Tensor | tuple[Tensor, ...]:
    """A call with functions, inside ``torch.compile``."""
    from fastattn.ops.attention.functions import in_graphs  # imports the tracer

    functions = {kind: words.pop(kind) for kind in ("score_mod", "mask_mod")}
    call = make_call(query, key, value, **words)
    found = in_graphs.run(call, **functions, backend=backend)
    return found[0] if len(found) == 1 else found


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: Alignment = "top_left",
    window: tuple[int | None, int | None] | None = None,
    prefix: int | Tensor | None = None,
    document_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    need_weights: bool = False,
    average_attn_weights: bool = True,
    return_lse: bool = False,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    backend: backends.Backend | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Exact softmax attention in memory linear in the sequence length (arXiv:2205.14135, arXiv:2307.08691).

    Arguments are named and mean what they do in ``F.scaled_dot_product_attention`` (``attn_mask``: True = may attend)
    and, where it has none, in ``nn.MultiheadAttention`` (``key_padding_mask``: True = padding).
    All masks combine: a key is seen where every one of them allows it. Every argument combines with every other.

    Args:
        query: ``[B, H, L, D]``, float16, bfloat16, float32 or float64; any strides, read as it lies.
        key: ``[B, Hk, S, D]``. ``Hk`` divides ``H``: query head ``h`` reads key head ``h // (H // Hk)``.
        value: ``[B, Hk, S, Dv]``.
        attn_mask: boolean (True = may attend) or floating (added to the scaled scores; ``-inf`` forbids),
            broadcastable to ``[B, H, L, S]``; never expanded.
        key_padding_mask: boolean ``[B, S]``, True = padding.
        is_causal: query ``i`` sees keys ``j <= i`` (``top_left``) or ``j <= i + S - L`` (``bottom_right``).
        causal_alignment: where query ``i`` stands among the keys, for causality, windows and ALiBi: at key ``i``
            (``"top_left"``, as in torch), or at key ``i + S - L`` (``"bottom_right"``, as decoding needs).
        window: ``(left, right)``: query ``i``, standing at key ``p``, sees keys ``p - left`` to ``p + right``; None for
            a side without a limit.
        prefix: this many keys, the first ones, are visible to every query in spite of causality and window; an int, or
            an integer tensor ``[B]``.
        document_ids: integers ``[B, L]``, or, where ``L`` is not ``S``, a pair of them: of queries
            ``[B, L]`` and of keys ``[B, S]``. A query sees keys of its own document alone. A batch of 1 broadcasts.
        alibi_slopes: floating ``[H]`` or ``[B, H]``: ``-slope * |p - j|`` is added to the scores of a query that
            stands at key ``p`` (arXiv:2108.12409). Differentiable.
        softcap: scaled scores become ``softcap * tanh(scores / softcap)`` before anything is added to them
            (arXiv:2408.00118).
        sinks: floating ``[H]``: one more score in every row's softmax, unscaled and without a value
            (arXiv:2309.17453). Differentiable; ``-inf`` is none.
        scale: multiplies the scores before softmax; default ``1/sqrt(D)``.
        dropout_p: probability of dropping a weight. Applied whenever it is not 0: pass 0 in evaluation.
        need_weights: also return the weights, after dropout, differentiable.
        average_attn_weights: the weights averaged over heads, in memory O(B L S), instead of one set a head.
        return_lse: also return the log-sum-exp of the scores, natural log, differentiable; for merging partial results.
        score_mod: a function of a score and of where it stands, ``score_mod(score, batch, head, query_index,
            key_index)``, numbers all of them, that returns what becomes of the score, behind scale and softcap and
            before anything is added. ``-inf`` hides the pair. It is FlexAttention's (arXiv:2412.05496): it may do
            arithmetic, compare, choose by ``torch.where``, and read tensors that it captures by integer indices
            (``table[head, query_index - key_index]``), which get their gradients. Or a tuple of such a function and of
            tensors that it takes behind its other arguments. See docs/cookbook.md.
        mask_mod: a function of the last four that returns True where the query may see the key.
        backend: ``"auto"`` (kernels where they run, but in graphs that others will run: ``torch.export`` and the like),
            ``"triton"`` or ``"torch"``; default what :func:`fastattn.use_backend` or the environment variable
            ``FASTATTN_BACKEND`` says.

    Returns:
        The output ``[B, H, L, Dv]`` in ``query.dtype``, or a tuple of it, then the weights (``[B, L, S]`` averaged,
        ``[B, H, L, S]`` not) if asked for, then the LSE (``[B, H, L]``, at least float32) if asked for. A row that may
        see no key is zero, its LSE is ``-inf`` or its head's sink, and its gradients are zero.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, devices or numbers do not fit; the message shows them.
        NotImplementedError: the backend asked for by name refuses; the message lists its reasons.
    """
    is_modified = score_mod is not None or mask_mod is not None
    has_few = (
        prefix is document_ids is softcap is sinks is None
        and type(dropout_p) is float
        and dropout_p == 0.0
        and not (need_weights or return_lse or is_modified)
    )
    has_fewest = has_few and window is alibi_slopes is None
    if has_few and attn_mask is None and causal_alignment in ("top_left", "bottom_right"):
        output = None
        if has_fewest:
            output = direct.attend_plainly(query, key, value, key_padding_mask, is_causal, scale, backend)
        elif key_padding_mask is None:
            output = direct.attend_by_difference(query, key, value, is_causal, window, alibi_slopes, scale, backend)
        if output is not None:
            return output
    signature = None
    if lies_with_kernels(query) and not is_modified:
        values = query, key, value, attn_mask, key_padding_mask, window, prefix, document_ids, alibi_slopes, sinks
        numbers = (
            is_causal, causal_alignment, softcap, scale, dropout_p, need_weights, average_attn_weights, return_lse,
            backend,
        )  # fmt: skip
        signature = _ARGUMENTS.key(values, numbers)
        if signature is not None and (entry := _ARGUMENTS.find(signature, values + numbers)) is not None:
            return entry(values)
    if has_fewest:
        output = direct.attend(
            query, key, value, attn_mask, key_padding_mask, is_causal, causal_alignment, scale, backend
        )
        if output is not None:
            return output
    words = {
        "attn_mask": attn_mask,
        "key_padding_mask": key_padding_mask,
        "is_causal": is_causal,
        "causal_alignment": causal_alignment,
        "window": window,
        "prefix": prefix,
        "document_ids": document_ids,
        "alibi_slopes": alibi_slopes,
        "softcap": softcap,
        "sinks": sinks,
        "scale": scale,
        "dropout_p": dropout_p,
        "need_weights": need_weights,
        "average_attn_weights": average_attn_weights,
        "return_lse": return_lse,
        "score_mod": score_mod,
        "mask_mod": mask_mod,
    }
    if has_torch_function_variadic(query, key, value) and is_symbolically_traced(query, key, value):
        return recorded(attention, query, key, value, **words, backend=backend)
    if isinstance(query, Tensor) and query.layout is torch.jagged:
        return attention_jagged(query, key, value, words, backend)
    if is_modified and torch.compiler.is_dynamo_compiling():
        return _run_in_graph(query, key, value, words, backend)
    call = make_call(query, key, value, **words)
    chosen = backends.choose(call, backend, on_triton.refusals)
    output, weights, lse = _run(call, chosen)
    if signature is not None and chosen == "triton":
        _ARGUMENTS.remember(signature)
    if weights is None and lse is None:
        return output
    return tuple(t for t in (output, weights, lse) if t is not None)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, argument for argument, on this package's backends.

    Args:
        query: ``[..., H, L, D]``: any number of leading dimensions, none included.
        key: ``[..., Hk, S, D]``; leading dimensions broadcast, as in torch.
        value: ``[..., Hk, S, Dv]``.
        attn_mask: boolean (True = may attend) or of the query's dtype (added), broadcastable to the scores.
        dropout_p: probability of dropping a weight; applied whenever it is not 0, as in torch.
        is_causal: query ``i`` sees keys ``j <= i``. Not together with ``attn_mask``, as in torch.
        scale: multiplies the scores before softmax; default ``1/sqrt(D)``.
        enable_gqa: allow fewer key heads than query heads.

    Returns:
        ``[..., H, L, Dv]``. A row that may see no key is zero.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`attention`.
        RuntimeError: ``is_causal`` together with ``attn_mask`` (torch's own error type).
    """
    if has_torch_function_variadic(query, key, value) and is_symbolically_traced(query, key, value):
        masks = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
        return recorded(scaled_dot_product_attention, query, key, value, **masks, scale=scale, enable_gqa=enable_gqa)
    if is_causal and attn_mask is not None:
        raise RuntimeError("is_causal=True with an attn_mask: torch refuses both; fastattn.attention combines them")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() < 2:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected at least [length, head_dim]")
    if query.dim() == key.dim() == value.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]:
        lead = query.shape[:2]
    else:
        lead, query, key, value = _to_four_dimensions(query, key, value, enable_gqa)
        if attn_mask is not None and attn_mask.dim() > 2:
            mask_shape = (*lead, *attn_mask.shape[-2:])
            attn_mask = attn_mask.expand(mask_shape).reshape(*query.shape[:2], *attn_mask.shape[-2:])
    output = attention(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale)
    assert isinstance(output, Tensor)
    return output.reshape(*lead, *output.shape[-2:])


def _to_four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
    """The output's leading shape, then the three as ``[B, H, length, size]``, their leading dimensions broadcast."""
    tensors = [t[(None,) * max(0, 3 - t.dim())] for t in (query, key, value)]
    heads = [t.shape[-3] for t in tensors]
    if enable_gqa:
        batch = torch.broadcast_shapes(*(t.shape[:-3] for t in tensors))
        leads = [(*batch, h) for h in heads]
    else:
        try:
            leads = [torch.broadcast_shapes(*(t.shape[:-2] for t in tensors))] * 3
        except RuntimeError as error:
            shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
            raise ValueError(
                f"query, key, value have shapes {shapes}: expected leading dimensions that broadcast "
                "(enable_gqa=True allows fewer key heads than query heads)"
            ) from error
        batch = leads[0][:-1]
    flat = 1
    for size in batch:
        flat *= size
    tensors = [t.expand(*lead, *t.shape[-2:]).reshape(flat, lead[-1], *t.shape[-2:]) for t, lead in zip(tensors, leads)]
    lead = () if query.dim() == 2 else tuple(leads[0])
    return lead, tensors[0], tensors[1], tensors[2]
