"""The public function that says which method and backend a call on shards would go by, and why; nothing is sent."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastattn.distributed.api import context_parallel_attention
from fastattn.distributed.call import Tensors, Words, check, triton_refusals
from fastattn.distributed.choosing import auto, left_out, modelled, unknown_of, workload_of
from fastattn.distributed.layout import places_in, ranks_of
from fastattn.distributed.model import Estimate
from fastattn.distributed.traffic import METHODS, Method
from fastattn.distributed.workload import Workload
from fastattn.ops.attention import on_triton
from fastattn.ops.common import backends


@dataclass(frozen=True)
class MethodExplanation:
    """What :func:`fastattn.distributed.explain` found. Printed, it says so in a few lines.

    Args:
        method: by which the call would go.
        reason: why by this one, in words.
        estimates: what the communication model has for the call by each method that it could go by, the fastest first;
            empty of a call that the model does not know.
        unknown: what of the call the model does not know.
        left_out: of each method that ``"auto"`` does not choose from, the reason.
        workload: the call in the model's terms, to be asked about other ranks and links; None where it has none.
        backend: on which backend the parts would run, and why not on the other.
    """

    method: Method
    reason: str
    estimates: dict[Method, Estimate]
    unknown: tuple[str, ...]
    left_out: dict[Method, str]
    workload: Workload | None
    backend: backends.Explanation

    def __str__(self) -> str:
        lines = [f"{self.method}: {self.reason}"]
        lines += [f"estimate of {estimate}" for estimate in self.estimates.values()]
        if self.unknown:
            lines.append(f"no estimates: the communication model does not know {' and '.join(self.unknown)}")
        lines += [f"not {method}: {reason}" for method, reason in self.left_out.items() if method != self.method]
        return "\n".join([*lines, str(self.backend)])


def explain(*arguments: Any, **keywords: Any) -> MethodExplanation:
    """Say by which method and on which backend a call on shards would go, and why; nothing is sent or computed.

    A rank asks for itself, of its own arguments, and the others need not. Where they were called with the same
    arguments, as the call itself demands, they would be told the same. Tensors on the device ``meta``, which hold no
    numbers, are told the method too.

    Args:
        *arguments: the first arguments of :func:`fastattn.distributed.context_parallel_attention`, without names.
        **keywords: its other arguments, ``method`` and ``backend`` among them.

    Returns:
        A :class:`fastattn.distributed.MethodExplanation`; ``print`` it. Its times are those of H100 at the figures of
        :mod:`fastattn.distributed.cluster`, wherever it is asked: they rank methods, and by them ``"auto"`` decides.
        Bytes are those of the rank that sends most, in the forward and, in training, the backward.

    Raises:
        TypeError, ValueError, NotImplementedError: as the call itself on this rank.
    """
    bound = inspect.signature(context_parallel_attention).bind(*arguments, **keywords)
    bound.apply_defaults()
    given = dict(bound.arguments)
    places = places_in(given.pop("group_or_mesh"))
    words = Words(**{name: given.pop(name) for name in Words._fields})
    checked = check(Tensors(**given), words, places)
    call, chosen = checked.call, auto(checked.call, places, checked.balance)
    absent, unknown = left_out(call, places, checked.balance), unknown_of(call)
    reason = chosen.reason
    if words.method != "auto":
        other = "the same" if checked.method == chosen.method else chosen.method
        reason = f"asked for; 'auto' would be {other}: {chosen.reason}"
    methods = tuple(each for each in METHODS if each == checked.method or each not in absent)
    estimates = {} if unknown else modelled(call, places, checked.balance, methods).estimates
    by_triton = "parts by the kernels in plain Triton, which give float32"
    runs: dict[str, Callable[[Any], str]] = {
        "torch": lambda _: "plain torch in blocks of rows",
        "triton": on_triton.describe if checked.method == "ulysses" else lambda _: f"{backends.WHERE}: {by_triton}",
    }
    return MethodExplanation(
        method=checked.method,
        reason=reason,
        estimates=dict(estimates),
        unknown=tuple(unknown),
        left_out=absent,
        workload=None if unknown else workload_of(call, ranks_of(places)),
        backend=backends.explain_call(call, checked.backend, triton_refusals, runs),
    )
