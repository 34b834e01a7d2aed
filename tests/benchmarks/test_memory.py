"""Peaks of steps that need a known amount, and what known graphs keep for their backward."""

import ctypes
import gc
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from benchmarks.measure import memory
from benchmarks.measure.memory import peak_mib, saved_tensors

MIB = 1 << 20
FLOATS = MIB // 4  # in a MiB


def _can_measure() -> bool:
    try:
        memory._CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return platform.libc_ver()[0] == "glibc"


measured = pytest.mark.skipif(not _can_measure(), reason="needs glibc and a writable /proc/self/clear_refs")

# ---------------------------------------------------------------------------------------------------------------- peaks


@measured
def test_peak_counts_what_is_there_at_once():
    """Two of 48 MiB together, one after the other, and one that is returned; in a process of its own, since the system
    may take pages from one that has run other tests, while a step is measured."""
    code = (
        "import torch; from benchmarks.measure.memory import peak_mib\n"
        f"ones = lambda: torch.ones({48 * FLOATS})\n"
        "steps = lambda: ones().sum(), lambda: ones() + 1.0, lambda: [ones().sum() for _ in range(2)]\n"
        "print(*(peak_mib(step, 'cpu') for step in steps))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout
    one, both, apart = map(float, said.split())
    assert one == pytest.approx(48, abs=12)
    assert both == pytest.approx(96, abs=12)
    assert apart == pytest.approx(48, abs=12)


@measured
def test_peak_does_not_count_what_is_not_touched():
    assert peak_mib(lambda: torch.empty(256 * FLOATS), "cpu") == pytest.approx(0, abs=12)


@measured
def test_peak_is_not_hidden_by_pages_that_were_freed_before():
    """glibc keeps small blocks that are freed below one that is not: a step that takes them does not grow."""
    blocks = [ctypes.create_string_buffer(64 << 10) for _ in range(32 * 16)]
    last = ctypes.create_string_buffer(64 << 10)
    del blocks[:]
    peak = peak_mib(lambda: [ctypes.create_string_buffer(64 << 10) for _ in range(32 * 16)], "cpu")
    assert peak == pytest.approx(32, abs=8)
    del last


@measured
def test_peak_is_the_smaller_of_two():
    """What only the first step does, such as making ready a library, is not the step's."""
    sizes = iter([96, 32])
    assert peak_mib(lambda: torch.ones(next(sizes) * FLOATS), "cpu") == pytest.approx(32, abs=12)
    assert next(sizes, None) is None


@measured
def test_peak_is_not_lowered_by_others_garbage():
    """Garbage that was there before, and would be collected amid the step, made room for it."""

    def step():
        seen.append(gc.isenabled())
        return torch.ones(FLOATS)

    seen: list[bool] = []
    peak_mib(step, "cpu")
    assert seen == [False, False]
    assert gc.isenabled()


@pytest.mark.parametrize("what", ["refused", "absent", "no-glibc"])
def test_peak_is_none_where_the_system_does_not_tell(monkeypatch, tmp_path, what):
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("musl" if what == "no-glibc" else "glibc", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: _Trim())
    if what == "refused":
        monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path)  # a folder takes no text
    if what == "absent":
        monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "mark")
        monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    assert peak_mib(lambda: pytest.fail("there is nothing to measure it for"), "cpu") is None


class _Trim:
    @staticmethod
    def malloc_trim(pad: int) -> int:
        return 0


