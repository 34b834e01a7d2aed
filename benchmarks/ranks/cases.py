"""What is measured: calls of attention, forward and backward, each by several ways of sharing a sequence out."""

from __future__ import annotations

import dataclasses
from typing import Literal

from fastattn.distributed.layout import Balance

Kind = Literal["methods", "balances", "delays", "public"]
Method = Literal["one process", "ring", "allgather", "ulysses", "2d", "torch ring", "torch context_parallel"]

HEADS, HEAD_DIM = 8, 64
ALONE = "one process"
_DELAYS_MS = (0.0, 5.0, 20.0, 80.0)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to compute a call.

    Attributes:
        method: one of ours, one process doing all of it, or a peer's.
        balance: which tokens a rank has.
        is_at_once: whether each message is waited for as soon as it is on its way, so that nothing is computed
            meanwhile.
        delay_ms: how long after its sending a message arrives at the earliest; None: as soon as it can.
        backend: of the peer's SDPA, or empty.
    """

    method: Method
    balance: Balance = "none"
    is_at_once: bool = False
    delay_ms: float | None = None
    backend: Literal["", "default", "math"] = ""

    @property
    def name(self) -> str:
        """As tables have it."""
        words = [self.method if self.balance == "none" else f"{self.method}, {self.balance}"]
        words += [f"SDPA {self.backend}"] if self.backend else []
        words += ["waiting at once"] if self.is_at_once else []
        words += [f"messages {self.delay_ms:g} ms late"] if self.delay_ms is not None else []
        return ", ".join(words)

    @property
    def is_peer(self) -> bool:
        """Is it torch's, and not this package's?"""
        return self.method.startswith("torch")


@dataclasses.dataclass(frozen=True)
class Case:
    """A call, and the variants that are timed in turn."""

    kind: Kind
    length: int
    is_causal: bool
    variants: tuple[Variant, ...]


def cases(world: int, lengths: tuple[int, ...]) -> list[Case]:
    """All of them, for a number of ranks; what is measured at one length is so at the middle one."""
    alone, ring = Variant("one process"), Variant("ring")
    two_dimensions = [Variant("2d")] if world % 2 == 0 and world > 2 else []
    methods = (
        alone,
        ring,
        dataclasses.replace(ring, is_at_once=True),
        Variant("allgather"),
        Variant("ulysses"),
        *two_dimensions,
        Variant("torch ring"),
    )
    balanced = (alone, *(Variant("ring", balance=balance) for balance in ("none", "zigzag", "stripe")))
    delayed = tuple(
        Variant("ring", is_at_once=is_at_once, delay_ms=delay) for delay in _DELAYS_MS for is_at_once in (False, True)
    )
    public = tuple(Variant("torch context_parallel", backend=backend) for backend in ("default", "math"))
    middle = lengths[len(lengths) // 2]
    return [
        *(Case("methods", length, False, methods) for length in lengths),
        Case("balances", middle, True, balanced),
        Case("delays", middle, False, delayed),
        Case("public", middle, True, public),
    ]
