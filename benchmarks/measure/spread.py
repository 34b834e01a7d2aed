"""A median, how far its samples lie apart, and how far it can be trusted."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Spread:
    """What is said of samples.

    Attributes:
        median: of the samples.
        p20: the 20th percentile; a fifth of the samples lie below it.
        p80: the 80th percentile.
        low: the lower end of a 95 % confidence interval of the median.
        high: its upper end.

    The interval runs from one order statistic to another, and its level follows from coin throws: each sample falls
    below the true median with a chance of one half. It asks nothing of the distribution, but for samples that do not
    depend on each other; a drift of the machine breaks that, and cancels in the ratios of pairs. Five samples or fewer
    cannot give 95 %: then it is all that they span.
    """

    median: float
    p20: float
    p80: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        last, rank = len(ordered) - 1, _rank(len(ordered))
        percentiles = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
        return cls(statistics.median(ordered), *percentiles, ordered[rank - 1], ordered[-rank])


@functools.cache
def _rank(count: int) -> int:
    """Which of so many samples, counted from either side, ends the interval.

    The k-th smallest lies above the true median where fewer than k samples lie below it. As many of the ``2 ** count``
    outcomes as make up 2.5 % may do so on either side.
    """
    outcomes, rank = math.comb(count, 0), 0
    while 40 * outcomes <= 2**count:
        rank += 1
        outcomes += math.comb(count, rank)
    return max(rank, 1)
