"""Models whose layers compute attention themselves, where they are told to use this package: ours runs, or an error.

About 40 families of transformers do, and still make their masks by the name of an implementation: they would add our
boolean masks to scores. transformers asks each model whether it supports one of transformers' own implementations, but
not about one that was registered; this adds that question. Some have layers for which there is a forward of ours.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel, masking_utils

from fastattn.integrations.transformers import dispatch

names: set[str] = set()  # that models are asked about
# Models whose layers take masks for numbers, of which 0 shows a key, beside attention that is called by its name.
_TAKING_NUMBERS = {
    "DeepseekV4PreTrainedModel": "appends numbers to masks",
    "NllbMoePreTrainedModel": "reads masks in its routers",
}


def misreads_masks(kind: type[nn.Module]) -> bool:
    """Does the module of this class make masks by a name, while none of its attention layers is called by it?"""
    module = sys.modules.get(kind.__module__)
    if module is None or hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
        return False
    own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    layers = [value for value in own if isinstance(value, type) and issubclass(value, nn.Module)]
    makes_masks = any(
        getattr(value, "__module__", None) == masking_utils.__name__ and name.startswith("create_")
        for name, value in vars(module).items()
    )
    return makes_masks and any("Attention" in layer.__name__ for layer in layers)


def objection(kind: type[nn.Module]) -> str | None:
    """Why a model of this class cannot be given our masks, to be read behind its name; None where it can."""
    for base in kind.__mro__:
        if base.__name__ in _TAKING_NUMBERS:
            return f"{_TAKING_NUMBERS[base.__name__]}, which are booleans here"
    if not dispatch.reach(kind.__module__, names) and misreads_masks(kind):
        return "computes attention in its own layers, which fastattn does not reach"
    return None


def ask_about(name: str) -> None:
    """From now on ask models about this name, where transformers asks them about its own implementations, and let the
    layers that have a forward of ours know it."""
    names.add(name)
    for module in dispatch.FAMILIES:
        dispatch.reach(module, names)
    for method, ours in _OURS.items():
        setattr(PreTrainedModel, method, ours)


def forget(name: str) -> None:
    """No longer ask about this name; after the last one transformers is as it was, unless somebody else changed it."""
    names.discard(name)
    for method, ours in _OURS.items():
        if not names and vars(PreTrainedModel)[method] is ours:
            setattr(PreTrainedModel, method, _THEIRS[method])


# ------------------------------------------------------------------------------- methods in the place of transformers'

_THEIRS = {
    method: vars(PreTrainedModel)[method]
    for method in ("get_correct_attn_implementation", "_can_set_attn_implementation", "post_init")
}


@functools.wraps(_THEIRS["get_correct_attn_implementation"])
def _get_correct_attn_implementation(
    self: PreTrainedModel, requested_attention: str | None, *args: Any, **kwargs: Any
) -> str:
    # About "sdpa" transformers asks: layers may call F.scaled_dot_product_attention, which reads boolean masks.
    if requested_attention in names - {"sdpa"} and (reason := objection(type(self))) is not None:
        raise ValueError(
            f"attn_implementation={requested_attention!r}: {type(self).__name__} {reason}: use another, such as "
            '"eager" or "sdpa"'
        )
    dispatch.reach(type(self).__module__, names)
    dispatch.tell(self)
    return _THEIRS["get_correct_attn_implementation"](self, requested_attention, *args, **kwargs)


def _can_set_attn_implementation(cls: type[PreTrainedModel]) -> bool:
    return dispatch.reach(cls.__module__, names) or _THEIRS["_can_set_attn_implementation"].__func__(cls)


@functools.wraps(_THEIRS["post_init"])
def _post_init(self: PreTrainedModel) -> None:
    _THEIRS["post_init"](self)
    dispatch.tell(self)


_OURS = {
    "get_correct_attn_implementation": _get_correct_attn_implementation,
    "_can_set_attn_implementation": classmethod(_can_set_attn_implementation),
    "post_init": _post_init,
}
