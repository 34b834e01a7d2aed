"""The laboratory: machine code whose answers are known, the models' arithmetic, the page and its guard."""

import copy
import re
from pathlib import Path

import pytest

from benchmarks import __main__ as command_line
from benchmarks.laboratory import cases, hopper, model, sass, table
from benchmarks.laboratory import command_line as laboratory
from benchmarks.laboratory.targets import blocks_resident

ROOT = Path(__file__).parents[2]

PRODUCT = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24"
FROM_REGISTERS = "HGMMA.64x128x16.F32.BF16 R24, R8, gdesc[UR4], R24"
RETIRE = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
EXP2 = "MUFU.EX2 R8, R8"
WAIT = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR5+0x8], R6"
ARRIVE = "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR5], RZ"


def dump(*lines, stall=1):
    """As cuobjdump prints it: an instruction every sixteen bytes, with the word that holds how long it stalls."""
    text = "\tcode for sm_90a\n\t\tFunction : kernel\n"
    for number, line in enumerate(lines):
        text += f"        /*{16 * number:04x}*/                   {line} ;   /* 0x00000a00ff017b82 */\n"
        text += f"{' ' * 80}/* 0x{stall << 41 | 0xE << 52:016x} */\n"
    return text


def loop_of(*lines, stall=1):
    """The loop that turns over all of ``lines``."""
    (loop,) = sass.hot_loops(sass.parse(dump(*lines, "@P1 BRA 0x0", "EXIT", stall=stall)))
    return loop


# -------------------------------------------------------------------------------------------------------------- sass


def test_sass_instruction_is_read_whole():
    first, second, third = sass.parse(dump("@!UP0 UIADD3 UR4, UR4, 0x1, URZ", f"{PRODUCT}, gsb0", RETIRE, stall=9))
    assert (first.predicate, first.name, first.operands) == ("@!UP0", "UIADD3", "UR4, UR4, 0x1, URZ")
    assert (second.address, second.opcode) == (16, "HGMMA.64x128x16.F32.BF16")
    assert (second.commits, first.commits) == (True, False)
    assert (second.groups_left, third.groups_left) == (None, 0)
    assert {step.stall for step in (first, second, third)} == {9}


def test_sass_counts_opcodes_without_modifiers():
    counts = sass.count(sass.parse(dump(EXP2, "MUFU.RCP R1, R1", "LDL.64 R2, [R1]", "STL [R1], R2")))
    assert counts == {"MUFU": 2, "LDL": 1, "STL": 1}


def test_sass_hot_loop_leaves_out_what_waits_out_of_line():
    """The retry of a wait stands behind the end; its way back is no loop, though it branches backward over much."""
    lines = [
        "MOV R1, R2",
        WAIT,  # 0x10: the loop begins
        "@!P0 BRA 0x80",
        f"{PRODUCT}, gsb0",
        EXP2,
        RETIRE,
        "@P1 BRA 0x10",
        "EXIT",
        WAIT,  # 0x80
        "@!P0 BRA 0x80",
        "BRA 0x30",
    ]
    (loop,) = sass.hot_loops(sass.parse(dump(*lines)))
    assert [step.address for step in loop.instructions] == [0x10, 0x20, 0x30, 0x40, 0x50, 0x60]
    assert (loop.products, loop.spills, loop.counts["MUFU"]) == (1, 0, 1)


def test_sass_hot_loops_are_the_innermost_ones_that_multiply():
    """Around them goes the loop over tiles, beside them one that only adds."""
    lines = [
        f"{PRODUCT}, gsb0",  # 0x0: over tiles
        PRODUCT,  # 0x10: over keys
        "STL [R1], R2",
        "@P0 BRA 0x10",
        "FADD R1, R1, R2",  # 0x40
        "@P1 BRA 0x40",
        "@P2 BRA 0x0",
        "EXIT",
    ]
    (loop,) = sass.hot_loops(sass.parse(dump(*lines)))
    assert [step.address for step in loop.instructions] == [0x10, 0x20, 0x30]
    assert loop.spills == 1


