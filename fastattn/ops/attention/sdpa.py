"""``F.scaled_dot_product_attention`` as a path of the torch backend: which calls it takes, and which it gets wrong.

On a CPU its kernel is fast and linear in memory, and wrong in three cases, which the code around it excludes:

* NaN, inf, or an overflowing product at a hidden pair becomes NaN in the whole row, since its masks are added. The
  output of a call with hidden pairs is looked at, and thrown away if it is not finite.
* A NaN in the gradient of a row that sees nothing, or an overflow at a hidden pair, reaches the gradient of every key.
  A hook reads the gradients, and has the blocks compute them again where they are not finite.
* Its backward recomputes the weights from a rounded LSE, and loses the sum of a row whose every key carries a bias like
  ``-1e9``. Such a call is not run here if it needs gradients.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops.attention import operator
from fastattn.ops.attention.contract import AttentionCall
from fastattn.ops.attention.flash import LEAST_SCALE
from fastattn.ops.common.blocks import statistics_dtype
from fastattn.ops.common.finite import is_finite
from fastattn.ops.common.tracing import is_left_open, is_traced, saved_tensors
from fastattn.reference import visibility
from fastattn.reference.attention import NEGATIVE_INFINITY

# Torch's own, whatever stands in its place later (integrations.sdpa).
torch_sdpa = F.scaled_dot_product_attention

# Elements of a mask that may be made from several, or be converted by torch: 4 MiB of float32. More would be memory
# quadratic in the length, where tiles and blocks of rows make a piece at a time.
MOST_MERGED = 1 << 20
# With fewer rows one call over everything is faster than tiles of rows: at 256 by a sixth, even with a window of 64.
FEWEST_ROWS_OF_TILES = 384
# In training, where a tile has a backward too.
_FEWEST_ROWS_TO_TRAIN = 256
# Scores are far from overflowing while the product of the norms of query and key is below this.
_LARGEST_SCORE = 1e37
# The largest bias for all keys of a row beside which the kernel's LSE keeps weights right to 4e-6.
_LARGEST_BIAS = 64.0


def can_express(call: AttentionCall) -> bool:
    """Can ``F.scaled_dot_product_attention`` express the call?"""
    return call.weights == "none" and not call.return_lse and call.is_plain


def hides(call: AttentionCall) -> bool:
    """Does anything hide keys but causality with the diagonal at key 0, which is a flag of the kernel?"""
    hiding = (call.mask, call.bias, call.key_padding_mask, call.lower, call.query_documents)
    return any(argument is not None for argument in hiding) or call.upper not in (None, 0)


def trains(call: AttentionCall) -> bool:
    """Are gradients of query, key or value wanted?"""
    return torch.is_grad_enabled() and any(t.requires_grad for t in (call.query, call.key, call.value))


def is_worth_a_mask(call: AttentionCall) -> bool:
    """Is a window, or are documents, all that torch's kernel has no words for, in a call so short that a mask of them
    beats tiles of rows?"""
    beyond = (call.alibi_slopes, call.sinks, call.softcap, call.prefix, call.score_mod, call.mask_mod)
    if call.weights != "none" or call.return_lse or any(argument is not None for argument in beyond):
        return False
    return call.query.shape[2] < (_FEWEST_ROWS_TO_TRAIN if trains(call) else FEWEST_ROWS_OF_TILES)


def takes(call: AttentionCall) -> bool:
    """Can the CPU kernel run this call in linear memory, judged by the shapes and dtypes of its tensors?"""
    bias = call.bias
    return (
        (can_express(call) or is_worth_a_mask(call))
        and call.dropout_p == 0.0
        and call.query.numel() > 0  # torch 2.11's kernel divides by zero for empty tensors, which kills the process
        and call.key.numel() > 0
        and (bias is None or not needs_care(bias, call.query))
        and merged_elements(call) <= MOST_MERGED
        and (is_guarded() or not (hides(call) and trains(call)))
    )


def is_guarded() -> bool:
    """Does :func:`guard_gradients` look at the gradients of a call? Where ``torch.nn.attention.sdpa_kernel`` has turned
    the fused kernel off, SDPA takes another form, whose nodes have no hook."""
    return torch._C._get_flash_sdp_enabled()


def needs_care(bias: Tensor, query: Tensor) -> bool:
    """Would torch refuse this bias, or make all scores to take its gradient?"""
    return torch.promote_types(bias.dtype, torch.float32) != torch.promote_types(query.dtype, torch.float32) or (
        torch.is_grad_enabled() and bias.requires_grad
    )


def merged_elements(call: AttentionCall) -> int:
    """How many elements the mask has that is made for torch, or that torch makes of a boolean one."""
    query, key, padding = call.query, call.key, call.key_padding_mask
    if not hides(call):
        return 0
    shapes: list[tuple[int, ...]] = [t.shape for t in (call.mask, call.bias) if t is not None]
    if padding is not None:
        shapes.append((padding.shape[0], 1, 1, padding.shape[1]))
    if call.query_documents is not None:
        shapes.append((call.query_documents.shape[0], 1, query.shape[2], key.shape[2]))
    if call.lower is not None or (call.upper is not None and (shapes or call.upper != 0)):
        shapes.append((1, 1, query.shape[2], key.shape[2]))
    if not shapes or (len(shapes) == 1 and call.bias is not None and call.bias.dtype in (query.dtype, torch.float32)):
        return 0
    return math.prod(map(max, *shapes)) if len(shapes) > 1 else math.prod(shapes[0])


def is_tame(call: AttentionCall) -> bool:
    """Are query, key and value finite, and small enough that no score overflows? Looks at numbers, so it is for eager
    calls on a CPU; it takes as long as two sums (6 microseconds of a small call)."""
    # what torch.nn.utils.clip_grad_norm_ calls; three calls of vector_norm take half as long again
    tensors = [call.query, call.key, call.value]
    query, key, value = torch._foreach_norm(tensors, 2, dtype=statistics_dtype(call.query.dtype))
    return query.item() * key.item() * max(1.0, abs(call.scale)) < _LARGEST_SCORE and math.isfinite(value.item())


# ---------------------------------------------------------------------------------------------------------- eager calls


def run(call: AttentionCall) -> Tensor | None:
    """The output of an eager call that :func:`takes`; None where it, or what its backward would make, is wrong."""
    if abs(call.scale) < LEAST_SCALE and not is_tame(call):
        return None
    call = without_keys_past_the_diagonal(call)
    mask = merged_mask(call, leaves_causality=True)
    if trains(call) and mask is not None and call.bias is not None and _is_large(mask):
        return None
    output = attend(call, mask)
    # what hidden places hold reaches the rows that do not see them as NaN, if it is NaN or inf or overflows
    return output if mask is None or is_finite(output) else None


def _is_large(mask: Tensor) -> bool:
    """Is there a row all of whose keys carry a large bias, in a mask that is added?"""
    if not mask.numel():
        return False
    largest = mask.amax(dim=-1)
    low, high = (t.item() for t in largest.aminmax())
    if high > _LARGEST_BIAS or (low < -_LARGEST_BIAS and math.isfinite(low)):
        return True
    return not math.isfinite(low) and bool(((largest < -_LARGEST_BIAS) & (largest != NEGATIVE_INFINITY)).any())


def attend(call: AttentionCall, mask: Tensor | None) -> Tensor:
    """SDPA of a call under one mask that stands for all of its masks, or under causality alone."""
    query, key, value, scale = call.query, call.key, call.value, call.scale
    if scale <= 0.0:  # torch's CPU kernel scales what it has hidden: -inf * 0 is NaN, and -inf * -1 everything
        query, scale = (-query, -scale) if scale < 0.0 else (query * 0.0, 1.0)
    if query.device.type == "cpu" and call.dropout_p == 0.0:
        query, key, value = _as_the_cpu_kernel_takes_them(query, key, value)
    of_heads = query.shape
    if query.shape[1] != key.shape[1] and _sees_alike(call, mask):
        query = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    output = torch_sdpa(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=call.dropout_p,
        is_causal=call.upper is not None and mask is None,
        scale=scale,
        # A branch, and not the comparison: under torch.jit.trace that is a tensor, in a dynamic graph a SymBool.
        **({"enable_gqa": True} if query.shape[1] != key.shape[1] else {}),
    )
    guard_gradients(output, looks=mask is not None)  # before it is cut: the hook is on the kernel's own node
    if query.shape != of_heads:
        output = output.reshape(of_heads)
    return output if output.shape[3] == call.value.shape[3] else output[..., : call.value.shape[3]]


def _sees_alike(call: AttentionCall, mask: Tensor | None) -> bool:
    """Do all rows of all heads of a batch entry see the same keys, in an eager call on the CPU?

    Then the heads of a group can be rows of one head, for which torch's kernel reads the keys once, and not once for
    each head: one query of 16 heads, beside 4096 keys of 4 heads and for a batch of 8, takes 2.2 ms and not 5.4.
    """
    if call.device.type != "cpu" or call.dropout_p > 0.0 or is_traced():
        return False
    return call.upper is None and (mask is None or mask.shape[1] == mask.shape[2] == 1)


def _as_the_cpu_kernel_takes_them(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Query, key and value in the layout that torch's fused CPU kernel needs: the elements of a row side by side, and
    the rows of all three equally wide.

    Any other layout makes SDPA fall back to a form that stores all scores: for a feature map with channels first,
    positions times positions of them. Zeros appended to a row of query and key change no score, and zeros appended to a
    value become columns of zeros in the output, which the caller cuts off. At 2304 positions, D = Dv = 32 (D = 4,
    Dv = 16) the padded call takes 18 ms (9), SDPA's other form 42 (35), blocks of rows 29 (17); the widths have to
    differ eightfold before one of these is faster.
    """
    width = max(query.shape[3], value.shape[3])
    taken = [t if t.shape[3] == width else F.pad(t, (0, width - t.shape[3])) for t in (query, key, value)]
    # not .contiguous(), to which a row of one element is contiguous whatever its stride
    return [t if t.stride(3) == 1 else t.clone(memory_format=torch.contiguous_format) for t in taken]


