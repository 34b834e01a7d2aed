"""Faults to seed into the kernels, each with the case that shows it and what the machines have to say of it.

They prove the machines: each has to be found, and the kernels as they are have to pass the same cases. What a machine
cannot see has no word for that machine, and docs/proof.md says why.
"""

from __future__ import annotations

from typing import NamedTuple

from tests import machines
from tests.machines.cases import CASES, kernels_with
from tests.machines.findings import Finding

WRONG = "wrong numbers"  # beside the kinds of findings
ORDERS = 3  # so many orders of events a fault may hide in


class Fault(NamedTuple):
    """One change of one file of the kernels."""

    case: str
    file: str
    old: str
    new: str
    ttgir: tuple[str, ...]  # what it may be found as; the first is usual. Nothing: that machine cannot see it.
    ptx: tuple[str, ...] = ("any",)
    quick: bool = True  # tried by `make test`, too


FWD, BWD, DQ = (f"attention/hopper/{name}.py" for name in ("forward", "backward", "backward_dq"))
_ANY_USE = ("in flight", WRONG, "deadlock", "over-arrival")

# Nothing: triton 3.7 itself puts the fence between ordinary stores and a TMA store that lacks one, behind TTGIR.
_COMPILER_FENCES = ()
# Nothing: to ptx it is no race that two blocks write the same.
_SAME_TWICE = ()

_K_READ = "        scores = warpgroup_mma_wait(1, deps=[scores])\n"
_FENCE = (
    "        if b_s is not None:\n"
    "            fence_async_shared()  # the bias has been read before TMA writes there again\n"
)
_K_RELEASED = "        mbarrier.arrive(k_empty.index(slot), count=1)\n"
_V_READ = "        acc = warpgroup_mma_wait(0, deps=[acc])\n"
_V_RELEASED = "        mbarrier.arrive(v_empty.index(previous), count=1)\n"
_LAST_V_RELEASED = "        mbarrier.arrive(v_empty.index(slot), count=1)\n"
_LAST_STORE = "        rounds += 1\n    tma_store_wait(0)\n"
_DK_DONE = "                dk = warpgroup_mma_wait(1, deps=[dk])  # under the next S\n"
_DK_RELEASED = "                mbarrier.arrive(empty.index(slot), count=1)\n"
_LATE_ADDITION = "                tma_store_wait(0)  # the addition before this one has read its tile\n"

