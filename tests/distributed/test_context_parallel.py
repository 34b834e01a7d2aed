"""Attention on shards beside attention in one process: results, gradients, repeated runs, what is sent, faults."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

import fastattn
from fastattn import distributed
from tests.distributed import cases, tasks
from tests.distributed.processes import run_on_ranks


def none_raised(said):
    """What the ranks say, if all of them came to an end."""
    assert None not in said, "a rank did not end"
    for of_rank in said:
        assert "raised" not in of_rank, of_rank["raised"]
    return said


@pytest.mark.parametrize("world", [2, 4, pytest.param(8, marks=pytest.mark.ranks)])
def test_shards_give_what_one_process_gives(world):
    """Results and every gradient, of every mask by every method and balance; the same bits in two runs; and what else
    ranks can be asked for. All in one test, since starting the processes takes longer than most of what they do."""
    several = (tasks.every_call, tasks.sharing_out, tasks.disagreements, tasks.traffic, tasks.sixteen_bits)
    said = none_raised(run_on_ranks(world, several))
    for of_rank in said:
        assert of_rank["every_call"]["wrong"] == []
        assert of_rank["every_call"]["count"] == len(list(cases.calls(world)))
        assert of_rank["sharing_out"] == []
        check_disagreements(of_rank["disagreements"], world)
        for ours, theirs in zip(of_rank["sixteen_bits"]["ring"], of_rank["sixteen_bits"]["one process"]):
            assert ours <= 1.5 * theirs + 1e-4
    check_traffic([of_rank["traffic"] for of_rank in said])
    print(f"{world} ranks: at most {max(s['every_call']['farthest'] for s in said):.2g} from one process")
