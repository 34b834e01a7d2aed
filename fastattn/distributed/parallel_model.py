"""``parallelize``: a model of this package's modules over a device mesh, by the names of its dimensions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar, get_args

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastattn.distributed.call import Method
from fastattn.distributed.layout import Balance, check_balance
from fastattn.distributed.parallel_attention import PACKED, Context, ParallelMultiheadAttention, share_heads_out
from fastattn.distributed.parallel_parts import ContextPositionalEncoding, ParallelTrunk, replicate_parameters
from fastattn.models.transformer import TransformerEncoderDecoder, TransformerLanguageModel, TransformerTrunk
from fastattn.modules import (
    AddLayerNorm,
    AddRMSNorm,
    LearnedPositionalEncoding,
    MultiheadAttention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)

Model = TypeVar("Model", bound=nn.Module)

# In this order: tensor-parallel ranks exchange most, and neighbours in a mesh are near one another.
_NAMES = ("data", "context", "tensor")
_METHODS = tuple(method for method in get_args(Method) if method != "2d")  # the context has one dimension
_FSDP_WORDS = ("mp_policy", "offload_policy", "reshard_after_forward")
_LAYERS = (TransformerEncoderLayer, TransformerDecoderLayer)
# Modules that treat each token by itself, and read their parameters as attributes: every rank has all of them.
_OF_TOKENS = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, AddLayerNorm, AddRMSNorm, LearnedPositionalEncoding)


class _Plan(NamedTuple):
    """The modules of a model by what becomes of them, each with its name."""

    attentions: list[tuple[str, MultiheadAttention]]
    layers: list[tuple[str, nn.Module]]
    trunks: list[TransformerTrunk]
    positions: list[LearnedPositionalEncoding]
    others: list[nn.Module]  # with parameters that every tensor-parallel rank has


def parallelize(
    model: Model,
    mesh: DeviceMesh,
    *,
    method: Method = "auto",
    balance: Balance = "none",
    fsdp: Mapping[str, Any] | None = None,
) -> Model:
    """Share a model out among the ranks of a mesh, in place, by the names of the mesh's dimensions.

    ``"tensor"``: the ranks share the heads of each :class:`fastattn.MultiheadAttention` (rows of its projections in,
    columns of the one back) and the hidden units of each layer's MLP (arXiv:1909.08053); they have all other parameters
    alike. ``"context"``: they share the tokens of each sequence, and attention is
    :func:`context_parallel_attention`. ``"data"``: they share the batch. Over the last two every parameter is sharded
    by FSDP2 (``torch.distributed.fsdp.fully_shard``, layer by layer), which averages gradients: over the one of both
    that there is, or replicated over ``"data"`` and sharded over ``"context"``.

    Parameters keep their names, and a full state dict is torch's, in both directions.

    Args:
        model: of this package's attention and layers (:func:`fastattn.fuse` makes torch's those), the same on every
            rank. Between them are containers, ``nn.Linear``, ``nn.Embedding``, norms and
            :class:`fastattn.LearnedPositionalEncoding`, unless the mesh has ``"data"`` alone.
        mesh: a device mesh with some of the dimensions ``"data"``, ``"context"`` and ``"tensor"``, in this order.
        method: of :func:`context_parallel_attention`.
        balance: which tokens a rank has, as there.
        fsdp: ``mp_policy``, ``offload_policy`` and ``reshard_after_forward`` of ``fully_shard``.

    Returns:
        The model. A :class:`fastattn.models.TransformerTrunk` still takes and gives whole sequences; layers and
        attention by themselves take this rank's tokens, :func:`shard`.

    Raises:
        TypeError: ``model`` is no module, or holds one that is not known; ``mesh`` is no device mesh.
        ValueError: the mesh's dimensions have other names, or sizes that do not divide heads or features; a parameter
            is shared out already, or tied to another that is to be; ``method``, ``balance`` or a word of ``fsdp`` is
            not known. Nothing is changed then.
    """
    _check_mesh(mesh)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if method not in _METHODS:
        raise ValueError(f"method={method!r}: expected one of {', '.join(map(repr, _METHODS))}")
    check_balance(balance)
    names = mesh.mesh_dim_names or ()
    words = dict(fsdp or {})
    if not set(words) <= set(_FSDP_WORDS):
        raise ValueError(f"fsdp has {', '.join(map(repr, words))}: expected some of {_FSDP_WORDS}")
    tensor = mesh["tensor"] if "tensor" in names else None
    context = Context(mesh["context"], method, balance) if "context" in names else None
    sharding = tuple(name for name in names if name != "tensor")
    shards = mesh[sharding[-1]].size() if sharding else 1
    plan = _planned(model, tensor, context)
    if tensor is not None:
        _check_sizes(model, plan, tensor, shards)

    for _, attention in plan.attentions:
        attention.__class__ = ParallelMultiheadAttention
        attention.__dict__["tensor"], attention.__dict__["context"] = tensor, context
    for trunk in plan.trunks:
        trunk.__class__ = ParallelTrunk
        trunk.__dict__.update(mesh=mesh, context=context, keeps_whole=words.get("reshard_after_forward") is False)
    for positions in plan.positions if context is not None else ():
        positions.__class__ = ContextPositionalEncoding
        positions.__dict__["context"] = context
    if tensor is not None:
        _share_out(plan, tensor)
    if sharding:
        _fully_shard(model, plan, mesh[sharding], words)
    return model


def _share_out(plan: _Plan, tensor: DeviceMesh) -> None:
    made: dict[int, nn.Parameter] = {}
    for _, attention in plan.attentions:
        assert isinstance(attention, ParallelMultiheadAttention)
        share_heads_out(attention, tensor)
    for _, layer in plan.layers:
        parallelize_module(layer, tensor, {"linear1": ColwiseParallel(), "linear2": RowwiseParallel()})
    for module in plan.others:
        replicate_parameters(module, tensor, made)


def _fully_shard(model: nn.Module, plan: _Plan, mesh: DeviceMesh, words: dict[str, Any]) -> None:
    packed = {id(attention._parameters.get(PACKED)) for _, attention in plan.attentions}

    def placement(parameter: nn.Parameter) -> Shard | None:
        # The first of three dimensions is query, key and value.
        return Shard(1) if id(parameter) in packed and parameter.dim() == 3 else None

    for module in (*(layer for _, layer in plan.layers if layer is not model), model):
        fully_shard(module, mesh=mesh, shard_placement_fn=placement, **words)
    if isinstance(model, (TransformerTrunk, TransformerLanguageModel, TransformerEncoderDecoder)):
        for method in ("generate", "new_cache", "step"):  # they read parameters, as forward does
            if hasattr(model, method):
                register_fsdp_forward_method(model, method)


# ------------------------------------------------------------------------------------------------------------- checks


def _check_mesh(mesh: Any) -> None:
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: expected a torch.distributed.DeviceMesh, got {type(mesh).__name__}")
    names = mesh.mesh_dim_names
    if names is None or list(names) != [name for name in _NAMES if name in names]:
        raise ValueError(f"mesh has the dimensions {names}: expected some of {_NAMES}, in this order")


def _planned(model: nn.Module, tensor: DeviceMesh | None, context: Context | None) -> _Plan:
    """What becomes of each module, or raise where one is not known."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(f"{name} is a DTensor: expected a model that is not parallel yet")
    plan = _Plan([], [], [], [], [])
    inside: set[nn.Module] = set()  # parts that are shared out with the module that they are of
    for name, module in model.named_modules():
        shown = name or "the model"
        is_layer = isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
        if is_layer:
            plan.layers.append((shown, module))
        if type(module) is TransformerTrunk:
            plan.trunks.append(module)
        if (tensor is None and context is None) or module in inside:
            continue
        if is_layer:
            _check_class(shown, module, *_LAYERS)
            inside |= {module.get_submodule("linear1"), module.get_submodule("linear2")} if tensor else set()
        elif isinstance(module, nn.MultiheadAttention):
            _check_class(shown, module, MultiheadAttention)
            assert isinstance(module, MultiheadAttention)
            if context is not None and (module.bias_k is not None or module.add_zero_attn):
                raise ValueError(
                    f"{shown} appends keys to its sequences: expected add_bias_kv=False and add_zero_attn=False with "
                    "mesh['context']"
                )
            plan.attentions.append((shown, module))
            inside.add(module.out_proj)
        elif isinstance(module, TransformerTrunk):
            _check_class(shown, module, TransformerTrunk)
        else:
            _check_known(shown, module, context)
            if isinstance(module, LearnedPositionalEncoding):
                plan.positions.append(module)
            if module._parameters:
                plan.others.append(module)
    return plan


