"""Functions of a user's inside the kernels: of text, a function of Triton; and what a problem is told of one.

A kernel calls them by two fields of its argument ``rules`` (``arguments.Rules``): ``score_mod`` changes a score, and
``mask_mod`` says whether a query may see a key. Such a function is a constant to Triton, which compiles a kernel for
each text anew; tensors that it reads are arguments, whose numbers, sizes and strides change as those of any other.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import linecache
from types import ModuleType
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.common import arithmetic
from fastattn_kernels.common.arguments import Captured, MaskMod, ScoreMod, pointer_and_strides
from fastattn_kernels.common.masking import tanh

_ARITHMETIC = {
    function.__name__: function
    for function in (
        arithmetic.divided_down,
        arithmetic.divided_to_zero,
        arithmetic.expm1,
        arithmetic.index_on_axis,
        arithmetic.is_on_axis,
        arithmetic.log1p,
        arithmetic.power,
        arithmetic.rest,
        arithmetic.round_to_even,
    )
}


@functools.cache
def compiled(source: str, name: str) -> Any:
    """The function ``name`` of a text, in which each function is decorated with ``@triton.jit``.

    The text finds ``triton``, ``tl``, ``tanh`` and the functions of ``arithmetic`` in its module. Module and
    file are named after the text, so that one text is one entry of Triton's cache in every process, and functions of
    two texts never are one symbol of a kernel.

    Raises:
        SyntaxError: the text is not Python.
        KeyError: it has no function of that name.
    """
    digest = hashlib.sha256(source.encode()).hexdigest()[:32]
    module = ModuleType(f"fastattn_function_{digest}")
    file = f"<{module.__name__}>"
    # Without a time of change, the lines stay, and Triton, which reads a function's source, finds them.
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    vars(module).update(triton=triton, tl=tl, tanh=tanh, **_ARITHMETIC)
    exec(compile(source, file, "exec"), vars(module))
    return vars(module)[name]


@dataclasses.dataclass(frozen=True)
class Modifier:
    """A function that changes scores, or hides keys, and what it reads.

    Its indices are int32 scalars or tiles that broadcast against the tile of scores, in either orientation, and lie
    inside the sequence; scores are float32 and natural, not in base 2; ``captured`` is a tuple of
    ``arguments.Captured``. What it returns broadcasts against the tile.

    Attributes:
        function: ``(score, batch, head, query_index, key_index, captured)``, the score behind it; of a mask without the
            first of these, whether the query may see the key.
        gradient: ``(d, score, batch, head, query_index, key_index, captured)``, the gradient of the score in front of
            the function, from ``d``, that of the score behind it; None for a mask, or where nothing is differentiated.
        captured: tensors of up to 8 axes, any strides; booleans are seen as bytes.
        batches: whether what a mask says depends on the batch entry.
        heads: whether it depends on the head.
        is_heavy: whether it takes so many registers for a pair that only the smallest tiles have enough of them.
    """

    function: Any
    gradient: Any = None
    captured: tuple[Tensor, ...] = ()
    batches: bool = True
    heads: bool = True
    is_heavy: bool = False

    def score_mod(self) -> ScoreMod:
        """The field ``score_mod`` of the kernel argument ``rules``."""
        # triton 3.6 does not compile whether a tuple is None that holds None: a gradient that is not there is never
        # called, and any function can stand for it
        return ScoreMod(self._captured(), self.gradient or self.function, self.function)

    def mask_mod(self) -> MaskMod:
        """The field ``mask_mod`` of the kernel argument ``rules``."""
        return MaskMod(self._captured(), self.function)

    def _captured(self) -> tuple[Captured, ...]:
        described = ((tensor, pointer_and_strides(tensor)) for tensor in self.captured)
        return tuple(Captured(ptr, tuple(tensor.shape), tuple(strides)) for tensor, (ptr, *strides) in described)
