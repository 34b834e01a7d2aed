"""The family of attention's kernels: configurations as variants, the backward alone, what refuses, which cases."""

import dataclasses
import importlib.util
import sys
import types

import pytest
import torch

import fastattn
from benchmarks.cases import AttentionCase, KernelCase
from benchmarks.families import attention, configurations, families, kernels, masks
from benchmarks.families.configurations import CANDIDATES, Candidate
from benchmarks.gpu.matrix import matrix
from benchmarks.measure.accuracy import Gate
from benchmarks.run_case import run_case
from benchmarks.variants import Refused

FAMILY = kernels.FAMILY
CASE = KernelCase("kernels", 2, 1, 21, 16, mask="causal")
BACKWARD = dataclasses.replace(CASE, backward=True)
TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(autouse=True)
def _compiled_code():
    """Of the public function: what is tested is the suite."""
    with fastattn.use_backend("torch"):
        yield


def passes(case, name):
    """Once, without being timed: the interpreter takes its time."""
    variant = FAMILY.variant(name)
    return Gate(FAMILY, case).check(variant.build(case, case.dtype), variant).passed


def rows_of(case, *names):
    return {row.variant: row for row in run_case(FAMILY, case, seconds=0.0, only=names)}


# ----------------------------------------------------------------------------------------------------------- candidates