def test_sass_hot_loops_of_warps_that_specialise():
    """A jump through a table leads to each part; nothing in the text says so."""
    part = [f"{PRODUCT}, gsb0", RETIRE, "@P0 BRA {}", "EXIT"]
    lines = ["BRX R6 -0x240", *part, *part]
    lines[3], lines[7] = "@P0 BRA 0x10", "@P0 BRA 0x50"
    loops = sass.hot_loops(sass.parse(dump(*lines)))
    assert [loop.instructions[0].address for loop in loops] == [0x10, 0x50]


def test_sass_loop_goes_on_where_threads_meet_again():
    """BSYNC jumps to where its BSSY said; the conditional branch in front of it is a part of the loop."""
    lines = [
        "BSSY B0, 0x50",
        "@P0 BRA 0x40",
        PRODUCT,
        "MOV R1, R1",
        "BSYNC B0",
        "@P1 BRA 0x0",
        "EXIT",
    ]
    (loop,) = sass.hot_loops(sass.parse(dump(*lines)))
    assert len(loop.instructions) == 6


# -------------------------------------------------------------------------------------------------------------- model


def test_model_bound_by_products():
    """Eight products of N = 128 take 64 cycles each, of two warpgroups 1024; the rest is hidden but for the end."""
    loop = loop_of(*[PRODUCT] * 7, f"{PRODUCT}, gsb0", EXP2, RETIRE, EXP2, stall=3)
    found = model.bound(loop, warpgroups=2)
    assert (found.tensor_cycles, found.cycles) == (512, 1024)
    assert found.teraflops == pytest.approx(model.PEAK_TERAFLOPS) == pytest.approx(132 * 4096 * 1.55e-3)
    assert (found.exponentials, found.hidden_exponentials, found.overlap) == (2, 1, 0.5)
    # in front of the first group 7 products; the wait, what follows it and the branch, three cycles each
    assert found.exposed_cycles == 3 * (7 + 3)


def test_model_bound_by_exponentials():
    """A hundred of them take 800 cycles of a warp: of two 1600, in which tensor cores are busy for 1024."""
    loop = loop_of(*[PRODUCT] * 7, f"{PRODUCT}, gsb0", *[EXP2] * 100, RETIRE)
    found = model.bound(loop, warpgroups=2)
    assert found.pipe_cycles["mufu"] == found.cycles == 1600
    assert found.teraflops == pytest.approx(model.PEAK_TERAFLOPS * 1024 / 1600)
    assert found.overlap == 1


def test_model_bound_of_warpgroups_in_step():
    """What one does without products, nobody multiplies under: 1024 cycles of products, 100 exponentials of both."""
    loop = loop_of(*[PRODUCT] * 7, f"{PRODUCT}, gsb0", RETIRE, *[EXP2] * 100)
    assert model.bound(loop, warpgroups=2).cycles == 1600
    assert model.bound(loop, warpgroups=2, in_step=True).cycles == 1024 + 1600


def test_model_hides_exponentials_under_products_of_the_turn_before():
    loop = loop_of(EXP2, RETIRE, f"{PRODUCT}, gsb0")
    assert model.bound(loop).overlap == 1


def test_model_replay_of_products_alone():
    """Each product takes 64 cycles of tensor cores and, with both operands there, 48 of the shared memory's port."""
    loop = loop_of(*[PRODUCT] * 15, f"{PRODUCT}, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1")
    found = model.replay([loop, loop])
    assert found.cycles == pytest.approx(2048, rel=0.01)
    assert found.tensor_busy == pytest.approx(1, rel=0.01)
    assert found.port_busy == pytest.approx(48 / 64, rel=0.01)


def test_model_replay_left_operand_in_registers_spares_the_port():
    loop = loop_of(*[FROM_REGISTERS] * 15, f"{FROM_REGISTERS}, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1")
    assert model.replay([loop, loop]).port_busy == pytest.approx(32 / 64, rel=0.01)


def test_model_replay_is_bound_by_the_port_where_copies_want_it():
    """1536 cycles of operands and 1024 of copied tiles do not fit into the 2048 of the products."""
    loop = loop_of(*[PRODUCT] * 15, f"{PRODUCT}, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1")
    found = model.replay([loop, loop], copied_bytes=128 * 1024)
    assert found.cycles > 2300
    assert found.tensor_busy < 0.9


