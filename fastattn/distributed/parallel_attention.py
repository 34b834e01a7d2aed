"""``MultiheadAttention`` whose heads are shared out among ranks, and whose sequences are, too, where the mesh says so.

A rank that has ``h`` of ``H`` heads has their rows of each of the three projections in, and their columns of the
projection back. torch packs the three into one matrix ``[3 E, E]``, in which these rows do not lie side by side; as
``[3, E, E]`` they are a plain shard of the second dimension. So the parameter has that shape here, and the state dict
torch's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from fastattn.distributed.api import context_parallel_attention
from fastattn.distributed.call import Method
from fastattn.distributed.layout import Balance
from fastattn.distributed.regions import joined, local, shared, summed
from fastattn.modules import MultiheadAttention
from fastattn.modules._mha_compute import Inputs, Words, attend, is_taken_as_causal
from fastattn.modules._mha_masks import Masks, Scores, check_causal_hint, check_dimensions, check_types, make_masks
from fastattn.ops.attention.api import run
from fastattn.ops.attention.contract import AttentionCall

PACKED = "in_proj_weight"


class Context(NamedTuple):
    """How sequences are shared out."""

    mesh: DeviceMesh  # of one dimension
    method: Method
    balance: Balance


class ParallelMultiheadAttention(MultiheadAttention):
    """:class:`fastattn.MultiheadAttention` of this rank's heads, or of its tokens, or both.

    Attributes:
        tensor: the ranks that share the heads, or None.
        context: how the sequences are shared out, or None.
    """

    tensor: DeviceMesh | None = None
    context: Context | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`fastattn.MultiheadAttention.forward`; with a context of this rank's tokens.

        With a context ``key_padding_mask`` is boolean, of this rank's keys; ``attn_mask`` is ``[L / W, S]``, or a shape
        with batch and heads in front, of this rank's queries and all keys; and ``is_causal=True`` goes for the whole
        sequence, with padding or without, so that ``attn_mask`` is not read.

        Raises:
            AssertionError, RuntimeError: what :class:`fastattn.MultiheadAttention` raises.
            NotImplementedError: weights, or a floating padding, are asked for with a context; or tensors are nested.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            raise NotImplementedError(
                "a nested tensor in a parallel MultiheadAttention: expected dense ones; pad the batch"
            )
        if key_padding_mask is not None or attn_mask is not None:
            check_types(key_padding_mask, attn_mask)
        check_dimensions(query, key, value, key_padding_mask, attn_mask)
        if is_causal:
            check_causal_hint(attn_mask)
            is_causal = self.context is not None or is_taken_as_causal(key_padding_mask, need_weights)
        if self.context is not None:
            _check_context_call(need_weights, key_padding_mask)
        ranks = 1 if self.tensor is None else self.tensor.size()
        if attn_mask is not None:
            attn_mask = None if is_causal else self._mask_of_own_heads(attn_mask, query)
        given = _once_each(query, key, value, self.tensor)
        words = Words(
            self.embed_dim,
            self.num_heads // ranks,
            self.head_dim,
            self.batch_first,
            self.add_zero_attn,
            is_causal,
            self._dropout_p(need_weights) if self.training else 0.0,
            ("average" if average_attn_weights else "heads") if need_weights else "none",
        )

        def on_shards(call: AttentionCall) -> tuple[Tensor, None]:
            return self._attended_on_shards(call, attn_mask, query.dim() == 3), None

        def here(call: AttentionCall) -> Any:
            return run(call, self.backend)

        of_call = Inputs(*given, key_padding_mask, None if self.context else attn_mask, *self.own_parameters())
        merged, weights = attend(of_call, words, here if self.context is None else on_shards)
        output = self.project_back(merged)
        if weights is not None and average_attn_weights:
            weights = summed(weights / ranks, self.tensor)
        elif weights is not None:
            weights = joined(weights, weights.dim() - 3, self.tensor)
        return output, weights

    def project_back(self, merged: Tensor) -> Tensor:
        """The features of this rank's heads, side by side, through the output's projection."""
        output = summed(F.linear(merged, local(self.out_proj.weight)), self.tensor)
        if self.out_proj.bias is not None:
            output = output + local(self.out_proj.bias).to(output.dtype)  # which autocast may have lowered
        return output

    def own_parameters(self) -> tuple[Any, ...]:
        """Of each parameter in front of attention what this rank's heads need, as ``Inputs`` has them."""
        packed = separate = None
        if self._qkv_same_embed_dim:
            packed = local(self.in_proj_weight)
            packed = packed.flatten(0, 1) if packed.dim() == 3 else packed
        else:
            separate = tuple(map(local, (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)))
        in_bias = self.in_proj_bias
        if in_bias is not None:  # small, so that every rank has all of it
            in_bias = self._own_features(local(in_bias).view(3, self.embed_dim)).flatten()
        biases = [None if bias is None else self._own_features(local(bias)) for bias in (self.bias_k, self.bias_v)]
        return packed, separate, in_bias, *biases

    def _own_features(self, tensor: Tensor) -> Tensor:
        """Of ``[..., E]``, the features of this rank's heads."""
        if self.tensor is None:
            return tensor
        width = self.embed_dim // self.tensor.size()
        return shared(tensor, self.tensor).narrow(-1, self.tensor.get_local_rank() * width, width)

    def _mask_of_own_heads(self, mask: Tensor, query: Tensor) -> Tensor:
        """Of a mask for all heads that of this rank's, or raise where it has another number of them."""
        batch = 1 if query.dim() == 2 else query.shape[0 if self.batch_first else 1]
        heads, shape = self.num_heads, mask.shape
        if mask.dim() == 2:
            return mask
        if mask.dim() == 3 and shape[0] == batch * heads and query.dim() == 3:
            mask = mask.unflatten(0, (batch, heads))
        elif mask.dim() == 3 and not (query.dim() == 2 and shape[0] == heads):
            if shape[0] not in (1, batch):
                raise RuntimeError(
                    f"The shape of the 3D attn_mask is {shape}, but should be {(batch * heads, *shape[1:])}."
                )
            return mask[:, None] if query.dim() == 3 else mask
        if mask.shape[-3] not in (1, heads):
            raise RuntimeError(f"The shape of the 4D attn_mask is {shape}, but should be {(batch, heads, *shape[2:])}.")
        if self.tensor is None or mask.shape[-3] == 1:
            return mask
        own = heads // self.tensor.size()
        return mask.narrow(-3, self.tensor.get_local_rank() * own, own)

    def _attended_on_shards(self, call: AttentionCall, attn_mask: Tensor | None, batched: bool) -> Tensor:
        """Attention of this rank's queries to the keys of all ranks."""
        assert self.context is not None
        masks = Masks()
        if attn_mask is not None:
            (batch, heads, length, _), keys = call.query.shape, call.key.shape[2] * self.context.mesh.size()
            masks = make_masks(None, attn_mask, Scores(batch, heads, length, keys, 0, batched))
        output = context_parallel_attention(
            call.query,
            call.key,
            call.value,
            self.context.mesh,
            method=self.context.method,
            balance=self.context.balance,
            attn_mask=masks.mask if masks.bias is None else masks.bias,
            key_padding_mask=call.key_padding_mask,
            is_causal=call.upper == 0,
            scale=call.scale,
            dropout_p=call.dropout_p,
            backend=self.backend,
        )
        assert isinstance(output, Tensor)
        return output