def test_candidates_have_names_of_their_own():
    assert Candidate("triton", "forward", (128, 64, 8, 3), (64, 128)).name == "fastattn-triton-128x64-w8-s3"
    assert Candidate("triton", "forward", (128, 128, 8, 2, 1)).name == "fastattn-triton-128x128-w8-s2-pipelined"
    assert Candidate("triton", "dq", (128, 64, 8, 2)).name == "fastattn-triton-dq-128x64-w8-s2"
    assert Candidate("gluon", "forward", (64, 2, 0)).name == "fastattn-gluon-n64-s2-unstaged"
    assert Candidate("gluon", "forward", (64, 2, 1, 1)).name == "fastattn-gluon-n64-s2-ping-pong"
    assert Candidate("gluon", "pair", (64, 128, 2)).name == "fastattn-gluon-pair-m64-n128-s2"
    assert Candidate("gluon", "one-pass", (64, 128, 2)).name == "fastattn-gluon-one-pass-m64-s2"
    assert Candidate("triton", "one-pass").name == "fastattn-triton-one-pass"
    names = [candidate.name for candidate in CANDIDATES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_every_head_size_has_configurations_beside_the_packages_own(head_dim, backward):
    case = dataclasses.replace(CASE, head_dim=head_dim, backward=backward)
    own, every = (configurations.names_for(case, every=every) for every in (False, True))
    assert set(own) < set(every)
    assert own == (
        tuple(f"fastattn-{of}{part}" for part in ("-pair", "-one-pass") for of in ("gluon", "triton"))
        if backward
        else ("fastattn-gluon", "fastattn-triton")
    )
    assert sum(name.startswith("fastattn-triton-") for name in every) >= 3


def test_table_of_the_package_is_among_the_plain_configurations():
    """Without a mask: else a sweep would say nothing of the package's own choice."""
    tables = pytest.importorskip("fastattn_kernels.attention.tile_tables", reason="triton is not installed")
    parts: tuple[configurations.Part, ...] = ("forward", "dkdv", "dq", "one-pass")
    for part in parts:
        for head_dim, swept in configurations._CONFIGURATIONS["triton", part].items():
            *tile, pipelined = tables.HALF["sm_90"][part.replace("-", "_")][head_dim][0]
            assert ((*tile, 1) if pipelined else tuple(tile)) in swept, (part, head_dim)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_choice_of_the_package_is_among_the_gluon_configurations(head_dim):
    """Without a mask, as above; head size 256 has a forward only."""
    pytest.importorskip("fastattn_kernels.attention.hopper.problem", reason="triton or its Gluon is not installed")
    from fastattn_kernels.attention.hopper.config import backward_config, forward_config

    case = dataclasses.replace(CASE, head_dim=head_dim, dtype=torch.bfloat16)
    query, key, value, _ = masks.inputs(case, case.dtype)
    problem = configurations._problem(query, key, value, {})
    chosen = forward_config(problem)
    swept = configurations._CONFIGURATIONS["gluon", "forward"][head_dim]
    assert (chosen.block_n, chosen.stages, int(chosen.stage_output)) in swept
    if head_dim <= 128:
        for part, deterministic in (("pair", True), ("one-pass", False)):
            config = backward_config(problem, deterministic)
            numbers = (config.block_m, config.block_n, config.stages)
            assert numbers in configurations._CONFIGURATIONS["gluon", part][head_dim]


# ------------------------------------------------------------------------------------------------------- refuse and run


@TRITON
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_kernels_say_why_they_refuse(monkeypatch):
    def reason(name, case):
        return FAMILY.variant(name).applies(case) or "applies"

    assert "needs a GPU" in reason("fastattn-gluon", CASE)
    assert reason("fastattn-gluon-n64-s2", CASE) == "has no forward for head_dim=16"
    assert reason("fastattn-gluon", BACKWARD) == "has no backward for head_dim=16"
    assert reason("fastattn-triton", dataclasses.replace(CASE, weights=True)) == "returns no weights"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "no measure" in reason("fastattn-triton", CASE)
    on_cuda = dataclasses.replace(CASE, device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert reason("fastattn-gluon", on_cuda) == "is for compute capability 9.0, and this is 8.0"
    assert reason("fastattn-triton", on_cuda) == "applies"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert reason("fastattn-gluon", on_cuda) == "applies"
    monkeypatch.setattr(configurations.importlib.util, "find_spec", lambda name: None)
    assert reason("fastattn-triton", on_cuda) == "triton is not installed"


@TRITON
@pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter")
@pytest.mark.parametrize("mask", ["causal", "bias"])
def test_plain_kernels_are_right_in_the_interpreter(mask):
    """Forward, and backward alone, beside a peer that goes back through its own graph."""
    for case, names in (
        (CASE, ["fastattn-triton"]),
        (BACKWARD, ["fastattn-triton-pair", "fastattn-triton-one-pass"]),
    ):
        for name in (*names, "sdpa"):
            assert passes(dataclasses.replace(case, mask=mask), name)


@pytest.fixture
def hopper(monkeypatch):
    """Stands where the Hopper kernels do, and runs the plain ones: who was launched, and with which configuration."""
    plain_fwd = pytest.importorskip("fastattn_kernels.attention.forward", reason="triton is not installed")
    plain_bwd = importlib.import_module("fastattn_kernels.attention.backward")
    found = types.SimpleNamespace(launched=[], refusals=[], writes=True)

    def launch_fwd(problem, out, lse, statistics, tile_map, config):
        found.launched.append(config)
        if found.writes:
            plain_fwd.launch_attention_fwd(problem, out, lse, statistics, tile_map)

    def launch_bwd(problem, d_output, statistics, delta, gradients, tile_map, config):
        found.launched.append(config)
        plain_bwd.launch_attention_bwd(problem, d_output, statistics, delta, None, gradients, tile_map)

    def config(*numbers, one_pass):
        return types.SimpleNamespace(numbers=numbers, one_pass=one_pass)

    def backward_config(problem, deterministic):
        return config("own", one_pass=not deterministic and problem.bias is None)

    fields = {
        "problem": {"refusals": lambda problem: found.refusals},
        "config": {
            "ForwardConfig": lambda *numbers, stage_output, ping_pong: (*numbers, stage_output, ping_pong),
            "BackwardConfig": config,
            "backward_config": backward_config,
        },
        "forward": {"launch_attention_fwd": launch_fwd},
        "backward": {"launch_attention_bwd": launch_bwd, "refusals": lambda problem: found.refusals},
    }
    package = types.ModuleType("fastattn_kernels.attention.hopper")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, package.__name__, package)
    for name, values in fields.items():
        module = types.ModuleType(f"{package.__name__}.{name}")
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(package, name, module, raising=False)
    monkeypatch.setattr(configurations, "_no_device", lambda kernels, case: None)
    return found


def test_hopper_kernels_are_launched_as_configured(hopper):
    case = dataclasses.replace(CASE, head_dim=64, batch=1)
    assert passes(case, "fastattn-gluon-n64-s4")
    assert passes(case, "fastattn-gluon")
    assert hopper.launched == [(128, 64, 4, True, False)] * 2 + [None] * 2  # built and checked
    hopper.launched.clear()
    for name in ("fastattn-gluon-pair", "fastattn-gluon-one-pass-m64-s3", "fastattn-gluon-pair-m64-n128-s3"):
        assert passes(dataclasses.replace(case, backward=True), name)
    found = [(config.numbers, config.one_pass) for config in hopper.launched[::2]]
    assert found == [(("own",), False), ((64, 128, 3), True), ((64, 128, 3), False)]


def test_hopper_kernel_that_refuses_says_so(hopper):
    hopper.refusals = ["scale=-1", "dropout_p=0.1"]
    for case, name in ((CASE, "fastattn-gluon"), (BACKWARD, "fastattn-gluon-pair")):
        (row,) = rows_of(case, name).values()
        assert (row.status, row.reason) == ("refused", "scale=-1; dropout_p=0.1")
    assert hopper.launched == []


def test_one_pass_that_would_be_the_pair_refuses(hopper):
    (row,) = rows_of(dataclasses.replace(BACKWARD, mask="bias"), "fastattn-gluon-one-pass").values()
    assert (row.status, row.reason) == ("refused", "does not fit in one pass")


def test_kernel_that_writes_nothing_is_wrong(hopper):
    """Memory that is only empty may hold the right result of another variant."""
    hopper.writes = False
    assert not passes(CASE, "fastattn-gluon")


def test_tile_that_does_not_fit_is_refused(hopper, monkeypatch):
    """Under a bias, say; it is no fault of the kernel."""
    errors = importlib.import_module("triton.runtime.errors")

    def too_large(*arguments):
        raise errors.OutOfResources(262584, 232448, "shared memory")

    monkeypatch.setattr(sys.modules["fastattn_kernels.attention.hopper.forward"], "launch_attention_fwd", too_large)
    (row,) = rows_of(CASE, "fastattn-gluon").values()
    assert row.status == "refused", row.reason
    assert "262584" in row.reason


@TRITON
def test_gluon_that_does_not_load_is_refused(monkeypatch):
    package = importlib.import_module("fastattn_kernels.attention.hopper")
    monkeypatch.setitem(sys.modules, "fastattn_kernels.attention.hopper.forward", None)
    monkeypatch.delattr(package, "forward", raising=False)  # there if a test before this one imported it
    monkeypatch.setattr(configurations, "_no_device", lambda kernels, case: None)
    with pytest.raises(Refused, match="does not load"):
        FAMILY.variant("fastattn-gluon").build(CASE, torch.float32)


# --------------------------------------------------------------------------------------------------- work, cases, masks


@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "bias"])
def test_backward_alone_is_training_without_the_forward(mask):
    training = AttentionCase("attention", 2, 3, 48, 16, mask=mask, backward=True)
    whole = attention.work(training, "")
    parts = [
        attention.work(KernelCase("kernels", 2, 3, 48, 16, mask=mask, backward=backward), "")
        for backward in (False, True)
    ]
    assert sum(part.flops or 0 for part in parts) == whole.flops
    assert sum(part.moved_bytes or 0 for part in parts) == whole.moved_bytes
    assert parts[1].formula.startswith("flops 10 D H P")


