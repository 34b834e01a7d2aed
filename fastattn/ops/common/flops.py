"""What torch's ``FlopCounterMode`` counts for the operators: what it counts for torch's own attention."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fastattn.ops.attention.contract import GRADIENTS, INPUTS, Options

Shape = tuple[int, ...]


def make_countable() -> None:
    """Tell a counter that is active what the operators are worth. Called before each of them.

    The counter's module cannot be imported along with this package, because it imports triton; and a counter copies
    the formulas that there are when it is made, so that those which are new have to be given to it.
    """
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return
    counting: Any = sys.modules.get("torch.utils.flop_counter")
    if counting is None:
        return
    operators = torch.ops.fastattn
    formulas = {
        operators.attention_forward: _attention_forward,
        operators.attention_backward: _attention_backward,
        operators.additive_forward: _additive_forward,
        operators.additive_backward: _additive_backward,
    }
    for operator, formula in formulas.items():
        if operator not in counting.flop_registry:
            counting.register_flop_formula(operator)(formula)
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(counter := getattr(mode, "counter", None), counting.FlopCounterMode):
            for operator in formulas:
                counter.flop_registry.setdefault(operator, counting.flop_registry[operator])


def _product(query: Shape, key: Shape, size: int) -> int:
    """A product of a head's rows of ``size`` elements for every query and key; a multiplication and an addition are
    two."""
    batch, heads, length = query[:3]
    return 2 * batch * heads * length * key[2] * size


def _attention_forward(query: Shape, key: Shape, value: Shape, *rest: Any, **_: Any) -> int:
    """``Q K^T`` and ``P V``. What masks hide is counted, as torch counts it."""
    return _product(query, key, query[3]) + _product(query, key, value[3])


def _attention_backward(*args: Any, **_: Any) -> int:
    """``dQ``, ``dK``, ``dV`` and ``dP``; and ``Q K^T`` again, where torch's module would not have kept the weights."""
    query, key, value = args[GRADIENTS : GRADIENTS + 3]  # the counter gives shapes in the place of tensors
    options = Options(*args[GRADIENTS + INPUTS :])
    of_scores = 3 if options.weights == "none" else 2
    return of_scores * _product(query, key, query[3]) + 2 * _product(query, key, value[3])


def _additive_forward(query: Shape, key: Shape, value: Shape, *rest: Any, **_: Any) -> int:
    """``P V``: the scores are no product of matrices, and the counter counts nothing else."""
    return _product(query, key, value[3])


def _additive_backward(*args: Any, **_: Any) -> int:
    """``dV`` and ``dP``."""
    query, key, value = args[6:9]
    return 2 * _product(query, key, value[3])