def without_keys_past_the_diagonal(call: AttentionCall) -> AttentionCall:
    """Cut off the keys that no query may see: less work, and their NaN and inf are out of the way."""
    length, keys = call.query.shape[2], call.key.shape[2]
    if call.upper is None:
        return call
    if is_left_open(length, keys):  # whether to cut is not known while the graph is traced: a mask does in both cases
        below = visibility(length, keys, upper=call.upper, device=call.device)
        return call._replace(upper=None, mask=below if call.mask is None else call.mask & below)
    if length == keys:
        return call
    stop = max(0, length + call.upper)
    if stop >= keys:
        return call
    bias, mask = (t if t is None or t.shape[3] == 1 else t[..., :stop] for t in (call.bias, call.mask))
    padding, documents = (None if t is None else t[:, :stop] for t in (call.key_padding_mask, call.key_documents))
    return call._replace(
        key=call.key[:, :, :stop],
        value=call.value[:, :, :stop],
        bias=bias,
        mask=mask,
        key_padding_mask=padding,
        key_documents=documents,
    )


def merged_mask(call: AttentionCall, *, leaves_causality: bool = False) -> Tensor | None:
    """One mask for torch, boolean or floating, that stands for all of the call's masks; None where there are none.

    If it ``leaves_causality``, it is None also where causality alone hides keys, for which SDPA has a flag. A bias
    keeps its precision: torch takes a float32 mask with 16-bit inputs. At a pair that another mask hides, the bias is
    replaced by ``-inf``, so that a NaN there is gone.
    """
    query, key, padding = call.query, call.key, call.key_padding_mask
    visible = call.mask
    if padding is not None:
        unpadded = ~padding[:, None, None, :]
        visible = unpadded if visible is None else visible & unpadded
    if call.query_documents is not None and call.key_documents is not None:
        same = call.query_documents[:, None, :, None] == call.key_documents[:, None, None, :]
        visible = same if visible is None else visible & same
    alone = visible is None and call.bias is None and call.lower is None
    bounded = call.lower is not None or call.upper is not None
    if bounded and not (leaves_causality and alone and call.upper == 0):
        band = visibility(query.shape[2], key.shape[2], lower=call.lower, upper=call.upper, device=query.device)
        visible = band if visible is None else visible & band
    if call.bias is None:
        return visible
    bias = call.bias
    if bias.dtype not in (query.dtype, torch.float32):
        bias = bias.to(torch.promote_types(bias.dtype, torch.float32))
    return bias if visible is None else torch.where(visible, bias, NEGATIVE_INFINITY)