def test_model_replay_waits_for_the_other_warpgroup():
    """One that has much to do before it hands over delays the other, which has nothing to do."""
    work = ["FADD R1, R1, R2"] * 200
    busy = loop_of(*work, ARRIVE, WAIT, f"{PRODUCT}, gsb0", RETIRE, stall=4)
    idle = loop_of(ARRIVE, WAIT, f"{PRODUCT}, gsb0", RETIRE)
    alone = model.replay([idle, idle]).cycles
    assert alone < 200
    assert model.replay([busy, idle], hand_over=model.HandOver(wait=0)).cycles > 4 * len(work)


def test_hopper_replay_takes_whole_tiles_first_and_counts_what_is_copied():
    """Tiles of keys and values of 128 x 128 bfloat16 are 64 KiB a turn: 512 cycles of the port, beside operands."""
    whole = loop_of(*[PRODUCT] * 15, f"{PRODUCT}, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1")
    in_part = loop_of(*[PRODUCT] * 15, f"{PRODUCT}, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1", *[EXP2] * 400)
    tile = "tensordesc<bf16[1, 1, 128, 128],NVMMASharedLayout(swizzle_byte_width=128)>"
    signature = {"k_desc": tile, "v_desc": tile, "b_desc": "constexpr"}
    found = hopper.replays("_attention_fwd_kernel", signature, [in_part, whole, in_part, whole])
    assert found is not None
    assert found[0].port_busy == pytest.approx((1536 + 512) / 2048, rel=0.02)
    assert found[1].tensor_busy < 0.5
    assert hopper.replays("_other_kernel", signature, [whole, whole]) is None


def test_hopper_pair_of_passes_counts_the_products_of_one():
    assert hopper.pair_teraflops(700, 700) == pytest.approx(500)


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "blocks"),
    [
        ("cuda:90", 255, 0, 8, 1),  # 32 * 255 registers a warp are handed out as 8192: two warps a sub-partition
        ("cuda:90", 128, 0, 4, 4),
        ("cuda:90", 32, 100 * 1024, 4, 2),
        ("cuda:90", 32, 232448, 4, 1),
        ("cuda:90", 16, 0, 4, 16),  # 64 warps
        ("cuda:120", 32, 0, 4, 12),  # 48
        ("hip:gfx942", 304, 8192, 4, 1),
        ("hip:gfx942", 128, 16384, 4, 4),
    ],
)
def test_blocks_resident(target, registers, shared, warps, blocks):
    assert blocks_resident(target, registers, shared, warps) == blocks


# -------------------------------------------------------------------------------------------------- the page's guard

ROW = {
    "kernel": "_attention_fwd_kernel",
    "for_hopper": False,
    "target": "cuda:90",
    "case": {"name": "attention bf16 D128 plain"},
    "shared": 163840,
    "warps": 8,
    "stages": 2,
    "hash": "a",
    "careful": False,
    "sides": [128, 128],
    "blocks": 1,
    "registers": 240,
    "spilled": 0,
    "products": 32,
    "tensor_core_products": 32,
    "local_memory": 0,
    "product": "HGMMA",
    "counts": {"MUFU": 137, "LDG": 5, "STG": 7, "LDGSTS": 48, "UTMALDG": 2, "BAR": 15, "PRMT": 56},
    "loops": [
        {"instructions": 873, "products": 16, "spills": 0, "overlap": 0.5, "teraflops": 412.4},
        {"instructions": 462, "products": 16, "spills": 0, "overlap": 0.97, "teraflops": 601.0},
    ],
    "replays": [],
    "warnings": [],
    "triton": "3.7.1",
}
CAREFUL = {**ROW, "hash": "b", "careful": True, "spilled": 96, "loops": []}


def committed(tmp_path, *rows):
    (tmp_path / "page.md").write_text(table.document(list(rows)))
    return table.read(tmp_path / "page.md")


