"""Parallel models beside the same models in one process: losses, weights, state dicts, checkpoints, refusals."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from tests.distributed import compiled_steps, parallel_tasks
from tests.distributed.processes import run_on_ranks

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")

_TASKS = (
    parallel_tasks.training,
    parallel_tasks.attention,
    parallel_tasks.context,
    parallel_tasks.sequence_to_sequence,
    parallel_tasks.fused_layers,
    parallel_tasks.state_dicts,
    parallel_tasks.checkpoints,
    parallel_tasks.broadcast,
    parallel_tasks.refusals,
)
# Of these, how far they may be from one process, in float32.
_MOST = {"attention": 2e-6, "context": 2e-6, "fused_layers": 2e-6, "sequence_to_sequence": 1e-5}
# How each refusal begins.
_REFUSALS = {
    "mesh's type": "TypeError: mesh: expected a torch.distributed.DeviceMesh, got ProcessGroup",
    "mesh's names": "ValueError: mesh has the dimensions ('dp', 'tp'): expected some of ('data', 'context', 'tensor')",
    "mesh's order": "ValueError: mesh has the dimensions ('tensor', 'data'): expected some of",
    "model's type": "TypeError: model: expected an nn.Module, got str",
    "heads": "ValueError: self_attn.num_heads=6: expected a multiple of the 4 ranks of mesh['tensor']",
    "hidden units": "ValueError: the model.linear1.out_features=18: expected a multiple of the 4 ranks",
    "width": "ValueError: self_attn.embed_dim=6: expected a multiple of the 2 ranks of mesh['tensor'], times the 2",
    "torch's layer": "TypeError: the model is a torch.nn.modules.transformer.TransformerEncoderLayer: expected",
    "torch's attention": "TypeError: the model is a torch.nn.modules.activation.MultiheadAttention: expected",
    "unknown": "TypeError: 1 is a tests.distributed.parallel_tasks._Odd with parameters or buffers: expected",
    "unknown, with a context": "TypeError: 1 is a torch.nn.modules.conv.Conv1d with parameters or buffers: expected",
    "tied": "ValueError: 0 has parameters that another module has, too",
    "appended keys": "ValueError: the model appends keys to its sequences: expected add_bias_kv=False",
    "method": "ValueError: method='2d': expected one of 'auto', ",
    "balance": "ValueError: balance='even': expected one of 'none', ",
    "words of FSDP2": "ValueError: fsdp has 'mesh': expected some of ('mp_policy', 'offload_policy', ",
    "another linear layer": "TypeError: the model.linear1 is a _Odd: expected an nn.Linear",
    "twice": "ValueError: self_attn.in_proj_weight is a DTensor: expected a model that is not parallel yet",
    "odd length": "ValueError: tensor.shape[1]=9: expected a multiple of 2, for 2 ranks and balance='none'",
    "decoding": "NotImplementedError: decoding with a parallel model: load its full state dict",
    "weights": "NotImplementedError: need_weights=True with a 'context'",
    "floating padding": "NotImplementedError: key_padding_mask is torch.float32 with a 'context'",
}


def test_parallel_models_are_what_they_are_in_one_process():
    """All in one test, since starting four processes takes longer than most of what they do."""
    said = run_on_ranks(4, _TASKS, seconds=240.0)
    for of_rank in said:
        assert of_rank is not None, "a rank did not end"
        assert "raised" not in of_rank, of_rank["raised"]
    for of_rank in said:
        check_training(of_rank["training"])
        for task, most in _MOST.items():
            assert of_rank[task]
            assert {name: far for name, far in of_rank[task].items() if not far <= most} == {}, task
        assert {name for name, is_right in of_rank["state_dicts"].items() if not is_right} == set()
        # torch would copy rows into those of the packed projection, in another order: their shapes keep it from that
        assert "must match" in of_rank["broadcast"]
        assert of_rank["refusals"].keys() == _REFUSALS.keys()
        assert {n: m for n, m in of_rank["refusals"].items() if not m.startswith(_REFUSALS[n])} == {}
    check_checkpoints([of_rank["checkpoints"] for of_rank in said])


def check_training(said):
    """20 steps have the losses and the weights of one process."""
    assert said.keys() == parallel_tasks.MESHES.keys()
    for name, found in said.items():
        assert found["learned"] > 0.1, name
        assert found["losses"] <= 1e-5, (name, found)
        assert found["weights"] <= 1e-4, (name, found)
        assert found["all DTensors"], name


def check_checkpoints(said):
    """What four ranks have written goes on on two of them, and is whole on one."""
    first, second = said[:2]
    assert first["one"] <= 1e-6
    assert first["two"] == second["two"] == pytest.approx(first["expected"], rel=1e-5)


def test_compiled_steps_and_calls_under_torchrun():
    """Without graph breaks, with the losses, results and gradients of an eager process."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.distributed.compiled_steps"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    said = (line.split(maxsplit=1) for line in result.stdout.splitlines())
    far = {what: float(number) for number, what in said}
    assert len(far) == 5 + len(compiled_steps.CALLS)
    most = {"steps": 1e-5, "call": 2e-6, "shares": 0.0, "disagreement": 0.0}
    assert {what: number for what, number in far.items() if not number <= most[what.split()[0]]} == {}