# ----------------------------------------------------------------------------------- calls whose numbers cannot be seen


def run_unseen(call: AttentionCall) -> Tensor:
    """The output where no values may be read: in a graph, or on another device.

    NaN and inf cannot be looked for, so that every key that no row sees is made zero in advance. Rows that see nothing
    are zeroed in the query, and again in the output, so that no gradient enters the kernel through them.
    """
    call = without_keys_past_the_diagonal(call)
    mask = merged_mask(call, leaves_causality=True)
    if mask is None:
        return attend(call, None)
    visible = mask if mask.dtype == torch.bool else mask != NEGATIVE_INFINITY
    kv_heads, unseen = call.key.shape[1], ~visible.any(dim=-2)  # [B | 1, H | 1, S | 1]
    if unseen.shape[1] not in (1, kv_heads):
        unseen = unseen.unflatten(1, (kv_heads, -1)).all(dim=2)
    blind = ~visible.any(dim=-1, keepdim=True)  # [B | 1, H | 1, L | 1, 1]
    key, value = (t.masked_fill(unseen[..., None], 0) for t in (call.key, call.value))
    call = call._replace(query=call.query.masked_fill(blind, 0), key=key, value=value)
    return attend(call, mask).masked_fill(blind, 0)


# ------------------------------------------------------------------------------------------------------------ gradients