def test_page_is_read_as_it_was_written(tmp_path):
    page = committed(tmp_path, ROW, CAREFUL, {**ROW, "hash": "c"}, {**ROW, "case": {"name": "the same binary"}})
    case = "attention bf16 D128 plain"
    assert page.triton == "3.7.1"
    assert list(page.rows) == [
        ("cuda:90", case, "attention_fwd"),
        ("cuda:90", case, "attention_fwd careful"),
        ("cuda:90", case, "attention_fwd 2"),
    ]
    first = page.rows[table.Key("cuda:90", case, "attention_fwd")]
    assert (first["loop"], first["exp2 hidden"], first["TF/s"]) == ("462/873", "0.97/0.50", "601/412")
    assert (first["products"], first["memory"], first["blocks"]) == ("HGMMA 32", "5/7/48/2", "1 (8)")


def test_guard_lets_pass_what_is_as_it_was_or_better(tmp_path):
    page = committed(tmp_path, ROW, CAREFUL)
    assert table.regressions([ROW, CAREFUL], page) == []
    assert table.regressions([{**ROW, "registers": 248, "shared": 1000}, {**CAREFUL, "spilled": 0}], page) == []


@pytest.mark.parametrize(
    ("doctored", "complaint"),
    [
        ({"registers": 249}, "registers: was 240, is 249"),
        ({"spilled": 8}, "spilled: was 0, is 8"),
        ({"shared": 163856}, "shared: was 163840, is 163856"),
        ({"product": "HMMA"}, "matrix products: were HGMMA, are HMMA"),
        ({"product": "", "products": 0, "tensor_core_products": 0}, "matrix products: were HGMMA, are none"),
        ({"warnings": ["C7510"]}, "ptxas: said nothing, says C7510"),
    ],
)
def test_guard_names_the_row_and_both_values(tmp_path, doctored, complaint):
    (found,) = table.regressions([{**ROW, **doctored}], committed(tmp_path, ROW))
    assert "attention_fwd, attention bf16 D128 plain, cuda:90 (128x128, 8 warps)" in found
    assert complaint in found


def test_guard_knows_limits_without_any_row(tmp_path):
    """More shared memory than a block may have, which the compiler does not check, is wrong in a new row, too."""
    new = {**ROW, "case": {"name": "new"}, "shared": 232449}
    assert table.regressions([new], committed(tmp_path, ROW)) == [
        "attention_fwd, new, cuda:90 (128x128, 8 warps): 232449 shared, of 232448"
    ]


def test_guard_misses_a_kernel_that_is_gone(tmp_path):
    (found,) = table.regressions([ROW], committed(tmp_path, ROW, CAREFUL))
    assert found.startswith("attention_fwd careful, attention bf16 D128 plain, cuda:90 has a row")


def test_guard_is_silent_under_another_triton(tmp_path):
    worse = {**ROW, "registers": 255, "spilled": 100, "triton": "3.6.0"}
    assert table.regressions([worse], committed(tmp_path, ROW, CAREFUL)) == []


def test_committed_page_has_the_rows_that_tests_compile():
    page = table.read()
    for dtype, target, head_dim in cases.QUICK_ATTENTION:
        names = {case["name"] for case in cases.attention_cases(dtype, target, head_dim)}
        kernels = {key.kernel for key in page.rows if key.target == target and key.case in names}
        assert {"attention_fwd", "attention_bwd_dkdv", "attention_bwd_dq"} <= kernels, (dtype, target, head_dim)
    for dtype, target in cases.QUICK_NORMS:
        names = {case["name"] for case in cases.norm_cases(dtype)}
        kernels = {key.kernel for key in page.rows if key.target == target and key.case in names}
        assert {"residual_norm_fwd", "residual_norm_bwd"} <= kernels, (dtype, target)
    dtype, target, head_dim = cases.QUICK_DECODING
    names = {case["name"] for case in cases.decode_cases(dtype, head_dim)}
    kernels = {key.kernel for key in page.rows if key.target == target and key.case in names}
    assert {"append", "attention_decode", "merge"} <= kernels


