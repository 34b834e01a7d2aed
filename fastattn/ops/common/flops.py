"""What torch's ``FlopCounterMode`` counts for the operators: what it counts for torch's own attention."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_formulas: dict[Any, Callable[..., int]] = {}


def add_formula(operator: Any, formula: Callable[..., int]) -> None:
    """Let ``formula`` say what a call of ``operator`` (``torch.ops.fastattn.<name>``) is worth.

    Args:
        operator: the packet of overloads.
        formula: of the operator's arguments, each tensor replaced by its shape.
    """
    _formulas[operator] = formula


def make_countable() -> None:
    """Tell the counters that are active what the operators are worth. Called before each of them runs.

    The counter's module imports triton, so that this package cannot import it. A counter copies the formulas that exist
    when it is made, so that the operators' formulas have to be handed to each counter as well.
    """
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return
    counting: Any = sys.modules.get("torch.utils.flop_counter")
    if counting is None:
        return
    for operator, formula in _formulas.items():
        if operator not in counting.flop_registry:
            counting.register_flop_formula(operator)(formula)
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(counter := getattr(mode, "counter", None), counting.FlopCounterMode):
            for operator in _formulas:
                counter.flop_registry.setdefault(operator, counting.flop_registry[operator])


def product_flops(query: Sequence[int], key: Sequence[int], size: int) -> int:
    """The operations of one matrix product that has ``size`` terms for every query and key, from the shapes of query
    and key. A multiplication and an addition are two operations. Pairs that masks hide are counted, as torch counts."""
    batch, heads, length = query[:3]
    return 2 * batch * heads * length * key[2] * size