def _check_context_call(need_weights: bool, key_padding_mask: Tensor | None) -> None:
    """Raise for what attention on shards has not."""
    if need_weights:
        raise NotImplementedError(
            "need_weights=True with a 'context': the weights are nowhere whole; pass need_weights=False"
        )
    if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
        raise NotImplementedError(
            f"key_padding_mask is {key_padding_mask.dtype} with a 'context': expected torch.bool, True = padding"
        )


def _once_each(query: Tensor, key: Tensor, value: Tensor, mesh: DeviceMesh | None) -> tuple[Tensor, Tensor, Tensor]:
    """The three as tensors that ranks share, those that are one tensor as one: so the projections are one product."""
    of_query = shared(query, mesh)
    of_key = of_query if key is query else shared(key, mesh)
    of_value = of_key if value is key else of_query if value is query else shared(value, mesh)
    return of_query, of_key, of_value


# ------------------------------------------------------------------------------------- the packed projection, in shards


def share_heads_out(attention: ParallelMultiheadAttention, mesh: DeviceMesh) -> None:
    """Make the parameters of a whole module those of this rank's heads; the state dict stays torch's.

    Those of the mesh's first rank become those of all.
    """
    if attention._qkv_same_embed_dim:
        _put(attention, PACKED, mesh, Shard(1), sides=3)
        attention.register_state_dict_post_hook(_show_as_torch)
        attention.register_load_state_dict_pre_hook(_take_from_torch)
    else:
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            _put(attention, name, mesh, Shard(0))
    for name in ("in_proj_bias", "bias_k", "bias_v"):
        _put(attention, name, mesh, Replicate())
    _put(attention.out_proj, "weight", mesh, Shard(1))
    _put(attention.out_proj, "bias", mesh, Replicate())