def _check_class(shown: str, module: nn.Module, *kinds: type[nn.Module]) -> None:
    if type(module) not in kinds:
        accepted = " or ".join(f"fastattn's {kind.__name__}" for kind in kinds)
        raise TypeError(
            f"{shown} is a {type(module).__module__}.{type(module).__name__}: expected {accepted}; fastattn.fuse makes "
            "torch's modules ours"
        )


def _check_known(shown: str, module: nn.Module, context: Context | None) -> None:
    """Raise unless the module has nothing of its own, or is of a known class."""
    # a buffer may be of positions, which would be those of the first rank's tokens
    of_its_own = module._parameters or (module._buffers and context is not None)
    if not of_its_own or type(module) in _OF_TOKENS:
        return
    known = ", ".join(kind.__name__ for kind in _OF_TOKENS)
    raise TypeError(
        f"{shown} is a {type(module).__module__}.{type(module).__name__} with parameters or buffers: expected "
        f"containers, layers and attention of this package, or one of {known}"
    )


def _check_sizes(model: nn.Module, plan: _Plan, tensor: DeviceMesh, shards: int) -> None:
    """Raise where the ranks cannot share a module out; ``shards`` of FSDP share what a tensor-parallel rank has."""
    ranks = tensor.size()
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    for name, attention in plan.attentions:
        if attention.num_heads % ranks:
            raise ValueError(
                f"{name}.num_heads={attention.num_heads}: expected a multiple of the {ranks} ranks of mesh['tensor']"
            )
        _check_features(f"{name}.embed_dim", attention.embed_dim, ranks, shards)
        _check_linear(f"{name}.out_proj", attention.out_proj)
        _check_untied(name, [attention, attention.out_proj], uses)
    for name, layer in plan.layers:
        first, second = (_check_linear(f"{name}.{part}", layer.get_submodule(part)) for part in ("linear1", "linear2"))
        _check_features(f"{name}.linear1.out_features", first.out_features, ranks, shards)
        _check_untied(name, [first, second], uses)


def _check_features(what: str, features: int, ranks: int, shards: int) -> None:
    if features % (ranks * shards):
        further = "" if shards == 1 else f", times the {shards} that shard parameters"
        raise ValueError(f"{what}={features}: expected a multiple of the {ranks} ranks of mesh['tensor']{further}")


def _check_linear(what: str, module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear) or type(module) not in (nn.Linear, NonDynamicallyQuantizableLinear):
        raise TypeError(f"{what} is a {type(module).__name__}: expected an nn.Linear")
    return module


def _check_untied(name: str, parts: list[nn.Module], uses: Counter[int]) -> None:
    if any(p is not None and uses[id(p)] > 1 for part in parts for p in part._parameters.values()):
        raise ValueError(f"{name} has parameters that another module has, too: expected some of its own")