def test_committed_page_is_of_the_triton_that_make_installs():
    pinned = re.search(r"triton==(\S+)", (ROOT / "constraints.txt").read_text())
    assert pinned
    assert table.read().triton == pinned[1], "`make resources` writes docs/kernel_resources.md anew"


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Nothing is compiled; what would have been is collected."""
    jobs = []

    def compile_all(asked, processes, code):
        jobs.extend(asked)
        return copy.deepcopy([ROW, CAREFUL]), []

    monkeypatch.setattr(laboratory, "compile_all", compile_all)
    monkeypatch.setattr(table, "PATH", tmp_path / "page.md")
    return jobs


def test_laboratory_compiles_and_prints_what_is_asked_for(compiled, capsys):
    assert command_line.main(["laboratory", "--target", "cuda:90", "--only", "attention bf16 D128 plain"]) == 0
    assert [(target, [case["name"] for case in of]) for target, of in compiled] == [
        ("cuda:90", ["attention bf16 D128 plain"]),
        ("cuda:90", ["attention bf16 D128 plain one pass"]),
    ]
    assert "HGMMA 32" in capsys.readouterr().out


def test_laboratory_takes_a_kernels_name_for_that_of_a_case(compiled, capsys):
    assert command_line.main(["laboratory", "--only", "fwd careful"]) == 0
    assert {target for target, _ in compiled} == set(cases.TARGETS)
    printed = capsys.readouterr().out
    assert "attention_fwd careful" in printed
    assert "kernels: 1," in printed


@pytest.mark.usefixtures("compiled")
def test_laboratory_says_that_nothing_has_the_name(capsys):
    assert command_line.main(["laboratory", "--only", "nothing-like-it"]) == 2
    assert "nothing-like-it" in capsys.readouterr().err


@pytest.mark.usefixtures("compiled")
def test_laboratory_writes_page_and_json(tmp_path):
    assert command_line.main(["laboratory", "--write", "--json", str(tmp_path / "rows.json")]) == 0
    assert len(table.read(tmp_path / "page.md").rows) == 2
    assert (tmp_path / "rows.json").read_text().startswith("[")


@pytest.mark.usefixtures("compiled")
def test_laboratory_writes_no_page_where_a_case_does_not_compile(monkeypatch, capsys):
    monkeypatch.setattr(laboratory, "compile_all", lambda *_: ([ROW], ["norm N64 does not compile: why"]))
    assert command_line.main(["laboratory", "--write"]) == 1
    assert "norm N64 does not compile" in capsys.readouterr().err
    assert not table.PATH.exists()


@pytest.mark.usefixtures("compiled")
def test_laboratory_writes_rows_of_some_cases_and_keeps_the_others():
    other = {**ROW, "case": {"name": "norm"}, "hash": "another", "registers": 77}
    outdated = {**ROW, "registers": 1}
    table.PATH.write_text(table.document([outdated, other]))
    assert command_line.main(["laboratory", "--write", "--only", "attention bf16 D128"]) == 0
    registers = {(key.case, key.kernel): row["registers"] for key, row in table.read(table.PATH).rows.items()}
    assert registers == {
        ("norm", "attention_fwd"): "77",
        ("attention bf16 D128 plain", "attention_fwd"): str(ROW["registers"]),
        ("attention bf16 D128 plain", "attention_fwd careful"): str(CAREFUL["registers"]),
    }


@pytest.mark.usefixtures("compiled")
def test_laboratory_keeps_no_rows_of_another_triton():
    table.PATH.write_text(table.document([{**ROW, "triton": "3.6.0"}]))
    with pytest.raises(ValueError, match=r"of triton 3\.6\.0, not"):
        command_line.main(["laboratory", "--write", "--only", "attention"])
    assert "triton 3.6.0" in table.PATH.read_text()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    "options", [["--only", "attention_fwd"], ["--target", "cuda:90"], ["--only", "norm", "--with", "python"]], ids=str
)
def test_laboratory_writes_no_page_of_what_is_no_set_of_cases(options, capsys):
    with pytest.raises(SystemExit):
        command_line.main(["laboratory", "--write", *options])
    assert "--write" in capsys.readouterr().err
