"""Random attention calls, checked as the parity tests check theirs: ``make fuzz SECONDS=600``.

Each call goes to the Triton backend, to the torch backend, and down every path of it that takes the call, with garbage
where nobody may see it. Every case is drawn from a seed of its own, printed with what fails; sizes are free where the
parity tests have levels. A failing case is made as plain as it can be while it still fails, and printed ready to be
pasted among the named cases of ``test_attention_parity.FOUND``.
"""

import argparse
import dataclasses
import os
import random
import sys
import time

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from tests.ops.attention_cases import AXES, PATHS, Case, check

BACKENDS = ("torch", *PATHS, "triton")
# What a case costs at most: about two seconds in Triton's interpreter.
MOST_COST = 60
HEADS = [*AXES["heads"], (6, 2), (4, 1), (3, 3)]


def draw(seed):
    """A case that makes sense: each feature in it or not, sizes near and off the edges of tiles."""
    rng = random.Random(seed)

    def length():
        return rng.choice([rng.randint(1, 8), rng.randint(1, 290), 64 * rng.randint(1, 4) + rng.randint(-1, 1)])

    def side():
        return rng.choice([None, 0, rng.randint(0, 20), rng.randint(0, 150)])

    while True:
        levels = {axis: rng.choice(choices) for axis, choices in AXES.items()}
        for axis in AXES:  # a third of the features at most: too many hide everything from everybody
            if rng.random() < 0.5:
                levels[axis] = getattr(Case(), axis)
        levels |= {
            "dtype": rng.choice(AXES["dtype"]),
            "batch": rng.randint(1, 3),
            "heads": rng.choice(HEADS),
            "seqlen_q": (rows := length()),
            "seqlen_k": rng.choice([rows, length()]),
            "head_dim": rng.choice([rng.randint(1, 80), rng.choice(AXES["head_dim"])]),
            "window": rng.choice([None, (side(), side())]),
        }
        if levels["softcap"] is not None:
            levels["softcap"] = round(rng.uniform(0.5, 50), 2)
        case = Case(**levels, seed=seed)
        if case.makes_sense and case.cost <= MOST_COST:
            return case


def failure(case, backend, device):
    """What is wrong with a case, or None."""
    try:
        check("fuzz", case, backend, device)
    except Exception as error:  # a crash is a finding as much as a wrong number
        return f"{type(error).__name__}: {error}"
    return None


def simplified(case, backend, device, seconds=60.0):
    """The case with as many plain levels as leave it failing."""
    end = time.monotonic() + seconds
    for field in 2 * dataclasses.fields(Case):  # twice: a level may be needed by one that goes later
        plainer = dataclasses.replace(case, **{field.name: field.default})
        if field.name != "seed" and plainer != case and plainer.makes_sense and time.monotonic() < end:
            case = plainer if failure(plainer, backend, device) else case
    return case


def spelled(case):
    """The case as Python, without its plain levels."""
    levels = {f.name: getattr(case, f.name) for f in dataclasses.fields(Case) if getattr(case, f.name) != f.default}
    return f"Case({', '.join(f'{name}={level!r}' for name, level in levels.items())})"


def fuzz(seeds, backends, device, *, seconds=float("inf"), report=print):
    """Check cases until the seeds or the seconds are used up; ``(how many were checked, how many failed)``."""
    end, checked, failed = time.monotonic() + seconds, 0, 0
    for seed in seeds:
        if time.monotonic() >= end:
            break
        case = draw(seed)
        for backend in backends:
            if case.dropout and backend in PATHS:
                continue  # each path would draw weights of its own
            checked += 1
            message = failure(case, backend, device)
            if message is not None:
                failed += 1
                plain = simplified(case, backend, device)
                report(f"\nFAILED on {backend}, --seed {seed}: {message}\n  {spelled(case)}\nfor FOUND, made plain:")
                report(f'    "what it shows": {spelled(plain)},  # {backend}')
    return checked, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to draw cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the first case, the others count up; default: random")
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default: each of them")
    arguments = parser.parse_args()
    first = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"fuzzing attention on {device} for {arguments.seconds:g} s, seeds from {first}", flush=True)

    def seeds():
        last = time.monotonic()
        for seed in range(first, first + 10**6):
            if time.monotonic() - last > 30:
                last = time.monotonic()
                print(f"  seed {seed}", flush=True)
            yield seed

    checked, failed = fuzz(seeds(), arguments.backend or BACKENDS, device, seconds=arguments.seconds)
    print(f"{checked} calls checked, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
