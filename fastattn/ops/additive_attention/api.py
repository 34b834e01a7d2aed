"""The public function: additive attention, whose scores are a small network's and not products."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import has_torch_function_variadic

from fastattn.ops.additive_attention import direct, on_torch, on_triton
from fastattn.ops.additive_attention.call import make_call
from fastattn.ops.additive_attention.contract import AdditiveAttentionCall
from fastattn.ops.common import backends
from fastattn.ops.common.row_short_way import RowShortWay
from fastattn.ops.common.sharded import Axes, are_sharded, on_local
from fastattn.ops.common.short_way import ShortWay, lies_with_kernels
from fastattn.ops.common.tracing import is_symbolically_traced, recorded


def _short() -> RowShortWay:
    from fastattn.ops.additive_attention import short  # imports triton

    return short.OF_CALL


_CALLS = ShortWay(_short, AdditiveAttentionCall)
_TENSORS = AdditiveAttentionCall._fields.index("upper")  # so many fields of a call are tensors, the first of them


def _run(call: AdditiveAttentionCall, backend: backends.Backend | None) -> tuple[Tensor, Tensor | None]:
    """``(output, weights or None)`` of a call on the backend that is chosen."""
    signature = None
    if lies_with_kernels(call.query):
        values = call[:_TENSORS]
        signature = _CALLS.key(values, (*call[_TENSORS:], backend))
        if signature is not None and (entry := _CALLS.find(signature, call)) is not None:
            found = entry(values)
            return found if isinstance(found, tuple) else (found, None)
    if backends.choose(call, backend, on_triton.refusals) == "triton":
        if signature is not None:
            _CALLS.remember(signature)
        return on_triton.run(call)
    return on_torch.run(call)


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    need_weights: bool = False,
    average_attn_weights: bool = True,
    backend: backends.Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Additive attention (Bahdanau's, arXiv:1409.0473) without its ``[B, H, L, S, A]`` intermediate.

    ``score(i, j) = sum_a weight_a tanh(query_ia + key_ja)``, softmax over ``j``, and the weighted sum of the values:
    with ``query = W s`` and ``key = U h`` it is the lecture's alignment function.

    Memory, where no weights are asked for: on the kernels the forward makes nothing of size ``L S``, and the backward
    two such tensors a head, the scores' gradient in float32 and the weights in ``query.dtype``. On the torch backend
    both make the scores in blocks of rows and the intermediate in pieces of a block, at most 2^18 elements of either on
    a CPU and 2^24 on a GPU or those of one row, and keep nothing but their inputs; but a CPU call in float32 or float64
    of up to 2^21 elements, or with up to 4 queries in training, is the plain formula, quicker by far, and in training
    keeps them.

    Args:
        query: ``[B, L, A]`` or ``[B, H, L, A]``, float16, bfloat16, float32 or float64, projected already; any strides.
        key: ``[B, S, A]`` or ``[B, H, S, A]``, projected already.
        value: ``[B, S, Dv]`` or ``[B, H, S, Dv]``.
        weight: ``[A]``, or ``[H, A]``: one for each head.
        attn_mask: boolean (True = may attend) or floating (added to the scores; ``-inf`` forbids), broadcastable to
            the scores, ``[B, L, S]`` or ``[B, H, L, S]``; never expanded.
        key_padding_mask: boolean ``[B, S]``, True = padding.
        is_causal: query ``i`` sees keys ``j <= i``.
        need_weights: also return the weights, differentiable.
        average_attn_weights: the weights averaged over heads. One set a head is made first, unlike in
            :func:`fastattn.attention`.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; default what :func:`fastattn.use_backend` or the environment
            variable ``FASTATTN_BACKEND`` says.

    Returns:
        The output ``[B, L, Dv]`` or ``[B, H, L, Dv]`` in ``query.dtype``, or a tuple of it and the weights. These are
        ``[B, L, S]`` of three-dimensional calls and where averaged, else ``[B, H, L, S]``. A row that may see no key is
        zero, and so are its gradients.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices do not fit; the message shows them.
        NotImplementedError: the backend asked for by name refuses; the message lists its reasons.
    """
    if attn_mask is None and is_causal is False and type(need_weights) is type(average_attn_weights) is bool:
        found = direct.attend(query, key, value, weight, key_padding_mask, backend)
        if found is not None:
            return found if need_weights else found[0]
    words = {
        "attn_mask": attn_mask,
        "key_padding_mask": key_padding_mask,
        "is_causal": is_causal,
        "need_weights": need_weights,
        "average_attn_weights": average_attn_weights,
    }
    if has_torch_function_variadic(query, key, value) and is_symbolically_traced(query, key, value):
        return recorded(additive_attention, query, key, value, weight, **words, backend=backend)
    if are_sharded(query):
        return _attend_on_local({"query": query, "key": key, "value": value, "weight": weight, **words}, backend)
    call = make_call(query, key, value, weight, **words)
    output, weights = _run(call, backend)
    if query.dim() == 3:
        output, weights = output.squeeze(1), None if weights is None else weights.squeeze(1)
    elif weights is not None and average_attn_weights:
        weights = weights.mean(dim=1)
    return output if weights is None else (output, weights)


def _attend_on_local(words: dict[str, Any], backend: backends.Backend | None) -> Any:
    """:func:`additive_attention` of DTensors: batch entries and heads may be cut."""
    has_heads = words["query"].dim() == 4
    scores: Axes = ("batch", "heads", None, None) if has_heads else ("batch", None, None)
    axes: dict[str, Axes] = dict.fromkeys(("query", "key", "value", "attn_mask"), scores)
    axes |= {"weight": ("heads", None), "key_padding_mask": ("batch", None)}
    is_average = has_heads and bool(words["average_attn_weights"])

    def function(**own: Any) -> tuple[Any, ...]:
        found = additive_attention(**own, backend=backend)
        return found if isinstance(found, tuple) else (found,)

    results = [scores, ("batch", None, None) if is_average else scores]
    found = on_local(function, axes, words, results, (1, "heads") if is_average else None)
    return found if words["need_weights"] else found[0]
