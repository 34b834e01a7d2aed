"""Calls of DTensors: results, gradients and placements of every function, what is sent, what is refused."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from tests.distributed import dtensor_tasks
from tests.distributed.processes import run_on_ranks

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")

_REFUSALS = {
    "plain key": "TypeError: key is a Tensor and query a DTensor: expected a DTensor, such as",
    "plain input of a norm": "TypeError: x is a Tensor and residual a DTensor: expected a DTensor, such as",
    "plain bias": "TypeError: attn_mask is a Tensor and query a DTensor: expected a DTensor, such as",
    "plain sinks": "TypeError: sinks is a Tensor and query a DTensor: expected a DTensor, such as",
    "score_mod": "NotImplementedError: score_mod or mask_mod of DTensors: expected plain tensors",
    "mesh": "ValueError: value is on ",
}


def test_dtensors_give_what_plain_tensors_give():
    """Results and all gradients, of every placement on four ranks and on two by two."""
    for of_rank in run_on_ranks(4, (dtensor_tasks.dtensors, dtensor_tasks.dtensor_kinds)):
        assert of_rank is not None, "a rank did not end"
        assert "raised" not in of_rank, of_rank["raised"]
        assert of_rank["dtensors"]["calls"] == 13 * len(dtensor_tasks.CALLS)
        assert of_rank["dtensors"]["apart"] <= 2e-6
        assert of_rank["dtensors"]["sent"] == []
        kinds = of_rank["dtensor_kinds"]
        assert kinds["placements"] == ["(Shard(dim=0),)"] * 2
        assert kinds["by heads"] == "(Shard(dim=1),)"
        assert not kinds["ranks drop alike"]
        assert kinds["generators are alike"]
        assert kinds["module"] <= 2e-6
        assert kinds["compiled"] <= 2e-6
        assert {n: m for n, m in kinds["refused"].items() if not m.startswith(_REFUSALS[n])} == {}
