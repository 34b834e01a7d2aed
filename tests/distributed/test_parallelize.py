"""Parallel models beside the same models in one process: losses, weights, state dicts, checkpoints, refusals."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from tests.distributed import compiled_steps, generation_tasks, parallel_tasks, state_tasks
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
    state_tasks.optimizer_states,
    state_tasks.broadcast,
    parallel_tasks.refusals,
    generation_tasks.generation,
    generation_tasks.generation_further,
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
        check_states(of_rank["optimizer_states"], of_rank["broadcast"])
        assert of_rank["refusals"].keys() == _REFUSALS.keys()
        assert {n: m for n, m in of_rank["refusals"].items() if not m.startswith(_REFUSALS[n])} == {}
        assert {name for name, is_right in of_rank["generation"].items() if not is_right} == set()
        check_generation(of_rank["generation_further"])
    check_checkpoints([of_rank["checkpoints"] for of_rank in said])


def check_training(said):
    """20 steps have the losses and the weights of one process."""
    assert said.keys() == parallel_tasks.MESHES.keys()
    for name, found in said.items():
        assert found["learned"] > 0.1, name
        assert found["losses"] <= 1e-5, (name, found)
        assert found["weights"] <= 1e-4, (name, found)
        assert found["all DTensors"], name


def check_states(of_optimizer, of_model):
    """What an optimizer keeps has torch's shapes everywhere, if it is asked to; of one rank a model takes three."""
    assert of_optimizer.pop("no model") == "TypeError: model: expected an nn.Module, got Adam"
    assert of_optimizer.pop("no optimizer").startswith("TypeError: optimizer: expected a torch.optim.Optimizer, got ")
    assert {name: far for name, far in of_optimizer.items() if not far <= 1e-5} == {}
    assert {name: far for name, far in of_optimizer.items() if "from" in name and far != 0} == {}
    # torch would copy rows into those of the packed projection, in another order: their shapes keep it from that
    assert "must match" in of_model["as torch has it"]
    assert of_model["as three"]


def check_generation(found):
    """Each rank keeps its own heads' keys of its own tokens, and refuses what does not go together on all ranks."""
    assert found["tokens"] and found["bfloat16"] and found["wrapped"]
    shape, length, (of_first, of_second) = found["cache"]
    assert shape == [2, 2, 2, 6, 4]
    assert length == 9 and of_first == of_second and of_first in (4, 5)
    assert found["steps"] <= 2e-6
    assert (
        found["full"]
        == "CacheFullError: reserve(1): 1 slots asked for, 9 held and 0 free of the 9 that a sequence may have"
    )
    assert found["pages"].startswith("NotImplementedError: page_size=4 with a 'context': ")
    assert found["another prompt"].startswith("RanksDisagreeError: the ranks of the group were called with different")
    assert "length: rank" in found["another length"]
    assert found["not gathered"].startswith("RuntimeError: decoding with sharded parameters: expected a call of")


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
    assert len(far) == 6 + len(compiled_steps.CALLS)
    most = {"steps": 1e-5, "call": 2e-6, "shares": 0.0, "without": 0.0, "disagreement": 0.0}
    assert {what: number for what, number in far.items() if not number <= most[what.split()[0]]} == {}
