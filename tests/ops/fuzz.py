"""Random calls of the functions of attention, checked as the parity tests check theirs:
``make fuzz SECONDS=600``.

Each call goes to the Triton backend and to the torch backend, one of ``attention`` down every path of it that takes the
call, with garbage where nobody may see it. Every case is drawn from a seed of its own, printed with what fails; sizes
are free where the parity tests have levels. A failing case is made as plain as it can be while it still fails, and
printed ready to be pasted among the named cases, ``FOUND``, of test_attention_parity.py or test_varlen_parity.py, or
among those of test_kvcache.py.
"""

import argparse
import dataclasses
import itertools
import os
import random
import sys
import time
from typing import Any, NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from tests.ops import attention_cases, kvcache_cases, varlen_cases

# What a case costs at most: about a second in Triton's interpreter.
MOST_COST = 60
MORE_HEADS = [(6, 2), (4, 1), (3, 3)]


def levels_of(rng, axes, plain):
    """A level of each axis, about half of them plain: too many features hide everything from everybody."""
    return {
        axis: rng.choice(choices) if axis == "dtype" or rng.random() < 0.5 else getattr(plain, axis)
        for axis, choices in axes.items()
    }


def length_of(rng):
    return rng.choice([rng.randint(1, 8), rng.randint(1, 290), 64 * rng.randint(1, 4) + rng.randint(-1, 1)])


def side_of(rng):
    return rng.choice([None, 0, rng.randint(0, 20), rng.randint(0, 150)])


def free_levels(rng, axes, softcap):
    """Of what all have in common."""
    return {
        "heads": rng.choice([*axes["heads"], *MORE_HEADS]),
        "window": rng.choice([None, (side_of(rng), side_of(rng))]),
        "softcap": None if softcap is None else round(rng.uniform(0.5, 50), 2),
    }


def draw_attention(rng):
    axes = attention_cases.AXES
    levels = levels_of(rng, axes, attention_cases.Case())
    levels |= free_levels(rng, axes, levels["softcap"]) | {
        "batch": rng.randint(1, 3),
        "seqlen_q": (rows := length_of(rng)),
        "seqlen_k": rng.choice([rows, length_of(rng)]),
        "head_dim": rng.choice([rng.randint(1, 80), rng.choice(axes["head_dim"])]),
    }
    return attention_cases.Case(**levels)


def draw_varlen(rng):
    """From no sequence at all to nine of them, some without rows, without keys or without either."""
    axes = varlen_cases.AXES
    levels = levels_of(rng, axes, varlen_cases.Case())

    def lengths():
        longest = rng.choice([8, 70, 200])
        return [rng.choice([0, rng.randint(1, longest), rng.randint(1, longest)]) for _ in range(sequences)]

    sequences = rng.choice([0, 1, *range(1, 10)])
    rows = lengths()
    width = rng.randint(1, 80)
    levels |= free_levels(rng, axes, levels["softcap"]) | {
        "lengths": (rows, rows if rng.random() < 0.3 else lengths(), rng.choice([0, 0, rng.randint(1, 70)])),
        "widths": (width, rng.choice([width, rng.randint(1, 80)])),
        "prefix": rng.choice([None, None, rng.randint(0, 60), "each"]),
        "dropout": rng.choice([0.0, 0.0, 0.0, 0.3]),
        "garbage": rng.choice([None, *attention_cases.AXES["garbage"]]),
    }
    return varlen_cases.Case(**levels)


def draw_kvcache(rng):
    """Up to five sequences, from one that holds nothing to one that fills its room but for the new tokens."""
    axes = kvcache_cases.AXES
    levels = levels_of(rng, axes, kvcache_cases.Case())
    longest, width = rng.choice([8, 70, 300]), rng.randint(1, 80)
    levels |= free_levels(rng, axes, levels["softcap"]) | {
        "held": tuple(rng.choice([0, rng.randint(1, longest), longest]) for _ in range(rng.randint(1, 5))),
        "length": rng.choice([1, 1, 2, rng.randint(1, 20)]),
        "widths": (width, rng.choice([width, rng.randint(1, 80)])),
        "page_size": rng.choice([None, 16, 64, rng.randint(1, 100)]),
        "num_splits": rng.choice([0, 1, rng.randint(1, 9)]),
    }
    return kvcache_cases.Case(**levels)


