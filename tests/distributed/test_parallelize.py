"""Parallel models beside the same models in one process: losses, weights, state dicts, checkpoints, refusals."""

from __future__ import annotations

from tests.distributed import parallel_tasks
from tests.distributed.processes import run_on_ranks


def none_raised(said):
    """What the ranks say, if all of them came to an end."""
    assert all(of_rank is not None for of_rank in said), "a rank came to no end"
    raised = [of_rank["raised"] for of_rank in said if "raised" in of_rank]
    assert not raised, raised[0]
    return said


def test_parallel_models_on_four_ranks():
    """In one start of the processes, which takes longer than most of what they do."""
    said = none_raised(run_on_ranks(4, (parallel_tasks.context, parallel_tasks.fused_layers, parallel_tasks.state_dicts, parallel_tasks.sequence_to_sequence, parallel_tasks.checkpoints)))
    for of_rank in said:
        print(of_rank)
        for name, found in of_rank.get("training",{}).items():
            assert found["learned"] > 0.1, name
            assert found["losses"] <= 1e-5, (name, found)
            assert found["weights"] <= 1e-4, (name, found)
            assert found["all DTensors"], name