def test_names_say_the_direction():
    assert CASE.name == "kernels-b2-h1-l21-d16-forward-causal-float32"
    assert BACKWARD.name == "kernels-b2-h1-l21-d16-backward-causal-float32"


def test_kernels_have_no_case_on_a_cpu():
    assert kernels.quick_cases() == kernels.more_cases() == []
    assert {case.device for case, _ in kernels.trial()} == {"cpu"}
    assert all(case.dtype == torch.float32 for case, _ in kernels.trial())


def test_matrix_begins_with_the_kernels():
    found = matrix()
    telling = [case for case, _ in found if isinstance(case, KernelCase)]
    assert [case for case, _ in found[: len(telling)]] == telling
    met = {(case.seqlen, case.head_dim, case.mask, case.backward) for case in telling}
    for head_dim in (128, 64):
        for backward in (False, True):
            for seqlen in (2048, 4096, 8192):
                masks_there = {"none", "causal", "bias", "boolean", "padding", "window"}
                assert {(seqlen, head_dim, mask, backward) for mask in masks_there} <= met
            assert {(16384, head_dim, mask, backward) for mask in ("none", "causal", "padding", "window")} <= met
    assert all(case.batch * case.seqlen == 16384 and case.heads * case.head_dim == 2048 for case in telling)
    names = {name for case, names in found if isinstance(case, KernelCase) for name in names}
    assert {"fastattn", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "fastattn-gluon-one-pass"} <= names


