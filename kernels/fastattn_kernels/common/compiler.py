"""A repair to the compiler of Triton 3.6, after which a function may return a tuple in which something is None.

From 3.7 on it may. 3.6 turns every constant that a function returns into a tensor, those inside of tuples as well, and
None cannot become one: no kernel that calls ``packed.find_tile`` would compile.
"""

from typing import Any

import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic


def _letting_none_through(to_tensor: Any) -> Any:
    def repaired(self: Any, value: Any, check_type: bool = True) -> Any:
        if isinstance(value, tl.constexpr) and value.value is None:
            return value
        return to_tensor(self, value, check_type)

    return repaired


def repair() -> None:
    """Install the repair where it is needed. Once, before the first launch."""
    if triton.__version__.startswith("3.6."):
        semantic: Any = TritonSemantic
        semantic.to_tensor = _letting_none_through(semantic.to_tensor)
