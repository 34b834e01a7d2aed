"""The emulator finds what it is there for: faults seeded into the forward, each of which a GPU might hide for long."""

import importlib.util
import math
from typing import Any

import pytest
import torch

from tests.conftest import INTERPRETING

pytest.importorskip("triton", reason="triton is not installed")

from fastattn_kernels.attention_problem import Problem
from fastattn_kernels.hopper import attention_fwd
from fastattn_kernels.hopper.config import ForwardConfig
from tests.kernels.hopper.emulator import Deadlock, Unfinished, emulating

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="the emulator runs on the CPU, beside Triton's interpreter")

B, H, L, S, D = 1, 3, 300, 250, 64


def outputs(module) -> Any:
    """What a module's forward makes of a problem with a bias, several rounds a block and several tiles a round."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(B, H, n, D, generator=generator).bfloat16() for n in (L, S, S))
    bias = torch.randn(1, H, L, S, generator=generator).bfloat16()
    problem = Problem(query, key, value, 1 / math.sqrt(D), bias=bias, upper=S - L)
    out, lse, statistics = torch.empty_like(query), torch.empty(B, H, L), torch.empty(B, H, 2, L)
    for tensor in (out, lse, statistics):
        tensor.fill_(math.nan)
    with emulating():
        module.launch_attention_fwd(problem, out, lse, statistics, None, ForwardConfig(128, 64, 2, stage_output=True))
    return out, lse, statistics


def seeded(tmp_path, monkeypatch, old, new) -> Any:
    """The forward's module with ``new`` for ``old``."""
    with open(attention_fwd.__file__) as file:
        source = file.read()
    assert source.count(old) == 1, "the fault has lost its place"
    path = tmp_path / "seeded_attention_fwd.py"
    path.write_text(source.replace(old, new))
    spec: Any = importlib.util.spec_from_file_location("seeded_attention_fwd", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for each in (module, attention_fwd):
        monkeypatch.setattr(each, "multiprocessors", lambda _: 2)
        # it would do the tiles again that a fault has made NaN
        monkeypatch.setattr(each, "launch_careful_fwd", lambda *_: None)
    return module


K_READ = "        scores = warpgroup_mma_wait(1, deps=[scores])\n"
FENCE = (
    "        if b_s is not None:\n"
    "            fence_async_shared()  # the bias has been read before TMA writes there again\n"
)
K_RELEASED = "        mbarrier.arrive(k_empty.index(slot), count=1)\n"
V_READ = "        acc = warpgroup_mma_wait(0, deps=[acc])\n"
V_RELEASED = "        mbarrier.arrive(v_empty.index(previous), count=1)\n"
BIAS_READ = "        addends = load_addends(\n            col_start, slot, at, row_start, sizes,"

# A fault, what stood there, what stands there now.
WRONG: dict[str, tuple[str, str]] = {
    "keys_released_before_they_are_read": (K_READ + FENCE + K_RELEASED, K_RELEASED + K_READ + FENCE),
    "values_released_before_they_are_read": (V_READ + V_RELEASED, V_RELEASED + V_READ),
    "bias_released_before_it_is_read": (BIAS_READ, K_RELEASED + BIAS_READ),
    "keys_not_waited_for": ("next_parity, pred=count < last", "next_parity, pred=False"),
    "keys_waited_for_with_the_wrong_parity": ("next_parity, pred=count < last", "next_parity ^ 1, pred=count < last"),
    "values_not_waited_for": ("        mbarrier.wait(v_full.index(previous), previous_parity)\n", ""),
    "queries_of_the_last_round": (
        "mbarrier.wait(q_full.index(INDEX), rounds & 1)",
        "mbarrier.wait(q_full.index(INDEX), 0)",
    ),
    "buffers_refilled_without_asking": ("            mbarrier.wait(k_empty.index(slot), parity ^ 1)\n", ""),
    "output_overwritten_before_it_left": (
        "            tma_store_wait(0)  # the last tile's output has left\n",
        "            pass\n",
    ),
    "product_used_before_it_is_done": (V_READ + V_RELEASED, V_RELEASED),
}
DEADLOCKS: dict[str, tuple[str, str]] = {
    "keys_never_released": (K_READ + FENCE + K_RELEASED, K_READ + FENCE),
    "one_tile_less_loaded_than_read": (
        "for position in range(0, all_visits):", "for position in range(0, all_visits - 1):",
    ),
    "more_bytes_expected_than_come": (
        "k_desc.block_type.nbytes + CONSUMERS * b_desc", "k_desc.block_type.nbytes + 2 * CONSUMERS * b_desc",
    ),
    "an_arrival_too_few": (
        "    k_empty = _barriers(STAGES, CONSUMERS)", "    k_empty = _barriers(STAGES, CONSUMERS + 1)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_emulator_finds_wrong_results(fault, tmp_path, monkeypatch):
    """Whether they show as numbers, or the emulator itself sees what is wrong."""
    module = seeded(tmp_path, monkeypatch, *WRONG[fault])
    good = outputs(attention_fwd)
    try:
        bad = outputs(module)
    except (RuntimeError, TypeError, AttributeError, Deadlock, Unfinished):
        return
    assert not all(torch.equal(a, b) for a, b in zip(good, bad))


@pytest.mark.parametrize("fault", DEADLOCKS)
def test_emulator_finds_deadlocks(fault, tmp_path, monkeypatch):
    module = seeded(tmp_path, monkeypatch, *DEADLOCKS[fault])
    with pytest.raises(Deadlock, match=r"_consumer \d waits for barrier \d+\[\d\] to end a phase of parity"):
        outputs(module)


def test_emulator_finds_stores_that_nobody_waits_for(tmp_path, monkeypatch):
    last = "        rounds += 1\n    tma_store_wait(0)\n"
    module = seeded(tmp_path, monkeypatch, last, last.replace("    tma_store_wait(0)\n", ""))
    with pytest.raises(Unfinished, match="stores that nobody waited for"):
        outputs(module)


def test_emulator_does_not_see_missing_fences(tmp_path, monkeypatch):
    """What it does not model: here a GPU may store what shared memory held before. Only reading finds such faults."""
    module = seeded(tmp_path, monkeypatch, "        fence_async_shared()\n", "")
    assert all(torch.equal(a, b) for a, b in zip(outputs(attention_fwd), outputs(module)))
