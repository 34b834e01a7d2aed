"""Turn the attention, norms and transformer layers of a model into ours, in place, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastattn.integrations import _also
from fastattn.modules import (
    AddLayerNorm,
    AddRMSNorm,
    MultiheadAttention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)
from fastattn.modules._common import check_backend
from fastattn.ops.common.backends import Backend

_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
}
_PARTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.LayerNorm: AddLayerNorm,
    nn.RMSNorm: AddRMSNorm,
}
_OURS = _LAYERS | _PARTS
# The parts of a layer that have to be ours before the layer can be.
_NEEDED = {"self_attn": (MultiheadAttention,), "multihead_attn": (MultiheadAttention,)} | dict.fromkeys(
    ("norm1", "norm2", "norm3"), (AddLayerNorm, AddRMSNorm)
)
# Methods that somebody may have put on the module itself, where a new class would not reach them.
_METHODS = ("forward", "_sa_block", "_mha_block", "_ff_block")


class Fusion:
    """What :func:`fuse` did. As a context manager it undoes that on leaving.

    Names are those of ``model.named_modules()``: that of the model itself is empty.

    Attributes:
        replaced: the modules that are now of this package, by name, each with its class.
        left_alone: attention, norms and layers that :func:`fuse` did not touch, by name, each with the reason.
        fused_paths_off: names of the modules whose fused inference path, which calls no module inside them, is off now.
    """

    def __init__(self) -> None:
        self.replaced: dict[str, type[nn.Module]] = {}
        self.left_alone: dict[str, str] = {}
        self.fused_paths_off: tuple[str, ...] = ()
        self._modules: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
        self._switches: list[tuple[nn.Module, str, Any]] = []

    def undo(self) -> None:
        """Make the model what it was, with the weights it has now. A second call does nothing.

        Raises:
            RuntimeError: something else changed the class of a replaced module since (parametrizations and FSDP do).
                Nothing is undone then.
        """
        for (name, kind), (module, *_) in zip(self.replaced.items(), self._modules):
            if type(module) is not kind:
                raise RuntimeError(f"{_shown(name)} is now a {type(module).__name__}: undo what made it one first")
        for module, before, state in self._modules:
            module.__class__ = before
            for key in ("backend", *state):
                module.__dict__.pop(key, None)
        for module, switch, value in self._switches:
            setattr(module, switch, value)
        self._modules, self._switches = [], []

    def __enter__(self) -> Fusion:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"{_shown(name)}: now a fastattn.{kind.__name__}" for name, kind in self.replaced.items()]
        lines += [f"{_shown(name)}: left alone: {reason}" for name, reason in self.left_alone.items()]
        lines += [f"{_shown(name)}: fused inference path off" for name in self.fused_paths_off]
        return "\n".join(lines) or "no attention, norm or transformer layer of torch.nn in this model"


def fuse(
    model: nn.Module,
    *,
    backend: Backend | None = None,
    also: Mapping[type[nn.Module], type[nn.Module]] | None = None,
) -> Fusion:
    """Make every attention module, norm and transformer layer of torch in ``model`` ours, in place.

    ``nn.MultiheadAttention``, ``nn.TransformerEncoderLayer`` and ``nn.TransformerDecoderLayer`` become their namesakes
    in this package, ``nn.LayerNorm`` a :class:`fastattn.AddLayerNorm`, ``nn.RMSNorm`` a :class:`fastattn.AddRMSNorm`;
    the model itself too, where it is one of them. The modules stay the same objects, with their parameters, hooks and
    training mode; only their class changes, so that optimizers and other references stay valid.

    Subclasses are left alone and reported, since what they add is not known, and so is a layer whose attention or norms
    are neither torch's nor ours; what is inside them is replaced all the same. Of a class that adds nothing to torch's
    but another way to compute it, as the layer norms of many packages do, ``also`` says so::

        fuse(model, also={LayerNormFp32: nn.LayerNorm, LlamaRMSNorm: nn.RMSNorm})

    Each module of just that class is first tried on a few random numbers beside torch's on the same parameters. Norms
    need not be subclasses, if they call their parameters ``weight`` and ``bias``.

    In evaluation torch's encoder layer runs a fused function that calls no module, and ``nn.TransformerEncoder`` makes
    nested tensors that only this function takes. Both are switched off around our modules, those that were put there by
    hand included. So evaluation gives what training gives without its dropout; our layers have a fused path of their
    own, and leave padding out where that pays: padded positions hold zeros or what the layers compute for them.

    A copy of a fused model is a fused model, and stays one: ``undo`` knows the modules that it changed.

    Args:
        model: any module. Fuse before wrapping it (FSDP, parametrizations).
        backend: of the modules replaced; see :class:`fastattn.MultiheadAttention`.
        also: further classes to replace, each with that of torch's five which it stands for.

    Returns:
        A :class:`Fusion`. ``print`` it, call its ``undo()``, or use it as a context manager.

    Raises:
        TypeError: ``model`` is no ``nn.Module``; or an item of ``also``, which the message names, is no pair of such
            classes, or a module lacks an attribute of torch's.
        ValueError: ``backend`` is unknown; or a module of ``also`` computes something else. Nothing is replaced then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    check_backend(backend)

    kinds = {kind: kind for kind in _OURS} | _also.checked(also, _OURS)

    result = Fusion()
    for name, module in model.named_modules():
        if isinstance(module, tuple(kinds)):
            reason = _why_not(module, kinds)
            if reason is None:
                kind, state = kinds[type(module)], {}
                if kind is not type(module):
                    state = _also.missing_state(name, module, kind)
                    _also.check_by_numbers(name, module, kind, state)
                result.replaced[name] = _OURS[kind]
                result._modules.append((module, type(module), state))
            else:
                result.left_alone[name] = reason
    for module, before, state in result._modules:
        module.__class__ = _OURS[kinds[before]]
        module.__dict__.update(state)
        if kinds[before] in _PARTS and backend is not None:
            module.__dict__["backend"] = backend  # as nn.Module keeps what is no tensor
    _switch_fused_paths_off(model, result)
    return result