def guard_gradients(output: Tensor, looks: bool) -> None:
    """Replace the CPU kernel's gradients by those of our operators in two cases: where they are to be differentiated
    again, which torch's kernel cannot, and, if it ``looks``, where they are not finite because of NaN at a hidden pair.

    This is a hook on the kernel's node in autograd's graph, which costs a training step 10 to 20 microseconds; a
    Function of our own around the kernel would cost 30.
    """
    if output.is_cpu and not is_traced():
        guard_eager_gradients(output, looks)


def guard_eager_gradients(output: Tensor, looks: bool) -> None:
    """:func:`guard_gradients` of a call that is known to be eager and on the CPU."""
    node = output.grad_fn
    if node is not None and node.name() == "ScaledDotProductFlashAttentionForCpuBackward0":
        node.register_hook(_of_masked if looks else _of_plain)


def _right_gradients(
    looks: bool, d_inputs: tuple[Tensor | None, ...], d_outputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...] | None:
    """The gradients of our operators, to replace the CPU kernel's; None where the kernel's are right."""
    d_output, differentiated = d_outputs[0], torch.is_grad_enabled()
    if d_output is None or not (differentiated or (looks and _holds_garbage(d_inputs))):
        return None
    node: Any = torch._C._current_autograd_node()
    query, key, value, bias = saved_tensors(node, "query", "key", "value", "attn_mask")
    with torch.enable_grad():
        inputs = [t if differentiated else t.detach().requires_grad_() for t in (query, key, value)]
        call = AttentionCall(
            *(t.view_as(t) for t in inputs),  # one tensor may be all three, or made from another
            bias=bias,
            upper=0 if node._saved_is_causal else None,
            scale=1.0 / math.sqrt(query.shape[-1]) if node._saved_scale is None else node._saved_scale,
        )
        wanted = [t for t, d_input in zip((call.query, call.key, call.value, bias), d_inputs) if d_input is not None]
        output, _, _ = operator.apply(call, None, "torch")
        found = iter(torch.autograd.grad([output], wanted, [d_output], create_graph=differentiated))
    return tuple(None if d_input is None else next(found) for d_input in d_inputs)


_of_plain, _of_masked = (functools.partial(_right_gradients, looks) for looks in (False, True))


def _holds_garbage(d_inputs: tuple[Tensor | None, ...]) -> bool:
    """Is a gradient not finite? A NaN in dK is one in dQ as well (both are made of dS), so that dQ and dV are read."""
    present = [t for t in (d_inputs[0], d_inputs[2]) if t is not None] or [t for t in d_inputs if t is not None]
    try:
        return not is_finite(*present)
    except RuntimeError:
        # torch.autograd.functional.jacobian(vectorize=True) batches the gradients, whose values cannot be read
        return False
