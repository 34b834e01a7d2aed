"""What a machine finds wrong with a kernel, beside wrong numbers."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal[
    "deadlock",  # nobody can go on
    "over-arrival",  # a barrier is told of more arrivals, or of more bytes, than it waits for
    "in flight",  # memory or a value is used while a copy or a product still reads or writes it
    "fence",  # the asynchronous proxy touches what generic accesses did, without a fence between them
    "race",  # two programs touch one element, and the result depends on who comes first
    "out of bounds",  # an access outside every tensor of the launch
    "undefined",  # an operation without a defined result
    "unfinished",  # a program ends before what it has started
]


class Finding(Exception):
    """A fault of a kernel that a machine has seen: its kind, what happened, and where."""

    def __init__(self, kind: Kind, what: str, where: str = "") -> None:
        if kind not in get_args(Kind):
            raise ValueError(f"kind={kind!r}: it is one of {', '.join(get_args(Kind))}")
        super().__init__(f"{kind}: {what}" + (f"\n  at {where}" if where else ""))
        self.kind: Kind = kind
        self.what, self.where = what, where