def _shown(name: str) -> str:
    return name or "the model"


def _why_not(module: nn.Module, kinds: dict[type, type]) -> str | None:
    """Why a module is not replaced that is, or inherits from, one of ``kinds``, which says what each stands for; None
    where it is."""
    if type(module) not in kinds:
        return _why_not_subclass(type(module))
    for method in _METHODS:
        if method in vars(module):
            return f"its {method} was replaced"
    if kinds[type(module)] in _LAYERS:
        for name, accepted in _NEEDED.items():
            part = getattr(module, name, None)  # an encoder layer has fewer
            if isinstance(part, nn.Module) and not issubclass(_becomes(part, kinds), accepted):
                return f"its {name} stays a {_also.shown(type(part))}"
    return None


def _becomes(module: nn.Module, kinds: dict[type, type]) -> type[nn.Module]:
    """The class of ``module`` in the fused model."""
    kind = type(module)
    return _OURS[kinds[kind]] if kind in kinds and _why_not(module, kinds) is None else kind


def _why_not_subclass(kind: type[nn.Module]) -> str:
    parent = next((base for base in kind.__mro__ if base in _OURS), None)
    if parent is None:
        return f"its class {_also.shown(kind)} is a subclass of one in also"
    if issubclass(kind, _OURS[parent]):
        return f"it is a fastattn.{_OURS[parent].__name__} already"
    path = _also.shown(kind)
    if kind.__module__.startswith("torch.ao."):
        return f"its class {path} is quantizable: its projections are modules of their own"
    what = "overrides forward" if kind.forward is not parent.forward else f"is a subclass of nn.{parent.__name__}"
    return (
        f"its class {path} {what}; if it computes what nn.{parent.__name__} does, say so: "
        f"fuse(model, also={{{kind.__name__}: nn.{parent.__name__}}})"
    )


def _switch_fused_paths_off(model: nn.Module, result: Fusion) -> None:
    """Keep torch's encoder and its layers from computing without our modules."""
    names = []
    for name, module in model.named_modules():
        layers = [module]
        if isinstance(module, nn.TransformerEncoder):
            layers, switch, off = list(module.layers), "use_nested_tensor", False
        elif isinstance(module, nn.TransformerEncoderLayer):
            # The fused function knows two activations. A layer that says it has another computes by its submodules;
            # nothing else reads this attribute, and nothing is paid at the call, as a hook would be.
            switch, off = "activation_relu_or_gelu", 0
        else:
            continue
        if any(isinstance(part, tuple(_OURS.values())) for layer in layers for part in (layer, *layer.children())):
            before = getattr(module, switch, off)
            if before:
                names.append(name)
                result._switches.append((module, switch, before))
                setattr(module, switch, off)
    result.fused_paths_off = tuple(names)
