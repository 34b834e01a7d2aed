"""How evenly the Hopper forward's tiles of rows are shared out, by a simulation: every schedule, mask and length.

A tile of rows takes as long as its products take the tensor cores, and a fixed time beside them. Programs, one a
multiprocessor, take tiles by the rules of ``Schedule`` in the kernels' ``hopper/config.py``; what a call takes is when
the last of them is done. The costs below are estimates, not measurements; nothing is known here of L2, memory or
clocks.

``python -m benchmarks laboratory --schedules`` prints the table that docs/performance_modelled.md has.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

from benchmarks.laboratory.model import CLOCK_HERTZ, FLOP_PER_CYCLE, MULTIPROCESSORS
from benchmarks.reporting.text import Table, table_of

Schedule = Literal["static", "dynamic", "grid"]
Mask = Literal["full", "causal", "window", "padding", "documents"]
MASKS: tuple[Mask, ...] = get_args(Mask)

ROWS = 128  # of a tile
# Beside the products of a tile, in cycles: the first product and the last, which nothing runs under, and the output.
TILE_CYCLES = 1000
# A program that computes one tile only also starts, makes its barriers, and waits for its first keys.
START_CYCLES = 2000
# The launch that sets the counter to 0.
COUNTER_CYCLES = 2e-6 * CLOCK_HERTZ
_ABREAST_BYTES = 24 * 2**20  # as in the kernel's launcher


class Shape(NamedTuple):
    """Of a call: equal lengths of queries and keys, 16 bits, no shared heads."""

    batch: int
    heads: int
    length: int
    head_dim: int

    @property
    def tiles_m(self) -> int:
        """Tiles of rows of a head."""
        return math.ceil(self.length / ROWS)

    @property
    def keys(self) -> int:
        """Of a tile."""
        return 128 if self.head_dim <= 128 else 64

    @property
    def heads_abreast(self) -> int:
        """Heads that advance together, as the kernel's launcher chooses them."""
        return min(max(1, _ABREAST_BYTES // (self.length * 4 * self.head_dim)), self.batch * self.heads)


class Outcome(NamedTuple):
    """Of a call under a schedule.

    Attributes:
        assigned: the tiles, as (tile of rows, head), that each program computes, in its order.
        balance: the mean over the greatest of what the programs' products take.
        efficiency: the share of the whole call's time in which the tensor cores multiply, on the average.
    """

    assigned: list[list[tuple[int, int]]]
    balance: float
    efficiency: float


def order(shape: Shape) -> list[tuple[int, int]]:
    """The tiles in the order in which the kernel numbers them: ``row_tile_at`` in ``hopper/schedule.py``."""
    batch_heads, abreast = shape.batch * shape.heads, shape.heads_abreast
    first = batch_heads % abreast
    begins = [*([0] if first else []), *range(first, batch_heads, abreast), batch_heads]
    return [
        (row_tile, head)
        for begin, end in itertools.pairwise(begins)
        for row_tile in reversed(range(shape.tiles_m))
        for head in range(begin, end)
    ]


def visits(mask: Mask, shape: Shape, seed: int = 0) -> Callable[[int, int], int]:
    """How many tiles of keys a tile of rows of a batch entry visits, at least one. A window is an eighth of the length;
    of keys, a half to all are no padding; eight documents lie side by side, causal each."""
    rng = random.Random(seed)
    kept = [rng.randint(shape.length // 2, shape.length) for _ in range(shape.batch)]
    begins = [sorted({0, *(rng.randrange(shape.length) for _ in range(7))}) for _ in range(shape.batch)]

    def count(row_tile: int, entry: int) -> int:
        first, last = row_tile * ROWS, min((row_tile + 1) * ROWS, shape.length) - 1
        begin, end = 0, shape.length if mask in ("full", "padding") else last + 1
        if mask == "window":
            begin = max(first - shape.length // 8 + 1, 0)
        elif mask == "padding":
            end = kept[entry]
        elif mask == "documents":
            begin = max(start for start in begins[entry] if start <= first)
        return math.ceil(end / shape.keys) - begin // shape.keys

    return count


def simulate(
    schedule: Schedule, mask: Mask, shape: Shape, multiprocessors: int = MULTIPROCESSORS, seed: int = 0
) -> Outcome:
    """A call, as the launcher would make it: without a counter where every tile has a program of its own."""
    tiles, count = order(shape), visits(mask, shape, seed)
    cycles_a_visit = 4 * ROWS * shape.keys * max(shape.head_dim, 64) / FLOP_PER_CYCLE
    products = [count(row_tile, head // shape.heads) * cycles_a_visit for row_tile, head in tiles]
    programs = min(len(tiles), multiprocessors)
    beside = TILE_CYCLES + (START_CYCLES if schedule == "grid" else 0)
    if schedule == "static":
        taken = [list(range(program, len(tiles), programs)) for program in range(programs)]
    else:
        taken = _in_turn([cycles + beside for cycles in products], programs)
    ends = [sum(products[tile] + beside for tile in own) for own in taken]
    once = 0 if schedule == "grid" else START_CYCLES
    once += COUNTER_CYCLES if schedule == "dynamic" and len(tiles) > programs else 0
    sums = [sum(products[tile] for tile in own) for own in taken]
    return Outcome(
        [[tiles[tile] for tile in own] for own in taken],
        sum(sums) / (multiprocessors * max(sums)),
        sum(sums) / (multiprocessors * (max(ends) + once)),
    )


def _in_turn(durations: Sequence[float], programs: int) -> list[list[int]]:
    """Each tile goes to the program that is free first."""
    taken: list[list[int]] = [[] for _ in range(programs)]
    free = [(0.0, program) for program in range(programs)]
    for tile, duration in enumerate(durations):
        time, program = free[0]
        taken[program].append(tile)
        heapq.heapreplace(free, (time + duration, program))
    return taken


# As the benchmarks have them: 16384 rows, and heads of 2048 elements in all.
SHAPES = [
    Shape(max(1, 16384 // length), 2048 // head_dim, length, head_dim)
    for head_dim in (128, 64, 256)
    for length in (512, 1024, 2048, 4096, 8192, 16384)
]


def table() -> Table:
    """Balance and efficiency of every schedule."""
    schedules: tuple[Schedule, ...] = get_args(Schedule)
    lines = []
    for mask, shape in itertools.product(MASKS, SHAPES):
        found = [simulate(schedule, mask, shape) for schedule in schedules]
        cells = [f"{outcome.balance:.3f} / {outcome.efficiency:.3f}" for outcome in found]
        best = max(zip(schedules, found), key=lambda pair: pair[1].efficiency)[0]
        lines.append((mask, f"D{shape.head_dim}", str(shape.length), *cells, best))
    return table_of("balance / efficiency, simulated", ("mask", "head", "L", *schedules, "best"), lines)
