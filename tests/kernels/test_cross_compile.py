"""Every kernel compiles for GPUs that are not here, without spills and inside their shared memory.

Each target has a process of its own, because triton decides at import whether it interprets.
"""

import itertools

import pytest

from benchmarks.laboratory.cases import (
    COOKBOOK,
    FUNCTION_FEATURES,
    HOPPER_FEATURES,
    LOADS,
    NORM_FEATURES,
    QUICK_DECODING,
    TARGETS,
    attention_cases,
    cookbook_cases,
    decode_cases,
    function_cases,
    hopper_cases,
    norm_cases,
    packed_cases,
)
from benchmarks.laboratory.hopper import pair_teraflops
from tests.kernels.cross_compile import SHARED_MEMORY, compile_for, hold_to_table

FLOAT = ["cuda:90", "hip:gfx942"]  # the tiles of float32 are the same on every NVIDIA architecture
# All of them are compiled by `make resources`, which takes a quarter of an hour; these by `make test`, too: one of
# either vendor, of 16 bits and of float32.
IN_EVERY_TEST = [("bfloat16", "cuda:90", 128), ("float32", "hip:gfx942", 64)]
EVERY = [
    (dtype, target, head_dim)
    for dtype, targets in (("bfloat16", TARGETS), ("float32", FLOAT))
    for target in targets
    for head_dim in (64, 128, 256, 512)
]


