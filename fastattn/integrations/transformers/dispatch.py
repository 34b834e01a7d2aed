"""Which attention layers of transformers have a forward of ours, and how a call finds it.

These layers ask for no attention by its name: their classes get a forward that does, once and for good, and that is
theirs for every other name. Nothing of it happens before a model of such a module is met.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastattn.integrations.transformers import layers


class Family(NamedTuple):
    """The layers of one module of transformers.

    Attributes:
        forwards: ours, by the names of their classes.
        holds_masks: would its models compute with a causal mask before layers get it?
        classes: the name of a table in which the module looks for the class of its layers by an attention's name.
    """

    forwards: dict[str, Callable[..., Any]]
    holds_masks: bool = False
    classes: str | None = None


_MODELS = "transformers.models."
FAMILIES = {
    f"{_MODELS}bloom.modeling_bloom": Family({"BloomAttention": layers.bloom_attention}),
    f"{_MODELS}mpt.modeling_mpt": Family(
        {"MptBlock": layers.mpt_block, "MptAttention": layers.mpt_attention}, holds_masks=True
    ),
    f"{_MODELS}falcon.modeling_falcon": Family(
        {"FalconAttention": layers.falcon_attention}, holds_masks=True, classes="FALCON_ATTENTION_CLASSES"
    ),
    f"{_MODELS}mpnet.modeling_mpnet": Family({"MPNetSelfAttention": layers.mpnet_attention}),
    f"{_MODELS}wavlm.modeling_wavlm": Family({"WavLMAttention": layers.wavlm_attention}),
}


def reach(name: str, names: set[str]) -> bool:
    """Let the layers of the module of this name run on this package, where their models are set to one of ``names``.

    Returns:
        False where they are none that are known here, or this transformers has them in another form.
    """
    module, family = sys.modules.get(name), FAMILIES.get(name)
    if module is None or family is None or not _fits(module, family):
        return False
    for layer, ours in family.forwards.items():
        kind = getattr(module, layer)
        if not hasattr(kind.forward, "_is_theirs_or_ours"):
            # A subclass is what transformers wraps with its checkpointing, which only the outermost wrapper does.
            wrapped = type(layer, (kind,), {"forward": _theirs_or(ours, kind.forward, names)})
            kind.forward = vars(wrapped)["forward"]
    if family.holds_masks and not hasattr(vars(module)["create_causal_mask"], "_is_theirs_or_ours"):
        vars(module)["create_causal_mask"] = _held(vars(module)["create_causal_mask"], names)
    if family.classes is not None:
        known = getattr(module, family.classes)
        known |= dict.fromkeys(names - known.keys(), known["eager"])
    return True


def tell(model: nn.Module) -> None:
    """Give the layers of a model its configuration, in which they find the name of an attention."""
    family = FAMILIES.get(type(model).__module__)
    if family is None:
        return
    for layer in model.modules():
        if type(layer).__name__ in family.forwards:
            layer.config = model.config


def _fits(module: ModuleType, family: Family) -> bool:
    """Has the module these layers, and their forwards no argument that ours lack or have at another place?"""
    if family.holds_masks and not hasattr(module, "create_causal_mask"):
        return False
    if family.classes is not None and not hasattr(module, family.classes):
        return False
    for layer, ours in family.forwards.items():
        forward = getattr(getattr(module, layer, None), "forward", None)
        if forward is None:
            return False
        theirs = list(inspect.signature(forward).parameters)
        if theirs != [name for name in inspect.signature(ours).parameters if name in theirs]:
            return False
    return True


def _is_ours(config: Any, names: set[str]) -> bool:
    return getattr(config, "_attn_implementation", None) in names


def _theirs_or(ours: Callable[..., Any], theirs: Callable[..., Any], names: set[str]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = getattr(self, "config", None)
        if _is_ours(config, names):
            return ours(self, *args, **kwargs)
        if config is not None:  # a name that nobody has any more is a KeyError: masks are not made for it
            ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, theirs)
        return theirs(self, *args, **kwargs)

    setattr(forward, "_is_theirs_or_ours", True)  # noqa: B010, functions have no such attribute to type checkers
    return forward


def _held(create: Callable[..., Any], names: set[str]) -> Callable[..., Any]:
    @functools.wraps(create)
    def create_causal_mask(config: Any, *args: Any, **kwargs: Any) -> Any:
        mask = create(config, *args, **kwargs)
        return layers.HeldMask(mask) if _is_ours(config, names) else mask

    setattr(create_causal_mask, "_is_theirs_or_ours", True)  # noqa: B010, as above
    return create_causal_mask
