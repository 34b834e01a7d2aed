"""What a replay has to be told of the Hopper kernels, since the code of a warpgroup's loop does not say it: how much is
copied between global and shared memory meanwhile, and where the two warpgroups meet."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from benchmarks.laboratory.model import HandOver, Replay, replay
from benchmarks.laboratory.sass import Loop

# Kernel -> its descriptors whose tiles are copied in a turn, and how many of them, for both warpgroups together.
_COPIES = {
    "_attention_fwd_kernel": {"k_desc": 1, "v_desc": 1, "b_desc": 2},
    # d_query, there in one pass, are the pieces that each warpgroup adds to global memory
    "_attention_bwd_kernel": {
        "query": 1, "d_output": 1, "pivots": 1, "deltas": 1, "inverse_sums": 1, "bias": 2, "d_query": 2,
    },
    "attention_dq_kernel": {"key": 1, "value": 1, "bias": 2},
}  # fmt: skip
# In one pass each waits for the other's dS, behind the wait for dO: its first arrival says that it has written its own.
_HAND_OVER_OF_DS = HandOver(wait=1, arrival=0)


def replays(kernel: str, signature: Mapping[str, str], loops: Sequence[Loop]) -> tuple[Replay, Replay] | None:
    """The turns of both warpgroups over tiles seen whole and over tiles seen in part; None where it is no such kernel.

    Args:
        kernel: its name.
        signature: the type of each argument, ``tensordesc<bf16[1, 1, 64, 128], ...>``.
        loops: of the first warpgroup, then of the second, over the same tiles in the same order.
    """
    if kernel not in _COPIES or len(loops) % 2:
        return None
    copied = sum(number * _tile_bytes(signature[name]) for name, number in _COPIES[kernel].items())
    half = len(loops) // 2
    pairs = sorted(zip(loops[:half], loops[half:]), key=lambda pair: len(pair[0].instructions))
    hand_over = _HAND_OVER_OF_DS if loops[0].counts["UTMAREDG"] else None
    return replay(pairs[0], copied, hand_over), replay(pairs[-1], copied, hand_over)


def _tile_bytes(type_: str) -> int:
    """Of the tile that a descriptor copies; 0 where the argument is no descriptor, but None."""
    match = re.match(r"tensordesc<[a-z]+(\d+)\[([\d, ]+)\]", type_)
    return math.prod(map(int, match[2].split(","))) * int(match[1]) // 8 if match else 0


def pair_teraflops(dkdv: float, dq: float) -> float:
    """What two passes make of five matrix products, when dK and dV take four and dQ, which does two again, three."""
    return 5 / (4 / dkdv + 3 / dq)
