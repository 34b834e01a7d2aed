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


def install() -> None:
    """From now on ask models about :data:`names`, where transformers asks them about its own implementations."""
    for module in dispatch.FAMILIES:
        dispatch.reach(module, names)
    check = PreTrainedModel.get_correct_attn_implementation
    if getattr(check, "_asks_about_names", False):
        return
    can_set, finish = PreTrainedModel._can_set_attn_implementation, PreTrainedModel.post_init

    @functools.wraps(check)
    def checked(self: PreTrainedModel, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        reached = dispatch.reach(type(self).__module__, names)
        # About "sdpa" transformers asks: layers may call F.scaled_dot_product_attention, which reads boolean masks.
        if not reached and requested_attention in names - {"sdpa"} and misreads_masks(type(self)):
            raise ValueError(
                f"attn_implementation={requested_attention!r}: {type(self).__name__} computes attention in its own "
                'layers, which fastattn does not reach: use another, such as "eager" or "sdpa"'
            )
        dispatch.tell(self)
        return check(self, requested_attention, *args, **kwargs)

    @functools.wraps(can_set.__func__)
    def may_be_set(cls: type[PreTrainedModel]) -> bool:
        return dispatch.reach(cls.__module__, names) or can_set.__func__(cls)

    @functools.wraps(finish)
    def finished(self: PreTrainedModel) -> None:
        finish(self)
        dispatch.tell(self)

    setattr(checked, "_asks_about_names", True)  # noqa: B010, functions have no such attribute to type checkers
    PreTrainedModel.get_correct_attn_implementation = checked
    setattr(PreTrainedModel, "_can_set_attn_implementation", classmethod(may_be_set))  # noqa: B010, as above
    PreTrainedModel.post_init = finished