def test_peak_on_cuda_is_what_was_handed_out_beside_what_was_there(monkeypatch):
    allocated = {"now": 100 * MIB, "most": 700 * MIB}

    def step():
        allocated["most"] = max(allocated["most"], allocated["now"] + 30 * MIB)

    for name, answer in {
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: allocated.update(most=allocated["now"]),
        "memory_allocated": lambda: allocated["now"],
        "max_memory_allocated": lambda: allocated["most"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    assert peak_mib(step, "cuda:0") == 30.0


# ---------------------------------------------------------------------------------------------------------------- saved


def _leaf(mib: int = 1) -> torch.Tensor:
    return torch.randn(mib, FLOATS).requires_grad_()


def _saved_mib(function, *leaves: torch.Tensor) -> float:
    """Of a training step: the output's gradient is taken where autograd has one."""
    with saved_tensors() as saved:
        torch.autograd.grad(function(*leaves).sum(), leaves)
    return saved.mib


def test_saved_of_known_operations():
    x = _leaf()
    assert _saved_mib(lambda x: x + 1.0, x) == 0.0
    assert _saved_mib(lambda x: x.exp(), x) == 1.0  # its output
    assert _saved_mib(lambda x: x.sin(), x) == 0.0  # its input, which is a leaf
    assert _saved_mib(lambda x: (x + 1.0).sin(), x) == 1.0
    assert _saved_mib(lambda x: x.exp().sin().exp(), x) == 2.0  # the sine keeps what exp keeps already


def test_saved_counts_neither_parameters_nor_their_views():
    """A linear layer keeps its input, which is no leaf here; its weight goes in transposed, as a view."""
    x, linear = torch.randn(512, 512).requires_grad_(), torch.nn.Linear(512, 512)
    assert _saved_mib(lambda x, *_: linear(x * 1.0), x, *linear.parameters()) == 1.0
    assert _saved_mib(lambda x: x[:1].sin() + x.view(-1)[1:2].detach().mul(x[0, 0]), x) == 0.0


def test_saved_counts_no_leaf_that_is_a_view_itself():
    """As q, k and v drawn at once, each of them a leaf then."""
    q, k = (t.requires_grad_() for t in torch.randn(2, 512, 512))
    assert _saved_mib(lambda q, k: q @ k, q, k) == 0.0


def test_saved_counts_a_storage_once_and_whole():
    """Two rows of the four that a storage holds keep all of it."""
    assert _saved_mib(lambda x: (y := x + 1.0)[0].sin() + y[1].sin(), _leaf(4)) == 4.0


def test_saved_counts_storages_that_take_each_others_place():
    """What was freed amid a forward is not kept, and what then lies at the same address is not mistaken for it."""
    x = torch.randn(FLOATS).requires_grad_()
    addresses = set()

    def function(x):
        total = x
        for _ in range(4):
            dropped = (x + 1.0).sin()  # keeps a MiB until the next line
            del dropped
            kept = x + 1.0
            addresses.add(kept.untyped_storage().data_ptr())
            total = total + kept.sin()
        return total

    assert _saved_mib(function, x) == 4.0
    assert len(addresses) == 4


class _Doubled(torch.autograd.Function):
    """Keeps its input, its output and one more."""

    @staticmethod
    def forward(ctx, x):
        output = x * 2.0
        ctx.save_for_backward(x, output, torch.ones_like(x))
        return output

    @staticmethod
    def backward(ctx, *gradients):
        x, output, ones = ctx.saved_tensors
        assert torch.equal(output, x * 2.0)
        with torch.enable_grad():  # a recomputation, whose own tensors are not kept by the forward
            again = x.detach().requires_grad_()
            (inner,) = torch.autograd.grad((again.exp() * 0.0 + again * 2.0).sum(), again)
        return gradients[0] * inner * ones


def test_saved_of_a_function_of_ones_own():
    assert _saved_mib(_Doubled.apply, _leaf()) == 2.0


def test_saved_of_a_graph_made_before_the_step():
    """As in the norm family, where a step is the backward alone, again and again."""
    x = _leaf()
    with saved_tensors() as saved:
        output = x.exp()
        for _ in range(2):
            torch.autograd.grad(output.sum(), x, retain_graph=True)
    assert saved.mib == 1.0


def test_saved_of_steps_one_after_the_other_is_that_of_one():
    x = _leaf()
    with saved_tensors() as saved:
        for _ in range(3):
            torch.autograd.grad(x.exp().sum(), x)
    assert saved.mib == 1.0


def test_saved_without_a_backward_is_what_is_kept_now():
    x = _leaf()
    with saved_tensors() as saved, torch.no_grad():
        x.exp()
    assert saved.mib == 0.0
    with saved_tensors() as saved:
        output = x.exp()
    assert saved.mib == 1.0
    del output


def test_saved_changes_no_result_and_keeps_nothing_alive():
    linear, x = torch.nn.Linear(8, 8), torch.randn(4, 8)

    def step():
        output = torch.softmax(linear(x).exp(), dim=-1)
        return output, torch.autograd.grad((output**2).sum(), tuple(linear.parameters()))

    output, gradients = step()
    with saved_tensors() as saved:
        seen, counted = step()
    assert torch.equal(seen, output)
    assert all(torch.equal(a, b) for a, b in zip(counted, gradients))
    with saved_tensors():
        dropped = x.requires_grad_().exp()  # its graph keeps it, and it keeps its graph
    storage = StorageWeakRef(dropped.untyped_storage())
    del dropped
    assert storage.expired()
    assert saved.mib > 0.0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc/self/status")
def test_resident_set_has_a_high_mark():
    assert 0.0 < memory._resident("VmRSS") <= memory._resident("VmHWM")