def test_question_is_the_beginning_of_the_matrix_beside_cudnn():
    asked = matrix(part="question")
    assert [case for case, _ in asked] == [case for case, _ in matrix()[: len(asked)]]
    assert {(case.mask, case.backward) for case, _ in kernels.question()} == {
        (mask, backward) for mask in ("none", "causal") for backward in (False, True)
    }
    for case, names in kernels.question():
        assert (case.seqlen, case.head_dim) == (8192, 128)
        assert {"fastattn", "fastattn-gluon", "fastattn-gluon-pair", "fastattn-gluon-one-pass", "fastattn-triton"} >= {
            name for name in names if name.startswith("fastattn-gluon")
        }
        assert {"fastattn", "sdpa-cudnn", "sdpa-flash"} <= set(names)
    rest = [case for case, _ in matrix(part="rest")]
    assert [case for case, _ in matrix()] == [case for case, _ in asked] + rest


def test_what_takes_a_compiler_comes_last_and_so_costs_nothing_else_its_time():
    slow = {family.name: {v.name for v in family.variants if v.slow} for family in families().values()}
    compiles = [bool(slow[case.family] & set(names)) for case, names in matrix()]
    assert compiles == sorted(compiles)
    assert 0 < sum(compiles) < len(compiles) / 4


def test_sweep_reaches_from_512_to_16384_with_every_configuration():
    found = kernels.sweep()
    assert {case.seqlen for case, _ in found} == {512, 1024, 2048, 4096, 8192, 16384}
    assert {case.head_dim for case, _ in found} == {64, 128, 256}
    assert {"none", "causal", "bias", "boolean", "padding", "window", "sparse"} == {case.mask for case, _ in found}
    assert len({case.name for case, _ in found}) == len(found)
    met = {name for _, names in found for name in names}
    assert met == {"fastattn", *(c.name for c in CANDIDATES), "sdpa-cudnn", "sdpa-flash"}
    assert met <= {variant.name for variant in families()["kernels"].variants}
    for case, names in found:
        assert not [name for name in names for c in CANDIDATES if c.name == name and not c.takes(case)]


@pytest.mark.parametrize("mask", ["boolean", "sparse"])
def test_random_mask_is_drawn_once_for_all_variants(mask):
    case = dataclasses.replace(CASE, mask=mask, seqlen=150)
    drawn = [masks.masks(c, torch.float32)["attn_mask"] for c in (case, dataclasses.replace(case, backward=True))]
    assert drawn[0] is drawn[1]
    other = masks.masks(dataclasses.replace(case, seed=1), torch.float32)["attn_mask"]
    assert not torch.equal(drawn[0], other)