FAULTS: dict[str, Fault] = {
    # -------------------------------------------------------------------------------------------------- Gluon's forward
    "first keys not waited for": Fault(
        "gluon_forward", FWD, "        mbarrier.wait(k_full.index(slot), parity)\n        k = k_s", "        k = k_s",
        ("in flight",),
    ),
    "next keys not waited for": Fault(
        "gluon_forward", FWD, "next_parity, pred=count < last", "next_parity, pred=False", ("in flight",), quick=False,
    ),
    "next keys waited for with the wrong parity": Fault(
        "gluon_forward", FWD, "next_parity, pred=count < last", "next_parity ^ 1, pred=count < last", _ANY_USE,
    ),
    "values not waited for": Fault(
        "gluon_forward", FWD, "        mbarrier.wait(v_full.index(previous), previous_parity)\n", "", ("in flight",),
        quick=False,
    ),
    "values of another slot": Fault(
        "gluon_forward", FWD, "        v = v_s.index(previous)", "        v = v_s.index(slot)", _ANY_USE,
    ),
    "queries of the last round": Fault(
        "gluon_forward", FWD, "mbarrier.wait(q_full.index(INDEX), rounds & 1)", "mbarrier.wait(q_full.index(INDEX), 0)",
        _ANY_USE,
    ),
    "keys released before they are read": Fault(
        "gluon_forward", FWD, _K_READ + _FENCE + _K_RELEASED, _K_RELEASED + _K_READ + _FENCE, ("in flight", "fence"),
    ),
    "values released before they are read": Fault(
        "gluon_forward", FWD, _V_READ + _V_RELEASED, _V_RELEASED + _V_READ, ("in flight",), quick=False,
    ),
    "queries released before the last product": Fault(
        "gluon_forward", FWD, "    if STAGE_OUTPUT:  # the last product with",
        "    mbarrier.arrive(q_empty.index(INDEX), count=1)\n        if STAGE_OUTPUT:  # the last product with",
        ("deadlock", "over-arrival", "in flight"), quick=False,
    ),
    "keys refilled without asking": Fault(
        "gluon_forward", FWD, "            mbarrier.wait(k_empty.index(slot), parity ^ 1)\n", "",
        ("in flight", "over-arrival", "fence"),
    ),
    "output stored before the product is done": Fault(
        "gluon_forward", FWD,
        "        acc = warpgroup_mma_wait(0, deps=[acc])\n        mbarrier.arrive(v_empty.index(slot), count=1)\n",
        "        acc = warpgroup_mma_wait(1, deps=[acc])\n        mbarrier.arrive(v_empty.index(slot), count=1)\n",
        ("in flight",),
    ),
    "output overwritten before it left": Fault(
        "gluon_forward", FWD, "            tma_store_wait(0)  # the last tile's output has left\n",
        "            pass\n", ("in flight",),
    ),
    "no fence before the output is stored": Fault(
        "gluon_forward", FWD, "        fence_async_shared()\n        tma_store(out_desc", "        tma_store(out_desc",
        ("fence",), ptx=_COMPILER_FENCES,
    ),
    "no fence behind the bias": Fault("gluon_forward", FWD, _K_READ + _FENCE, _K_READ, ("fence",), quick=False),
    "last output not waited for": Fault(
        "gluon_forward", FWD, _LAST_STORE, _LAST_STORE.replace("    tma_store_wait(0)\n", ""), ("unfinished",),
        quick=False,
    ),
    "keys never released": Fault(
        "gluon_forward", FWD, _K_READ + _FENCE + _K_RELEASED, _K_READ + _FENCE, ("deadlock",),
    ),
    "an arrival too few": Fault(
        "gluon_forward", FWD, "    k_empty = _barriers(STAGES, CONSUMERS)",
        "    k_empty = _barriers(STAGES, CONSUMERS + 1)", ("deadlock",), quick=False,
    ),
    "an arrival too many": Fault(
        "gluon_forward", FWD, "    k_empty = _barriers(STAGES, CONSUMERS)", "    k_empty = _barriers(STAGES, 1)",
        ("over-arrival", "in flight", "fence", "deadlock"),
    ),
    "one tile less loaded than read": Fault(
        "gluon_forward", FWD, "for position in range(0, all_visits):", "for position in range(0, all_visits - 1):",
        ("deadlock",), quick=False,
    ),
    "more bytes expected than come": Fault(
        "gluon_forward", FWD, "k_desc.block_type.nbytes + CONSUMERS * b_desc",
        "k_desc.block_type.nbytes + 2 * CONSUMERS * b_desc", ("deadlock",), quick=False,
    ),
    "statistics of rows past the end": Fault(
        "gluon_forward", FWD, "gl.store(lse_ptr + rows_of + row, lse, mask=row < seqlen_q)",
        "gl.store(lse_ptr + rows_of + row, lse)", ("race", "out of bounds", WRONG),
    ),
    "diagonal shifted by one": Fault(
        "gluon_forward", "attention/hopper/forward_softmax.py",
        "rows + (upper + 1 - col_start)", "rows + (upper + 2 - col_start)",
        (WRONG,),
    ),
    "last values released before they are read": Fault(
        "gluon_forward_of_few_keys", FWD, _V_READ + _LAST_V_RELEASED, _LAST_V_RELEASED + _V_READ, ("in flight",),
    ),
    "next tile read before it is handed out": Fault(
        "gluon_forward_of_few_keys", "attention/hopper/schedule.py",
        "        mbarrier.wait(box_full.index(slot), parity)\n", "",
        (WRONG, "deadlock", "unfinished"),
    ),
    "a tile handed out twice": Fault(
        "gluon_forward_of_few_keys", "attention/hopper/schedule.py", "tile = gl.num_programs(0) + gl.atomic_add",
        "tile = gl.num_programs(0) - 1 + gl.atomic_add", ("race",), ptx=_SAME_TWICE,
    ),
    # ------------------------------------------------------------------------------------------------- Gluon's backward
    "scores used before they are done": Fault(
        "gluon_pair", BWD, "                products = warpgroup_mma_wait(0, deps=[s])\n",
        "                products = warpgroup_mma_wait(3, deps=[s])\n", ("in flight",), quick=False,
    ),
    "gradient of the output not waited for": Fault(
        "gluon_pair", BWD, "            mbarrier.wait(do_full.index(slot), parity)\n", "", ("in flight",),
    ),
    "rows released before dK is done": Fault(
        "gluon_pair", BWD, _DK_DONE + _DK_RELEASED, _DK_RELEASED + _DK_DONE, ("in flight",),
    ),
    "dK stored without a fence": Fault(
        "gluon_pair", BWD, "    fence_async_shared()\n    batch, kv_head, col_tile, _ = _own_tile",
        "    batch, kv_head, col_tile, _ = _own_tile", ("fence",), ptx=_COMPILER_FENCES,
    ),
    "no fence behind the rows' numbers": Fault(
        "gluon_pair", BWD, "                    fence_async_shared()\n                    if ONE_PASS:",
        "                    if ONE_PASS:", ("fence",), quick=False,
    ),
    "dS of the other consumer not waited for": Fault(
        "gluon_one_pass", BWD, "                mbarrier.wait(ds_full.index(pair * 2 + OTHER), (step >> 1) & 1)\n", "",
        ("fence", WRONG, "in flight"),
    ),
    "no fence behind dS": Fault(
        "gluon_one_pass", BWD, "                    fence_async_shared()\n                    if ONE_PASS:",
        "                    if ONE_PASS:", ("fence",), quick=False,
    ),
    "dQ overwritten before it is added": Fault("gluon_one_pass", BWD, _LATE_ADDITION, "", ("in flight",)),
    "no fence before dQ is added": Fault(
        "gluon_one_pass", BWD, "                fence_async_shared()\n                tma_reduce_add",
        "                tma_reduce_add", ("fence",), ptx=_COMPILER_FENCES, quick=False,
    ),
    "dQ stored where it has to be added": Fault(
        "gluon_one_pass", BWD, "tma_reduce_add(d_query, [piece, 0]", "tma_store(d_query, [piece, 0]", ("race", WRONG),
    ),
    "keys overwritten while the other reads them": Fault(
        "gluon_one_pass", BWD, "        mbarrier.wait(finished.index(OTHER), 0)\n", "        pass\n", ("in flight",),
    ),
    "diagonal of the backward shifted by one": Fault(
        "gluon_pair", "common/masking.py",
        "seen = seen & (cols <= rows + sizes.upper)", "seen = seen & (cols < rows + sizes.upper)",
        (WRONG,), quick=False,
    ),
    # ------------------------------------------------------------------------------------------------------- Gluon's dQ
    "values of dQ not waited for": Fault(
        "gluon_pair", DQ, "            mbarrier.wait(v_full.index(slot), parity)\n", "", ("in flight",),
    ),
    "keys of dQ waited for with the wrong parity": Fault(
        "gluon_pair", DQ, "    mbarrier.wait(k_full.index(slot), parity)\n",
        "    mbarrier.wait(k_full.index(slot), parity ^ 1)\n", _ANY_USE, quick=False,
    ),
    "keys of dQ released before dQ has read them": Fault(
        "gluon_pair_with_bias", DQ, "            dq = warpgroup_mma_wait(1, deps=[dq])\n",
        "            dq = warpgroup_mma_wait(2, deps=[dq])\n", ("in flight",), quick=False,
    ),
    "no fence behind the bias of dQ": Fault(
        "gluon_pair_with_bias", DQ,
        "                fence_async_shared()  # the bias has been read before TMA writes there again\n",
        "                pass\n", ("fence",), quick=False,
    ),
    "dQ stored without a fence": Fault(
        "gluon_pair", DQ, "    fence_async_shared()\n    batch, head, row_tile, _ = _own_tile",
        "    batch, head, row_tile, _ = _own_tile", ("fence",), ptx=_COMPILER_FENCES,
    ),
    "the other half of dQ's queries": Fault(
        "gluon_pair", DQ, "q = q_tiles.index(OWN + zero)", "q = q_tiles.index(1 - OWN + zero)",
        (WRONG, "in flight"), quick=False,
    ),
    # ---------------------------------------------------------------------------------------------------- plain kernels
    "rows past the end stored": Fault(
        "plain_attention", "common/tiles.py",
        "    inside = (rows < row_end)[:, None] & (cols < USED_COLS)[None, :]\n    tl.store(",
        "    inside = (rows <= row_end)[:, None] & (cols < USED_COLS)[None, :]\n    tl.store(",
        ("race", "out of bounds", WRONG),
    ),
    "mask shifted by one": Fault(
        "plain_attention", "common/masking.py",
        "seen = seen & (cols <= rows + sizes.upper)", "seen = seen & (cols < rows + sizes.upper)",
        (WRONG,),
    ),
    "dQ added without an atomic": Fault(
        "plain_one_pass", "attention/backward_dkdv.py",
        '    tl.atomic_add(ptrs, dq, mask=(row < seqlen_q)[:, None] & (col < blocks.HEAD_DIM), sem="relaxed")\n',
        "    inside = (row < seqlen_q)[:, None] & (col < blocks.HEAD_DIM)\n"
        "    tl.store(ptrs, tl.load(ptrs, mask=inside, other=0.0) + dq, mask=inside)\n", ("race",),
    ),
    "last tiles looked at by no careful program": Fault(
        "plain_careful", "common/marks.py", "share = tl.cdiv(tiles, tl.num_programs(0))",
        "share = tl.maximum(tiles // tl.num_programs(0), 1)", (WRONG,),
    ),
    "norm of an unguarded row": Fault(
        "norm_forward", "residual_norm/forward.py", "tl.store(statistics_ptr + rows, rstd, mask=rows < row_count)",
        "tl.store(statistics_ptr + rows, rstd)", ("race", "out of bounds", WRONG),
    ),
    "norm of a column too many": Fault(
        "norm_forward", "residual_norm/forward.py",
        "    inside = (rows < row_count) & (cols < size)\n    total = load_rows(x",
        "    inside = (rows < row_count) & (cols <= size)\n    total = load_rows(x", (WRONG, "out of bounds", "race"),
    ),
    "gradient of an unguarded row": Fault(
        "norm_backward", "residual_norm/backward.py", "tl.store(means_ptr + rows, mean_gn, mask=rows < row_count)",
        "tl.store(means_ptr + rows, mean_gn)", ("race", "out of bounds", WRONG),
    ),
    "a score's term too many": Fault(
        "additive", "additive_attention/forward.py", "w = tl.where(first + offset < size, w * LOG2_E, 0.0)",
        "w = tl.where(first + offset <= size, w * LOG2_E, 0.0)", (WRONG,), quick=False,
    ),
    "tokens past the last one appended": Fault(
        "decode_whole", "attention/decode/append.py", "fits = (token < new) & (slot < room)", "fits = slot < room",
        ("out of bounds", "race", WRONG),
    ),
    "statistics of two shares in one place": Fault(
        "decode_whole", "attention/decode/forward.py", "tl.cast(split, tl.int64) * 2 * call.all_rows",
        "tl.cast(split, tl.int64) * call.all_rows", ("race",),
    ),
    "a share merged that nobody made": Fault(
        "decode_in_pages", "attention/decode/merge.py", "tl.load(ptrs + all_rows, mask=number < splits, other=0.0)",
        "tl.load(ptrs + all_rows, mask=number <= splits, other=0.0)", ("out of bounds",),
    ),
    "keys and queries turned the other way": Fault(
        "decode_in_pages", "attention/decode/rotary.py", "tl.where(is_first, -other, other)",
        "tl.where(is_first, other, -other)", (WRONG,), quick=False,
    ),
}  # fmt: skip


def found(fault: Fault) -> str:
    """What the machine of this process says of a fault in one of ``ORDERS`` orders of events; "" if nothing.

    Raises:
        LookupError: the fault has lost its place.
    """
    with kernels_with(fault.file, fault.old, fault.new):
        for order in range(ORDERS):
            try:
                with machines.order_of_events(order):
                    CASES[fault.case]()
            except Finding as finding:
                return finding.kind
            except AssertionError:
                return WRONG
    return ""
