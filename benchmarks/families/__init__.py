"""What is measured: the families, and the cases of each."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import Case
from benchmarks.families import (
    additive,
    attention,
    decode,
    functions,
    hugging_face,
    kernels,
    layer,
    module,
    norm,
    sequence,
    varlen,
)
from benchmarks.variants import Family

# In the order in which a run meets them: one that ends early has met the first.
_MODULES: tuple[Any, ...] = (
    sequence,
    attention,
    norm,
    layer,
    module,
    additive,
    varlen,
    decode,
    functions,
    hugging_face,
    kernels,
)


def families() -> dict[str, Family[Any]]:
    """Every family by name."""
    return {module.FAMILY.name: module.FAMILY for module in _MODULES}


def quick_cases() -> list[Case]:
    """What ``make bench`` runs on a CPU, in under three minutes."""
    return [case for module in _MODULES for case in module.quick_cases()]


def all_cases() -> list[Case]:
    """The quick cases and the longer ones."""
    more = (case for module in _MODULES for case in module.more_cases())
    return list(dict.fromkeys([*quick_cases(), *more]))
