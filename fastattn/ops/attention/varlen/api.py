"""The public function over packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from fastattn.ops.attention.contract import Alignment, MaskMod, ScoreMod
from fastattn.ops.attention.varlen import modified, on_torch, on_triton
from fastattn.ops.attention.varlen.call import make_call
from fastattn.ops.common import backends
from fastattn.ops.common.tracing import is_symbolically_traced, recorded


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: Alignment = "top_left",
    window: tuple[int | None, int | None] | None = None,
    prefix: int | Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    need_weights: bool = False,
    return_lse: bool = False,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    backend: backends.Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention within each of ``N`` sequences of unequal length that lie packed behind one another.

    No row attends across sequences, and nothing is computed for padding. Rows and keys are counted from the beginning
    of their sequence, and where :func:`fastattn.attention` has an axis for the batch, this has one for the sequences.

    Args:
        query: ``[T, H, D]``, float16, bfloat16, float32 or float64; any strides.
        key: ``[Tk, Hk, D]``; ``Hk`` divides ``H``, and query head ``h`` reads head ``h // (H // Hk)``.
        value: ``[Tk, Hk, Dv]``.
        cu_seqlens_q: int32 ``[N + 1]``, from 0, ascending: sequence ``n`` has the rows from ``cu_seqlens_q[n]`` to
            before ``cu_seqlens_q[n + 1]``. Rows behind the last sequence take no part. On the CPU the numbers are
            checked.
        cu_seqlens_k: the same for keys; default those of the queries. A sequence may have no rows, or no keys.
        max_seqlen_q: at least the number of rows of the longest sequence. It is not needed; on the CPU it is checked.
        max_seqlen_k: the same for keys.
        seqused_k: int32 ``[N]``: so many first keys of each sequence are in use, and the others take no part; default
            all.
        attn_mask: boolean (True = may attend) or floating (added to the scores; ``-inf`` forbids), by positions inside
            a sequence: broadcastable to ``[N, H, rows, keys]`` of the longest.
        is_causal: row ``i`` sees keys ``j <= i``.
        causal_alignment: ``"top_left"``, or ``"bottom_right"``: in every sequence the last row stands at the last key
            in use. It also places ``window`` and ``alibi_slopes``.
        window: ``(left, right)``: how many keys are seen on either side of a row's own position, None for all.
        prefix: an int, or integer ``[N]``: so many first keys of a sequence are seen whatever causality and window say.
        alibi_slopes: floating ``[H]`` or ``[N, H]``: ``-slope * |position - j|`` is added (ALiBi, arXiv:2108.12409).
        softcap: scores become ``softcap * tanh(score / softcap)`` before anything is added (arXiv:2408.00118).
        sinks: floating ``[H]``: a score of its own in every row's softmax, without a value (arXiv:2309.17453).
        scale: multiplies the products of queries and keys; default ``1/sqrt(D)``.
        dropout_p: probability of dropping a weight; applied whenever it is not 0.
        need_weights: refused if True, since the weights of packed sequences have no common shape.
        return_lse: also return the LSE, the logarithm of each row's sum of exponentials, differentiable.
        score_mod: as of :func:`fastattn.attention`; ``batch`` is the number of the sequence, and both indices count
            from its beginning.
        mask_mod: likewise. With either, sequences are told apart by a mask over all packed rows and keys, which takes
            work in proportion to their number on the device, though no score is computed across sequences.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; default what :func:`fastattn.use_backend` or the environment
            variable ``FASTATTN_BACKEND`` says. On a GPU the torch backend waits for the offsets.

    Returns:
        The output ``[T, H, Dv]`` in ``query.dtype``, or a tuple of it and the LSE ``[H, T]``, at least float32. A row
        without a key to see is zero, its LSE is ``-inf`` or its head's sink. What rows behind the last sequence hold is
        unspecified; their gradients, and those of keys out of use, are zero.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, devices or numbers do not fit; the message shows them.
        NotImplementedError: the backend asked for by name refuses; the message lists its reasons.
    """
    words = {
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "seqused_k": seqused_k,
        "attn_mask": attn_mask,
        "is_causal": is_causal,
        "causal_alignment": causal_alignment,
        "window": window,
        "prefix": prefix,
        "alibi_slopes": alibi_slopes,
        "softcap": softcap,
        "sinks": sinks,
        "scale": scale,
        "dropout_p": dropout_p,
        "need_weights": need_weights,
        "return_lse": return_lse,
        "score_mod": score_mod,
        "mask_mod": mask_mod,
    }
    if has_torch_function_variadic(query, key, value) and is_symbolically_traced(query, key, value):
        return recorded(attention_varlen, query, key, value, cu_seqlens_q, cu_seqlens_k, **words, backend=backend)
    if (score_mod is not None or mask_mod is not None) and torch.compiler.is_dynamo_compiling():
        del words["score_mod"], words["mask_mod"]
        call = make_call(query, key, value, cu_seqlens_q, cu_seqlens_k, **words)
        output, lse = modified.run_in_graph(call, score_mod, mask_mod, backend)
        output = output[0].transpose(0, 1)
        return output if lse is None else (output, lse[0])
    call = make_call(query, key, value, cu_seqlens_q, cu_seqlens_k, **words)
    if backends.choose(call, backend, on_triton.refusals) == "triton":
        output, lse = on_triton.run(call)
    else:
        output, lse = on_torch.run(call)
    output = output[0].transpose(0, 1)
    return output if lse is None else (output, lse[0])
