"""Turn every ``nn.MultiheadAttention`` inside a model into ours, in place, and back."""

from __future__ import annotations

from typing import Any, get_args

from torch import nn

from fastattn.modules import MultiheadAttention
from fastattn.ops._dispatch import Backend


class Replacement:
    """What :func:`replace_attention` did. As a context manager it undoes that on leaving.

    Attributes:
        replaced: qualified names of the modules that are now :class:`fastattn.MultiheadAttention`.
        left_alone: qualified names of the attention modules that are not, each with the reason.
        fused_paths_off: qualified names of the modules whose fused inference path, which would never call the
            attention inside them, is switched off.
    """

    def __init__(self) -> None:
        self.replaced: tuple[str, ...] = ()
        self.left_alone: dict[str, str] = {}
        self.fused_paths_off: tuple[str, ...] = ()
        self._modules: list[nn.Module] = []
        self._switches: list[tuple[nn.Module, str, Any]] = []

    def undo(self) -> None:
        """Make the model what it was, with the weights it has now. A second call does nothing.

        Raises:
            RuntimeError: something else changed the class of a replaced module since (parametrizations and FSDP do).
                Nothing is undone then.
        """
        for name, module in zip(self.replaced, self._modules):
            if type(module) is not MultiheadAttention:
                raise RuntimeError(f"{name} is now a {type(module).__name__}: undo what made it one first")
        for module in self._modules:
            module.__class__ = nn.MultiheadAttention
            module.__dict__.pop("backend", None)
        for module, switch, before in self._switches:
            setattr(module, switch, before)
        self._modules, self._switches = [], []

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"{name}: replaced" for name in self.replaced]
        lines += [f"{name}: left alone: {reason}" for name, reason in self.left_alone.items()]
        lines += [f"{name}: fused inference path off" for name in self.fused_paths_off]
        return "\n".join(lines) or "no nn.MultiheadAttention in this model"


def replace_attention(model: nn.Module, *, backend: Backend | None = None) -> Replacement:
    """Make every ``nn.MultiheadAttention`` inside ``model`` a :class:`fastattn.MultiheadAttention`, in place.

    The modules stay the same objects, with their parameters, hooks and training mode; only their class changes, so that
    optimizers and other references stay valid. Subclasses are left alone and reported: what they add is not known.

    In evaluation ``nn.TransformerEncoderLayer`` runs a fused function that never calls its attention module, and
    ``nn.TransformerEncoder`` nested tensors that only this function takes. Both are switched off around our modules,
    those that were put there by hand included. So evaluation gives what training gives without its dropout: in an
    ``nn.TransformerEncoder`` padded positions hold what the layers compute for them, where the fused path gives 0.

    Args:
        model: the model around the attention modules. Replace before wrapping it (FSDP, parametrizations).
        backend: the ``backend`` of the modules replaced; see :class:`fastattn.MultiheadAttention`.

    Returns:
        A :class:`Replacement`: ``print`` it, call its ``undo()``, or use it as a context manager.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or is itself an ``nn.MultiheadAttention``.
        ValueError: ``backend`` is unknown.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.MultiheadAttention):
        raise TypeError(
            f"model is itself a {type(model).__name__}, and only what is inside a model is replaced: make a "
            "fastattn.MultiheadAttention with the same arguments and load this one's state_dict()"
        )
    if backend is not None and backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(map(repr, get_args(Backend)))}")

    result = Replacement()
    replaced = []
    for name, module in model.named_modules():
        if type(module) is nn.MultiheadAttention:
            replaced.append(name)
            result._modules.append(module)
        elif isinstance(module, nn.MultiheadAttention):
            result.left_alone[name] = _why_not(type(module))
    for module in result._modules:
        module.__class__ = MultiheadAttention
        if backend is not None:
            module.__dict__["backend"] = backend  # as nn.Module keeps what is no tensor
    result.replaced = tuple(replaced)
    _switch_fused_paths_off(model, result)
    return result


def _why_not(kind: type[nn.MultiheadAttention]) -> str:
    """Why a module of a subclass of ``nn.MultiheadAttention`` is not replaced."""
    if issubclass(kind, MultiheadAttention):
        return "it is a fastattn.MultiheadAttention already"
    path = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__module__.startswith("torch.ao."):
        return f"its class {path} is quantizable: its projections are modules of their own"
    if kind.forward is not nn.MultiheadAttention.forward:
        return f"its class {path} overrides forward"
    return f"its class {path} is a subclass of nn.MultiheadAttention"


def _switch_fused_paths_off(model: nn.Module, result: Replacement) -> None:
    """Keep torch's encoder and its layers from computing attention without our modules."""
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
        if any(isinstance(getattr(layer, "self_attn", None), MultiheadAttention) for layer in layers):
            before = getattr(module, switch, off)
            if before:
                names.append(name or type(module).__name__)
                result._switches.append((module, switch, before))
                setattr(module, switch, off)
    result.fused_paths_off = tuple(names)
