"""What an experiment is: it trains or computes, states what the lecture claims, and draws what came out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One thing that the lecture says, and its proof.

    ``run(quick, seed, say)`` returns plain values that JSON can hold: ``rows``, a table as a list of dicts; ``claims``,
    each a dict of ``text``, ``value``, ``bound`` and ``holds``; and whatever ``draw`` needs to make the picture of it.
    ``say`` takes a line on how far it is. For a seed, on one thread, a run repeats.

    Attributes:
        name: of its module, and of the files that are written.
        systems: of the lecture, as in ``("S1", "S2")``.
        claim: what is shown, in a sentence.
    """

    name: str
    systems: tuple[str, ...]
    claim: str
    run: Callable[[bool, int, Callable[[str], None]], dict[str, Any]]
    draw: Callable[[dict[str, Any]], Figure]
