"""Traces are remembered: a function is traced again only where something that the trace depends on has changed."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

from fastattn.ops.attention.functions.reading import Reading
from fastattn.ops.attention.functions.tracing import Kind, Traced, trace

_MOST = 1024  # traces that are remembered
_remembered: collections.OrderedDict[Hashable, tuple[Traced, list[int], list[Any]]] = collections.OrderedDict()
_lock = threading.Lock()


def traced(
    kind: Kind, function: Callable[..., Any], arguments: Sequence[Tensor]
) -> tuple[Traced, list[tuple[Tensor, bool]]]:
    """The trace of a function, and the tensors that it captures now, each with whether the function makes it itself."""
    reading = Reading()
    key: Hashable = None
    if reading.read((function, *arguments)):
        key = (kind, *reading.parts)
        with _lock:
            known = _remembered.get(key)
        if known is not None:
            found, numbers, _ = known
            literals = found.captured[len(found.captured) - found.literals :]
            return found, [*((reading.tensors[n], False) for n in numbers), *((t, True) for t in literals)]
    found = trace(kind, function, arguments)
    own = found.captured[: len(found.captured) - found.literals]
    if key is not None:
        places = [next((n for n, t in enumerate(reading.tensors) if t is tensor), None) for tensor in own]
        if None not in places:
            with _lock:
                # what is compared by identity stays alive, so that no other object gets its identity
                _remembered[key] = found.only_literals(), places, reading.identities  # type: ignore[assignment]
                while len(_remembered) > _MOST:
                    _remembered.popitem(last=False)
    return found, [(t, number >= len(own)) for number, t in enumerate(found.captured)]
