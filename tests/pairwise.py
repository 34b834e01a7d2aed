"""Few cases that hold every pair of levels: a greedy cover, the same in every run; and which pairs a run has met."""

import itertools
import random

# What the tests of this process have met: (operation, backend, levels by axis), of plain values, which processes can
# exchange.
met = []


def pairwise(axes, allowed=lambda case: True, attempts=6):
    """A list of dicts in which every two levels of different axes meet, as far as ``allowed`` lets them.

    Args:
        axes: the levels of each axis, by name; the plainest, most often allowed one first.
        allowed: whether a complete case makes sense.
        attempts: how many completions of each case compete; more give fewer cases. Every second one starts from the
            first levels and stays allowed while it improves, the others start anywhere.
    """
    rng = random.Random(0)
    names = list(axes)
    # Inside, a level is its number, and a pair is two (axis, level), in alphabetical order.
    missing = _all_pairs(axes)
    partners: dict = {}
    for one, other in missing:
        partners.setdefault(one, set()).add(other)
        partners.setdefault(other, set()).add(one)

    def gain(case, name, level):
        wanted = partners[name, level]
        return sum(1 for item in case.items() if item in wanted)

    def makes_sense(case):
        return allowed({name: axes[name][level] for name, level in case.items()})

    cases = []
    for seed_pair in sorted(missing):
        if seed_pair not in missing:
            continue
        best, best_gain = None, 0
        for attempt in range(attempts):
            case = {name: 0 if attempt % 2 == 0 else rng.randrange(len(axes[name])) for name in names}
            case |= dict(seed_pair)
            # Passes of improvement: each axis takes the level that meets the most new partners.
            for name in (*rng.sample(names, len(names)), *rng.sample(names, len(names))):
                if name not in dict(seed_pair):
                    order = rng.sample(range(len(axes[name])), len(axes[name]))
                    for level in sorted(order, key=lambda level: -gain(case, name, level)):
                        if makes_sense(case | {name: level}):
                            case[name] = level
                            break
            total = len(_pairs(case) & missing)
            if total > best_gain and makes_sense(case):
                best, best_gain = case, total
        if best is None:
            continue  # no case that makes sense holds it
        cases.append({name: axes[name][best[name]] for name in names})
        for one, other in _pairs(best) & missing:
            missing.discard((one, other))
            partners[one].discard(other)
            partners[other].discard(one)
    return cases


def _pairs(case):
    return set(itertools.combinations(sorted(case.items()), 2))


def _all_pairs(axes):
    """All pairs of levels, each level as (axis, number)."""
    return {
        ((a, i), (b, j))
        for a, b in itertools.combinations(sorted(axes), 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }


def coverage(axes, cases):
    """One sentence: how many of all pairs of levels the ``cases`` hold, and the names of some that they do not."""
    wanted = _all_pairs(axes)
    found = set()
    for case in cases:  # levels that are not among those of `axes` count for nothing
        found |= _pairs({name: axes[name].index(case[name]) for name in axes if case[name] in axes[name]})
    absent = sorted(wanted - found)
    sentence = f"{len(found)} of {len(wanted)} met"
    if absent:
        some = ", ".join(" with ".join(f"{name} {axes[name][level]}" for name, level in pair) for pair in absent[:8])
        sentence += f"; not met: {some}" + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
    return sentence