def _put(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement, sides: int | None = None) -> None:
    """Share a parameter out, if there is one; ``sides``: as so many matrices of its rows."""
    before = module._parameters.get(name)
    if before is None:
        return
    whole = before.detach() if sides is None else before.detach().unflatten(0, (sides, -1))
    sharded = distribute_tensor(whole, mesh, [placement])
    module.register_parameter(name, nn.Parameter(sharded, requires_grad=before.requires_grad))


def _show_as_torch(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Put the packed weight into a state dict in torch's shape."""
    sharded = state_dict.get(prefix + PACKED)
    if isinstance(sharded, DTensor) and sharded.dim() == 3:
        state_dict[prefix + PACKED] = in_torch_shape(sharded)


def _take_from_torch(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *further: Any
) -> None:
    """Make the parameter's shape of what a state dict has in torch's, on any ranks or on none."""
    given, parameter = state_dict.get(prefix + PACKED), module._parameters[PACKED]
    if isinstance(given, Tensor) and isinstance(parameter, DTensor) and is_in_torch_shape(given, parameter):
        state_dict[prefix + PACKED] = in_shape_of(given, parameter)


def in_torch_shape(sharded: DTensor) -> Tensor:
    """Of ``[3, E, E]`` in shards the same as ``[3 E, E]``, shared out in a way that every reader understands."""
    tensor_dim = sharded.device_mesh.ndim - 1
    whole = sharded.full_tensor().detach().flatten(0, 1)
    # the heads become rows; what data-parallel ranks have of the second dimension becomes columns
    placements = [
        Shard(0) if dim == tensor_dim else Shard(1) if not placement.is_replicate() else placement
        for dim, placement in enumerate(sharded.placements)
    ]
    shown = distribute_tensor(whole, sharded.device_mesh, placements, src_data_rank=None)
    return shown.clone()  # else its shard keeps the memory of all of it


def is_in_torch_shape(given: Tensor, parameter: DTensor) -> bool:
    """Whether it is ``[3 E, E]``, of a parameter ``[3, E, E]``; of another shape torch says what is wrong with it."""
    return parameter.dim() == 3 and given.shape == (3 * parameter.shape[1], parameter.shape[2])


def in_shape_of(given: Tensor, parameter: DTensor) -> DTensor:
    """Of ``[3 E, E]``, on any ranks or on none, the same in the parameter's shape and shards."""
    whole = (given.full_tensor() if isinstance(given, DTensor) else given).detach()
    whole = whole.to(parameter.device).unflatten(0, (3, parameter.shape[1])).contiguous()
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
