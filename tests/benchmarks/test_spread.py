"""A median's confidence interval: its ranks, its coverage, and what noise and drift do to it."""

import random
import statistics

import pytest

from benchmarks.measure.spread import Spread


def _walk(rng: random.Random, steps: int, size: float) -> list[float]:
    """A machine that drifts: each factor is the last one's, give or take ``size``."""
    factors = [1.0]
    while len(factors) < steps:
        factors.append(factors[-1] * (1.0 + rng.uniform(-size, size)))
    return factors


def test_spread_of_known_numbers():
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == Spread(median=3.5, p20=2.0, p80=5.0, low=1.0, high=6.0)


@pytest.mark.parametrize(
    ("count", "low", "high"),
    [(1, 1, 1), (2, 1, 2), (5, 1, 5), (6, 1, 6), (8, 1, 8), (9, 2, 8), (12, 3, 10), (20, 6, 15), (100, 40, 61)],
)
def test_spread_interval_ends_at_known_ranks(count, low, high):
    """As in the tables of the sign test's interval; whatever order the samples come in."""
    values = [float(rank) for rank in range(1, count + 1)]
    random.Random(count).shuffle(values)
    spread = Spread.of(values)
    assert (spread.low, spread.high) == (low, high)


@pytest.mark.parametrize("count", [6, 9, 20, 40])
def test_spread_interval_covers_the_median_of_a_skewed_distribution(count):
    """In at least 95 of a hundred trials (the exact share is 96 to 97), and not by being needlessly wide."""
    rng, trials, covered = random.Random(0), 4000, 0
    for _ in range(trials):
        spread = Spread.of([rng.lognormvariate(0.0, 1.5) for _ in range(count)])
        covered += spread.low <= 1.0 <= spread.high  # the median of this distribution is one
    assert 0.95 <= covered / trials <= 0.98


def test_spread_is_not_moved_by_spikes():
    """A tenth of the samples take thirty times as long: a mean would be four times too large."""
    rng = random.Random(1)
    calm = [rng.gauss(1.0, 0.02) for _ in range(100)]
    noisy = [30.0 * value if index % 10 == 0 else value for index, value in enumerate(calm)]
    before, after = Spread.of(calm), Spread.of(noisy)
    assert statistics.mean(noisy) > 3.5
    for end in ("median", "low", "high", "p80"):
        assert getattr(after, end) == pytest.approx(getattr(before, end), abs=0.02)


def test_spread_of_paired_ratios_withstands_a_common_drift():
    """Both become slower and faster with the machine; sample by sample their ratio stays what it is."""
    rng = random.Random(2)
    drift = _walk(rng, 60, 0.3)
    own = [0.8 * factor * rng.gauss(1.0, 0.01) for factor in drift]
    other = [factor * rng.gauss(1.0, 0.01) for factor in drift]
    paired = Spread.of([a / b for a, b in zip(own, other)])
    assert paired.low < 0.8 < paired.high
    assert paired.high / paired.low < 1.02
    unpaired = Spread.of(own).high / Spread.of(other).low
    assert unpaired / (Spread.of(own).low / Spread.of(other).high) > 1.5