@pytest.mark.parametrize(
    ("dtype", "target", "head_dim"),
    [pytest.param(*case, marks=() if case in IN_EVERY_TEST else pytest.mark.resources) for case in EVERY],
)
def test_every_configuration_compiles_without_spills(dtype, target, head_dim):
    """Every tile under the heaviest load that has it."""
    rows = compile_for(target, attention_cases(dtype, target, head_dim))
    assert {"_attention_fwd_kernel", "_attention_bwd_dkdv_kernel", "_attention_bwd_dq_kernel"} <= {
        row["kernel"] for row in rows
    }
    for row in rows:
        what = f"{row['kernel']} for {target}: {row}"
        assert row["shared"] <= SHARED_MEMORY[target], what
        # the careful pass runs where NaN came out, and may be slow; float32 heads this wide are slow anyway
        if row["again"]:
            # What its careful loops need may wait in local memory, which costs a program some forty instructions. The
            # loops that all programs run stand in front, and nothing of theirs is there.
            assert row["spilled"] <= 128, what
            assert all(loop["spills"] == 0 for loop in row["loops"][: len(row["loops"]) // 2]), what
        elif not row["careful"] and not (dtype == "float32" and head_dim == 512):
            assert row["spilled"] == 0, what
        if "attention" in row["kernel"]:
            assert row["products"] > 0, what
            if dtype != "float32" and target.startswith("cuda"):
                assert row["tensor_core_products"] > 0, what
    hold_to_table(rows)


@pytest.mark.resources
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("target", TARGETS)
def test_packed_kernels_spill_outside_of_loops_only(target, head_dim):
    """Where a sequence begins has to wait somewhere while the loops run."""
    rows = compile_for(target, packed_cases("bfloat16", head_dim))
    assert rows
    for row in rows:
        what = f"{row['kernel']} for {target}: {row}"
        assert row["shared"] <= SHARED_MEMORY[target], what
        assert row["spilled"] <= 128, what
        loops = row["loops"][: len(row["loops"]) // 2] if row["again"] else row["loops"]
        if head_dim == 256 and row["again"]:  # on sm_80 the loop over tiles seen in part spills two numbers
            loops = loops[:1]
        assert loops or row["kernel"] == "_delta_kernel", what
        assert all(loop["spills"] == 0 for loop in loops), what
    hold_to_table(rows)


FUNCTIONS = [
    (dtype, target, head_dim, features)
    for dtype, target in (
        ("bfloat16", "cuda:80"), ("bfloat16", "cuda:90"), ("float16", "cuda:90"), ("float32", "cuda:90"),
    )
    for head_dim in (64, 128)
    for features in FUNCTION_FEATURES
]  # fmt: skip


@pytest.mark.resources
@pytest.mark.parametrize(("dtype", "target", "head_dim", "features"), FUNCTIONS)
def test_kernels_that_call_functions_compile_without_spills(dtype, target, head_dim, features):
    rows = compile_for(target, function_cases(dtype, head_dim, [features]))
    assert {"_attention_fwd_kernel", "_attention_bwd_dkdv_kernel", "_attention_bwd_dq_kernel"} <= {
        row["kernel"] for row in rows
    }
    hold_to_no_spills(rows, most=16 if dtype == "float32" else 0)  # ptxas leaves a few numbers of float32 there
    hold_to_table(rows)


@pytest.mark.resources
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
@pytest.mark.parametrize("example", COOKBOOK)
def test_functions_of_the_cookbook_compile_without_spills(example, target, head_dim):
    """As tracing writes them: forward, backward, and gradients of what is learned."""
    rows = compile_for(target, cookbook_cases("bfloat16", head_dim, [example]))
    assert {"_attention_fwd_kernel", "_attention_bwd_dkdv_kernel", "_attention_bwd_dq_kernel"} <= {
        row["kernel"] for row in rows
    }
    hold_to_no_spills(rows)
    hold_to_table(rows)


# All kernels of all examples take ten minutes, and are compiled by `make resources`.
def test_some_kernels_of_the_cookbook_compile_without_spills():
    """A mask in dK and dV, and a gradient of what is learned; the latter is the same kernel at any length."""
    (masked,), (learned,) = (cookbook_cases("bfloat16", 64, [example]) for example in ("documents", "alibi"))
    learned = {**learned, "passes": ["reads"], "length": 97}
    rows = compile_for("cuda:90", [{**masked, "passes": ["dkdv"]}, learned, {**learned, "length": 511, "keys": 131}])
    compiled = {row["kernel"] for row in rows}
    assert {"_attention_bwd_dkdv_kernel", "_attention_bias_bwd_kernel"} <= compiled
    assert len({row["hash"] for row in rows if row["kernel"] == "_attention_bias_bwd_kernel"}) == 1
    hold_to_no_spills(rows)


def hold_to_no_spills(rows, most=0):
    """Of kernels that call functions: the careful loops of a forward may wait in local memory, and ``most`` bytes."""
    for row in rows:
        what = f"{row['kernel']} for {row['target']}: {row}"
        assert row["shared"] <= SHARED_MEMORY[row["target"]], what
        assert row["spilled"] <= (128 if row["again"] else most), what
        assert all(loop["spills"] == 0 for loop in row["loops"][:2]), what
        multiplies = row["kernel"].startswith("_attention") and row["case"]["dtype"] != "float32"
        assert not multiplies or row["tensor_core_products"] > 0, what


DECODING = [
    *(("bfloat16", target, head_dim) for target in TARGETS for head_dim in (64, 128, 256, 512)),
    *(("float32", target, head_dim) for target in FLOAT for head_dim in (64, 128)),
]


@pytest.mark.parametrize(
    ("dtype", "target", "head_dim"),
    [pytest.param(*case, marks=() if case == QUICK_DECODING else pytest.mark.resources) for case in DECODING],
)
def test_kernels_over_a_cache_compile_without_spills_in_loops(dtype, target, head_dim):
    rows = compile_for(target, decode_cases(dtype, head_dim))
    assert {row["kernel"] for row in rows} == {"_append_kernel", "_attention_decode_kernel", "_merge_kernel"}
    for row in rows:
        what = f"{row['kernel']} for {target}: {row}"
        assert row["shared"] <= SHARED_MEMORY[target], what
        # The loop that all programs run stands in front; the careful one, and what it needs, may wait in local memory.
        # Of float32 ptxas leaves two numbers there, though it takes 72 registers of 255.
        assert row["spilled"] <= (128 if row["again"] else 8 if dtype == "float32" else 0), what
        assert all(loop["spills"] == 0 for loop in row["loops"][:1]), what
        if row["kernel"] == "_attention_decode_kernel" and target.startswith("cuda") and dtype != "float32":
            assert row["tensor_core_products"] > 0, what
            assert row["blocks"] >= 1, what
            # keys and values come 16 bytes at a time, past the registers
            assert row["counts"]["LDGSTS"] >= 2, what
    hold_to_table(rows)


NORMS_IN_EVERY_TEST = ("bfloat16", "cuda:90", "everything")


@pytest.mark.parametrize(
    ("dtype", "target", "features"),
    [
        pytest.param(*case, marks=() if case == NORMS_IN_EVERY_TEST else pytest.mark.resources)
        for case in itertools.product(("bfloat16", "float32"), TARGETS, NORM_FEATURES)
        if case[::2] != ("float32", "mixed")
    ],
)
def test_every_norm_configuration_compiles_without_spills(dtype, target, features):
    rows = compile_for(target, norm_cases(dtype, [features]))
    kernels = {"_residual_norm_fwd_kernel", "_residual_norm_bwd_kernel", "_row_means_kernel", "_sum_over_groups_kernel"}
    assert kernels == {row["kernel"] for row in rows}
    for row in rows:
        what = f"{row['kernel']} for {target}: {row}"
        assert row["shared"] <= SHARED_MEMORY[target], what
        assert row["spilled"] == 0, what
    hold_to_table(rows)


# TFLOP/s on tiles seen whole at head size 128, as the replay of a turn predicts them, where no tile of a mask or bias
# is read; those of the pair are of the five products that one pass does.
MODELLED_FLOORS = {("fwd", ""): 800, ("pair", "causal"): 540, ("pair", "full"): 540, ("one pass", ""): 600}
HOPPER_PASSES = [(head_dim, one) for head_dim in (64, 128) for one in ("fwd", "pair", "one pass")] + [(256, "fwd")]


@pytest.mark.parametrize(
    ("head_dim", "one", "features"),
    [
        pytest.param(*which, name, marks=() if (which[0], name) == (128, "causal") else pytest.mark.resources)
        for which in HOPPER_PASSES
        for name in HOPPER_FEATURES
    ],
)
def test_hopper_kernels_keep_tensor_cores_busy(head_dim, one, features):
    """wgmma that nothing serialises, no spills in its loops, the forward's exponentials hidden behind it; modelled."""
    rows = compile_for("cuda:90", hopper_cases(head_dim, [one], [features]))
    multiplying = [row for row in rows if row["replays"]]
    assert multiplying
    for row in multiplying:
        what = f"{row['kernel']}: {row}"
        assert row["product"] == "HGMMA", what
        assert row["shared"] <= SHARED_MEMORY["cuda:90"], what
        assert row["warnings"] == [], what
        # under every mask at once, tiles seen in part may spill as much as their rows say
        loops = sorted(row["loops"], key=lambda loop: loop["instructions"])
        held = loops[: len(loops) // 2] if features in ("masked", "everything") else loops
        assert not any(loop["spills"] for loop in held), what
        if one == "fwd":
            assert all(loop["overlap"] >= 0.90 for loop in row["loops"]), what
    if head_dim == 128 and features in ("full", "causal"):
        rates = [row["replays"][0]["teraflops"] for row in multiplying]
        rate, kind = (pair_teraflops(*rates), features) if one == "pair" else (rates[0], "")
        assert rate >= MODELLED_FLOORS[one, kind], rates
    hold_to_table(rows)


def test_run_time_rows_do_not_recompile_norms():
    """All numbers of rows share each kernel, but for one row, whose stride is 0; a size may have kernels of its own."""
    rows = (2, 3, 17, 999, 4097, 70001)
    cases = [{"dtype": "bfloat16", "size": 100, "rows": n, **NORM_FEATURES["layer"]} for n in rows]
    compiled: dict[str, set] = {}
    for row in compile_for("cuda:90", cases):
        compiled.setdefault(row["kernel"], set()).add(row["hash"])
    assert {name: len(hashes) for name, hashes in compiled.items()} == dict.fromkeys(compiled, 1)


@pytest.mark.parametrize("load", ["plain", pytest.param("heavy", marks=pytest.mark.resources)])
def test_run_time_values_do_not_recompile(load):
    """Lengths that are multiples of nothing share each kernel; under masks, those that are worth a tile map."""
    lengths = ((97, 130), (1, 3), (33, 1), (511, 1023), (130, 97)) if load == "plain" else ((197, 331), (511, 1023))
    passes = ["fwd", "dkdv", "dq", *["bias", "weights"] * (load == "heavy")]
    shared = {**LOADS[load], "dtype": "bfloat16", "head_dim": 64, "careful": load == "plain", "passes": passes}
    cases = [{**shared, "length": length, "keys": keys} for length, keys in lengths]
    rows = compile_for("cuda:90", cases)
    compiled = {}
    for row in rows:
        compiled.setdefault((row["kernel"], row["careful"]), set()).add(row["hash"])
    expected = dict.fromkeys(compiled, 1)
    if load == "plain":  # the one row that sees every key hides none of them: it has no careful loops, and marks none
        expected |= {(f"_attention_{name}_kernel", None): 2 for name in ("fwd", "bwd_dq", "bwd_dkdv")}
    else:  # the lists of rows of a forward, and those of rows and of keys of a backward
        expected |= {("_tile_lists_kernel", None): 2}
    assert {name: len(hashes) for name, hashes in compiled.items()} == expected


def test_run_time_values_do_not_recompile_packed_kernels():
    """Neither do other numbers of sequences, nor where they count from."""
    features = {"dtype": "bfloat16", "head_dim": 64, "causal": True, "window": True, "bias": True}
    shapes = ((97, 130, 3), (33, 5, 1), (511, 1023, 16), (130, 97, 40))
    cases = [
        {**features, "passes": ["fwd", "dkdv", "dq"], "length": length, "keys": keys, "packed": sequences}
        for length, keys, sequences in shapes
    ]
    compiled: dict[str, set] = {}
    for row in compile_for("cuda:90", cases):
        compiled.setdefault(row["kernel"], set()).add(row["hash"])
    assert "_attention_fwd_kernel" in compiled
    assert {name: len(hashes) for name, hashes in compiled.items()} == dict.fromkeys(compiled, 1)


def test_run_time_values_do_not_recompile_kernels_over_a_cache():
    """Neither lengths, nor room, nor what the slots are divided by, nor how far one sees."""
    features = {"dtype": "bfloat16", "head_dim": 64, "page_size": 16, "window": True}
    cases = [
        {**features, "length": length, "room": room, "splits": splits}
        for length, room, splits in ((2, 4096, 2), (3, 512, 3), (4, 8192, 16))
    ]
    compiled: dict[str, set] = {}
    for row in compile_for("cuda:90", cases):
        compiled.setdefault(row["kernel"], set()).add(row["hash"])
    assert "_attention_decode_kernel" in compiled
    assert {name: len(hashes) for name, hashes in compiled.items()} == dict.fromkeys(compiled, 1)