class Kind(NamedTuple):
    """One of the functions that are fuzzed."""

    draw: Any
    cases: Any  # the module with its cases
    backends: tuple[str, ...]


KINDS = {
    "attention": Kind(draw_attention, attention_cases, ("torch", *attention_cases.PATHS, "triton")),
    "attention_varlen": Kind(draw_varlen, varlen_cases, ("torch", "triton")),
    "attention_with_kvcache": Kind(draw_kvcache, kvcache_cases, ("torch", "triton")),
}
BACKENDS = KINDS["attention"].backends


def draw(seed, kind="attention"):
    """A case that makes sense: each feature in it or not, sizes near and off the edges of tiles."""
    rng = random.Random(seed)
    while True:
        case = dataclasses.replace(KINDS[kind].draw(rng), seed=seed)
        if case.makes_sense and case.cost <= MOST_COST:
            return case


def failure(kind, case, backend, device):
    """What is wrong with a case, or None."""
    try:
        KINDS[kind].cases.check("fuzz", case, backend, device)
    except Exception as error:  # a crash is a finding as much as a wrong number
        return f"{type(error).__name__}: {error}"
    return None


def simplified(kind, case, backend, device, seconds=60.0):
    """The case with as many plain levels as leave it failing."""
    end = time.monotonic() + seconds
    for field in 2 * dataclasses.fields(case):  # twice: a level may be needed by one that goes later
        plainer = dataclasses.replace(case, **{field.name: field.default})
        if field.name != "seed" and plainer != case and plainer.makes_sense and time.monotonic() < end:
            case = plainer if failure(kind, plainer, backend, device) else case
    return case


def spelled(case):
    """The case as Python, without its plain levels."""
    levels = {f.name: getattr(case, f.name) for f in dataclasses.fields(case) if getattr(case, f.name) != f.default}
    return f"Case({', '.join(f'{name}={level!r}' for name, level in levels.items())})"


def fuzz(seeds, backends, device, *, kinds=tuple(KINDS), seconds=float("inf"), report=print):
    """Check a case of each kind for each seed until the seeds or the seconds are used up; ``(how many were checked, how
    many failed)`` by kind."""
    end, counts = time.monotonic() + seconds, {kind: [0, 0] for kind in kinds}
    for seed, kind in itertools.product(seeds, kinds):
        if time.monotonic() >= end:
            break
        case = draw(seed, kind)
        for backend in backends:
            if backend not in KINDS[kind].backends or (case.dropout and backend in attention_cases.PATHS):
                continue  # each path would draw weights of its own
            counts[kind][0] += 1
            message = failure(kind, case, backend, device)
            if message is not None:
                counts[kind][1] += 1
                plain = simplified(kind, case, backend, device)
                report(f"\nFAILED: {kind} on {backend}, --seed {seed}: {message}\n  {spelled(case)}")
                report(f'for FOUND, made plain:\n    "what it shows": {spelled(plain)},  # {backend}')
    return {kind: tuple(count) for kind, count in counts.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to draw cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the first cases, the others count up; default: random")
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default: each of them")
    parser.add_argument("--kind", choices=KINDS, action="append", help="which function; default: each of them")
    arguments = parser.parse_args()
    first = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    kinds = arguments.kind or tuple(KINDS)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"fuzzing {' and '.join(kinds)} on {device} for {arguments.seconds:g} s, seeds from {first}", flush=True)

    def seeds():
        last = time.monotonic()
        for seed in range(first, first + 10**6):
            if time.monotonic() - last > 30:
                last = time.monotonic()
                print(f"  seed {seed}", flush=True)
            yield seed

    counts = fuzz(seeds(), arguments.backend or BACKENDS, device, kinds=kinds, seconds=arguments.seconds)
    for kind, (checked, failed) in counts.items():
        print(f"{kind}: {checked} calls checked, {failed} failed")
    return 1 if any(failed for _, failed in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
