"""Few cases that hold every pair of levels: a greedy cover, the same in every run."""

import itertools
import random


def pairwise(axes, allowed=lambda case: True, attempts=5):
    """A list of dicts in which every two levels of different axes meet, as far as ``allowed`` lets them.

    Args:
        axes: the levels of each axis, by name.
        allowed: whether a complete case makes sense.
        attempts: how many random completions of each case compete; more give fewer cases.
    """
    rng = random.Random(0)
    names = list(axes)
    order = {name: {level: i for i, level in enumerate(axes[name])} for name in names}

    def pairs_of(case):
        levels = [(name, order[name][case[name]]) for name in names]
        return set(itertools.combinations(levels, 2))

    missing = {
        ((a, order[a][x]), (b, order[b][y]))
        for a, b in itertools.combinations(names, 2)
        for x in axes[a]
        for y in axes[b]
    }
    cases = []
    while missing:
        (a, i), (b, j) = seed_pair = min(missing)
        best, best_gain = None, 0
        for _ in range(attempts):
            case = {name: rng.choice(axes[name]) for name in names}
            case[a], case[b] = axes[a][i], axes[b][j]
            # One pass of improvement: each axis takes the level that meets the most new partners.
            for name in rng.sample(names, len(names)):
                if name not in (a, b):
                    gains = {level: len(pairs_of(case | {name: level}) & missing) for level in axes[name]}
                    case[name] = max(axes[name], key=gains.__getitem__)
            gain = len(pairs_of(case) & missing)
            if allowed(case) and gain > best_gain:
                best, best_gain = case, gain
        if best is None:
            missing.discard(seed_pair)  # no case that makes sense holds it
            continue
        cases.append(best)
        missing -= pairs_of(best)
    return cases
