"""Which of the Triton backend's kernels of attention run: a choice inside the backend, read when they are launched."""

from __future__ import annotations

import contextlib
import os
from typing import Literal, NamedTuple, cast, get_args

from fastattn.ops.common.switch import Switch

Kernels = Literal["auto", "gluon", "triton"]
ENVIRONMENT_VARIABLE = "FASTATTN_KERNELS"


class KernelChoice(NamedTuple):
    """What :func:`use_kernels` chooses."""

    kernels: Kernels = "auto"
    deterministic: bool = True


def _checked(kernels: str, source: str) -> Kernels:
    if kernels not in get_args(Kernels):
        raise ValueError(f"{source}={kernels!r}: expected one of {', '.join(map(repr, get_args(Kernels)))}")
    return cast(Kernels, kernels)


_choice = Switch(KernelChoice(_checked(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)))


def use_kernels(kernels: Kernels = "auto", *, deterministic: bool = True) -> contextlib.AbstractContextManager[None]:
    """Choose among the Triton backend's kernels of attention inside a ``with`` block (for the whole process).

    Blocks of several threads go together as those of :func:`use_backend` do.

    Read when a kernel is launched: a backward that runs after the block is ruled by what is chosen then.

    Args:
        kernels: ``"auto"`` (the default, also of the environment variable ``FASTATTN_KERNELS``): on Hopper those in
            Gluon where they can, else those in plain Triton; ``"gluon"``: those, or NotImplementedError with the
            reasons; ``"triton"``: the plain ones.
        deterministic: False lets the backward add up the query's gradient in no fixed order, in one pass instead of
            two, where that is expected to be faster: five matrix products instead of seven.

    Raises:
        ValueError: ``kernels`` is none of these.
    """
    return _choice.set(KernelChoice(_checked(kernels, "kernels"), deterministic))


def kernel_choice() -> KernelChoice:
    """What :func:`use_kernels`, or the environment, has chosen."""
    return _choice.value
