"""Small runs of the kernels, each of which shows faults of many kinds: what :mod:`.faults` is tried on.

A case takes its kernels from the package ``fastattn_kernels`` as it stands in ``sys.modules`` and on the path when it
runs (:func:`kernels_with` puts a changed copy there), and the tests' own checks from a copy of their module that is
imported anew for that. It raises :class:`.findings.Finding` where the machine sees a fault, and AssertionError where
numbers are wrong.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests import machines

ROOT = Path(__file__).parents[2]
_PACKAGE = "fastattn_kernels"


@contextlib.contextmanager
def kernels_with(file: str, old: str, new: str) -> Generator[None]:
    """The kernels' package with ``new`` for ``old`` in one of its files, for whoever imports it meanwhile.

    Raises:
        LookupError: ``old`` is not there, or more than once: the fault has lost its place.
    """
    text = (ROOT / "kernels" / _PACKAGE / file).read_text()
    if text.count(old) != 1:
        raise LookupError(f"{file} has {text.count(old)} times, and should have once:\n{old}")
    with tempfile.TemporaryDirectory() as directory:
        copy = shutil.copytree(ROOT / "kernels" / _PACKAGE, Path(directory) / _PACKAGE)
        (copy / file).write_text(text.replace(old, new))
        with _packages_from(directory):
            yield


@contextlib.contextmanager
def _packages_from(directory: str) -> Generator[None]:
    def imported() -> list[str]:
        return [name for name in sys.modules if name == _PACKAGE or name.startswith(_PACKAGE + ".")]

    before = {name: sys.modules.pop(name) for name in imported()}
    sys.path.insert(0, directory)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(directory)
        for name in imported():
            del sys.modules[name]
        sys.modules.update(before)
        importlib.invalidate_caches()


def _checks(file: str) -> Any:
    """A module of tests, imported anew, on the kernels that are there now."""
    path = ROOT / "tests" / "kernels" / file
    spec: Any = importlib.util.spec_from_file_location(f"seeded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _without_careful_launches(module: Any) -> Generator[None]:
    """They would do the tiles again that a fault has made NaN."""
    with contextlib.ExitStack() as stack:
        for name in ("launch_careful_fwd", "launch_careful_bwd"):
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name))
        yield


# -------------------------------------------------------------------------------------------------------------- Hopper


def gluon_forward() -> None:
    """Several rounds a program, several tiles of keys a round, a bias, and a place of its own for the output."""
    checks = _checks("hopper/test_forward.py")
    keys, rows = 250, 300
    bias = checks.bias(1, 3, rows, keys)
    problem = checks.make(
        machines.DEVICE, {"upper": keys - rows, "bias": bias}, batch=1, heads=3, kv_heads=3, rows=rows, keys=keys
    )
    few = mock.patch.object(checks.forward, "multiprocessors", return_value=2)
    with few, _without_careful_launches(checks.forward):
        checks.check(problem, checks.ForwardConfig(128, 64, 2, stage_output=True), machines.order())


def gluon_forward_of_few_keys() -> None:
    """Several rounds a program, handed out one by one, with as many tiles of keys in each as there are stages."""
    checks = _checks("hopper/test_forward.py")
    problem = checks.make(machines.DEVICE, {}, batch=1, heads=4, kv_heads=2, rows=250, keys=128)
    config = checks.ForwardConfig(128, 64, 2, stage_output=True, schedule="dynamic")
    with mock.patch.object(checks.forward, "multiprocessors", return_value=2):
        checks.check(problem, config, machines.order())


def _gluon_backward(rows: int, keys: int, one_pass: bool, **options: Any) -> None:
    checks = _checks("hopper/test_backward.py")
    problem = checks.make_problem(rows, keys, heads=2, kv_heads=1, **options)
    with _without_careful_launches(sys.modules["fastattn_kernels.attention.hopper.backward"]):
        checks.check(problem, one_pass=one_pass, order=machines.order())


def gluon_pair() -> None:
    """dK and dV, then dQ."""
    _gluon_backward(270, 140, one_pass=False, upper=-60)


def gluon_pair_with_bias() -> None:
    from fastattn.testing import random_tensor

    _gluon_backward(140, 400, one_pass=False, bias=random_tensor(1, 2, 140, 400, seed=7, dtype=torch.bfloat16))


def gluon_one_pass() -> None:
    """All three gradients at once."""
    _gluon_backward(270, 140, one_pass=True, upper=-60)


# -------------------------------------------------------------------------------------------------------- plain kernels


def _plain_attention(one_pass: bool) -> None:
    from fastattn.testing import assert_within_budget

    checks = _checks("hopper/test_backward.py")
    forward, backward = (
        importlib.import_module(f"fastattn_kernels.attention.{name}") for name in ("forward", "backward")
    )
    single = importlib.import_module("fastattn_kernels.attention.backward_one_pass")
    config = importlib.import_module("fastattn_kernels.attention.config")
    common = (importlib.import_module(f"fastattn_kernels.common.{name}") for name in ("config", "delta", "gradients"))
    common_config, delta_kernel, kinds = common
    tile = common_config.Config(32, 32, 4, 1)
    problem = checks.make_problem(70, 90, 40, heads=2, kv_heads=1, upper=10)
    d_out = checks.gradient_of_output(problem)
    truths, peers = ([out, *gradients] for out, gradients in (
        checks.reference(problem, d_out, dtype) for dtype in (torch.float64, torch.float32)
    ))  # fmt: skip
    found = [torch.full_like(each, torch.nan) for each in (d_out, problem.query, problem.key, problem.value)]
    lse, statistics = torch.full((1, 2, 70), torch.nan), torch.full((1, 2, 2, 70), torch.nan)
    with _without_careful_launches(forward), _without_careful_launches(backward), _without_careful_launches(single):
        forward.launch_attention_fwd(problem, found[0], lse, statistics, None, tile)
        delta = delta_kernel.launch_delta(found[0], d_out, None)
        arguments = problem, d_out, statistics, delta, None, kinds.Gradients(*found[1:])
        if one_pass:
            single.launch_attention_bwd_one_pass(*arguments, None, tile)
        else:
            backward.launch_attention_bwd(*arguments, None, config.BackwardConfig(tile, tile))
    names = ("output", "d_query", "d_key", "d_value")
    for name, actual, truth, peer in zip(names, found, truths, peers, strict=True):
        assert_within_budget(actual, truth=truth, peer=peer, name=name)


def plain_attention() -> None:
    """Forward, dK and dV, dQ."""
    _plain_attention(one_pass=False)


def plain_one_pass() -> None:
    _plain_attention(one_pass=True)


def plain_careful() -> None:
    """The careful forward, whose programs cannot share the tiles evenly; one row of the last tile is marked."""
    checks = _checks("test_attention_careful.py")
    with pytest.MonkeyPatch.context() as patch:
        checks.test_careful_launch_writes_only_tiles_with_a_marked_row((1, 2, 149), 4, machines.DEVICE, patch)


def _norm_tensors(checks: Any) -> dict[str, torch.Tensor]:
    return checks.tensors.__wrapped__(machines.DEVICE)


def norm_forward() -> None:
    """Rows in blocks of columns, the last row and column inside of a tile."""
    checks = _checks("test_residual_norm.py")
    checks.test_forward_under_any_tile("rows_in_a_loop", False, _norm_tensors(checks))


def norm_backward() -> None:
    """Rows in four parts, by programs that share them."""
    checks = _checks("test_residual_norm.py")
    checks.test_backward_under_any_grid("four_parts_and_sums_apart", False, _norm_tensors(checks), None)


def additive() -> None:
    """Forward, weights and gradients of additive attention."""
    checks = _checks("test_additive.py")
    checks.test_additive_under_any_tile("small", -3, machines.DEVICE, None)


# ------------------------------------------------------------------------------------------------------------- decoding


def _decode(**case: Any) -> None:
    checks = _checks("test_attention_decode.py")
    checks.check(checks.Case(length=3, **case), 1, machines.DEVICE)


def decode_whole() -> None:
    """New keys, turned, into a contiguous cache; two shares of what two heads a group see there; their merge."""
    _decode(dtype=torch.bfloat16, rotary="interleaved", lower=-9, splits=2)


def decode_in_pages() -> None:
    """The same in pages that tiles do not divide, for heads of odd sizes, of which a part is turned; more shares than
    some sequences have tiles."""
    _decode(heads=(3, 1), sizes=(59, 59), page_size=48, rotary="halves of a part", leftpad=True, splits=3)


CASES: dict[str, Callable[[], None]] = {
    case.__name__: case
    for case in (
        gluon_forward, gluon_forward_of_few_keys, gluon_pair, gluon_pair_with_bias, gluon_one_pass, plain_attention,
        plain_one_pass, plain_careful, norm_forward, norm_backward, additive, decode_whole, decode_in_pages,
    )
}  # fmt: skip
