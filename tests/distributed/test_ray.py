"""Ray Train starts the processes of a parallel model, and the program is that of any other launcher (`make ray`)."""

from __future__ import annotations

import copy
import os
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastattn import distributed
from tests.distributed import parallel_tasks

WORLD, STEPS = 2, 5
_WITHOUT = "Ray is in an environment of its own (make ray)"


def steps(config: dict[str, Any]) -> dict[str, float]:
    """What each worker does: how far losses are from one process. Ray has made the process group."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    batches = [(torch.randint(11, (4, 17)),)] * STEPS
    whole, found = parallel_tasks.language_model(), {"ranks": float(dist.get_world_size())}
    expected = parallel_tasks.train(copy.deepcopy(whole), batches)
    for name in config["dimensions"]:
        mesh = parallel_tasks.mesh_of({name: WORLD})
        model = distributed.parallelize(copy.deepcopy(whole), mesh)
        ours = parallel_tasks.train(model, parallel_tasks.of_this_rank(batches, mesh))
        found[name] = parallel_tasks.apart(parallel_tasks.mean_over_data(ours, mesh), expected)
    return found | {"learned": expected[0] - expected[-1]}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch):
    """Ray on this machine alone: no dashboard, nothing said to anybody, and no token left in a home directory."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex())
    ray = pytest.importorskip("ray", reason=_WITHOUT)
    path = os.pathsep.join(path for path in sys.path if path)
    variables = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:  # its name is short, as the paths of sockets have to be
        monkeypatch.setenv("RAY_TMPDIR", folder)
        ray.init(num_cpus=WORLD + 1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
        yield ray
        ray.shutdown()


def test_parallel_model_under_ray_train(cluster: Any, tmp_path: Path):
    """Two workers have the losses of one process, along each dimension of a mesh."""
    train, of_torch = (pytest.importorskip(name, reason=_WITHOUT) for name in ("ray.train", "ray.train.torch"))
    dimensions = ["data", "context", "tensor"]
    result = of_torch.TorchTrainer(
        steps,
        train_loop_config={"dimensions": dimensions},
        scaling_config=train.ScalingConfig(num_workers=WORLD),
        torch_config=of_torch.TorchConfig(backend="gloo"),
        run_config=train.RunConfig(name="steps", storage_path=str(tmp_path)),
    ).fit()
    assert result.error is None
    found = result.return_value  # the first worker's
    assert found["ranks"] == WORLD and found["learned"] > 0.05
    assert {name: found[name] for name in dimensions if not found[name] <= 1e-5} == {}
