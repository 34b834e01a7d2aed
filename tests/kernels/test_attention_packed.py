"""Packed sequences in the plain kernels of attention: each against the reference, by itself, and none but its own."""

import math
import random
from typing import Any, NamedTuple

import pytest
import torch

from fastattn.reference import attention as reference
from fastattn.testing import assert_within_budget, random_tensor
from tests.machines.marks import quick

pytest.importorskip("triton", reason="triton is not installed")

from fastattn_kernels.attention import backward, choice, forward
from fastattn_kernels.attention.backward_one_pass import launch_attention_bwd_one_pass
from fastattn_kernels.attention.bias_gradient import launch_attention_bias_bwd
from fastattn_kernels.attention.config import careful_config
from fastattn_kernels.attention.weights import launch_dropout_keep
from fastattn_kernels.common import marks
from fastattn_kernels.common.delta import Delta
from fastattn_kernels.common.gradients import Gradients
from fastattn_kernels.common.marks import GradientMarks
from fastattn_kernels.common.packed import Packed
from fastattn_kernels.common.plans import planned
from fastattn_kernels.common.problem import Problem

pytestmark = pytest.mark.usefixtures("poisoned")

NAN = math.nan
BACKWARDS = {"two passes": backward.launch_attention_bwd, "one pass": launch_attention_bwd_one_pass}


class Case(NamedTuple):
    """What the packed sequences of a test are like. ``longer``: which side of a sequence is."""

    dtype: torch.dtype = torch.float32
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 32
    value_dim: int = 32
    lower: int | None = None
    upper: int | None = None
    bottom_right: bool = False
    longer: str = ""
    used: bool = False
    prefix: bool = False
    slopes: int = 0  # of 1: shared by the sequences; of 2: each its own
    sinks: int = 0
    bias: str = ""  # the axes that do not broadcast, of "nhqk"
    softcap: float | None = None
    dropout: float = 0.0

    def __str__(self):
        changed = [(name, value) for name, value in self._asdict().items() if value != self._field_defaults[name]]
        return "-".join(f"{name}={value}" for name, value in changed) or "plain"


class Drawn(NamedTuple):
    """A problem, what comes in as gradients, and the sequences' rows and keys in use."""

    problem: Problem
    d_output: torch.Tensor
    d_lse: torch.Tensor
    sequences: list[tuple[slice, slice]]


def lengths(case, generator) -> tuple[list[int], list[int]]:
    """Of queries and keys: ragged, with sequences that are empty on one side or on both."""
    rows = [generator.randint(1, 100) for _ in range(5)]
    keys = [length + generator.randint(0, 70) for length in rows]
    if case.longer == "queries":
        rows, keys = keys, rows
    elif not case.longer:
        generator.shuffle(keys)
    for either in (rows, keys):
        either[generator.randrange(5)] = 0
    return [*rows[:3], 0, *rows[3:]], [*keys[:3], 0, *keys[3:]]


def offsets_of(lengths, device) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def draw(case, seed, device) -> Drawn:
    """What belongs to no sequence, and keys that are not in use, hold NaN."""
    generator = random.Random(seed)
    rows, keys = lengths(case, generator)
    sequences, behind = len(rows), 9
    heads, kv_heads = case.heads

    def normal(*shape: int) -> torch.Tensor:
        return random_tensor(*shape, seed=generator.randrange(2**20), dtype=case.dtype, device=device)

    query = normal(sum(rows) + behind, heads, case.head_dim)
    key = normal(sum(keys) + behind, kv_heads, case.head_dim)
    value = normal(sum(keys) + behind, kv_heads, case.value_dim)
    d_output = normal(sum(rows) + behind, heads, case.value_dim)
    d_lse = normal(1, heads, sum(rows) + behind).float()
    cu_rows, cu_keys = offsets_of(rows, device), offsets_of(keys, device)
    used = [generator.randint(0, length) for length in keys] if case.used else keys
    starts = zip(cu_rows.tolist(), cu_keys.tolist())
    found = [(slice(row, row + length), slice(key, key + use)) for (row, key), length, use in zip(starts, rows, used)]
    in_use = torch.zeros(len(key), dtype=torch.bool, device=device)
    for _, of_keys in found:
        in_use[of_keys] = True
    for tensor, belongs in ((query, sum(rows)), (d_output, sum(rows))):
        tensor[belongs:] = NAN
    d_lse[..., sum(rows) :] = NAN
    key[~in_use], value[~in_use] = NAN, NAN
    of_bias = zip("nhqk", (sequences, heads, max(rows), max(keys)))
    problem = Problem(
        *(tensor.transpose(0, 1)[None] for tensor in (query, key, value)),
        scale=1 / math.sqrt(case.head_dim),
        bias=normal(*(size if axis in case.bias else 1 for axis, size in of_bias)) if case.bias else None,
        alibi_slopes=normal(sequences if case.slopes == 2 else 1, heads).abs() / 20 if case.slopes else None,
        sinks=normal(sequences if case.sinks == 2 else 1, heads) if case.sinks else None,
        prefix=torch.tensor([generator.randint(0, 60) for _ in rows], device=device) if case.prefix else None,
        lower=case.lower,
        upper=case.upper,
        softcap=case.softcap,
        seed=torch.tensor([seed, 3], device=device) if case.dropout else None,
        dropout_p=case.dropout,
        packed=Packed(
            cu_rows,
            cu_keys,
            torch.tensor(used, dtype=torch.int32, device=device) if case.used else None,
            bottom_right=case.bottom_right,
        ),
    )
    return Drawn(problem, d_output.transpose(0, 1)[None], d_lse, found)


# ------------------------------------------------------------------------------------------------------ what comes out


def forward_of(problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, LSE and statistics, which hold NaN where nothing is written."""
    _, heads, rows, _ = problem.query.shape
    output = torch.empty(1, rows, heads, problem.value.shape[3], dtype=problem.query.dtype, device=problem.query.device)
    output = output.transpose(1, 2)
    lse, statistics = (torch.empty(1, heads, *shape, rows, device=output.device) for shape in ((), (2,)))
    forward.launch_attention_fwd(problem, output, lse, statistics)
    return output, lse, statistics


def results_of(drawn, launch_bwd=backward.launch_attention_bwd) -> dict[str, torch.Tensor]:
    """Everything that the kernels compute, and the gradients of slopes by their sequence."""
    problem = drawn.problem
    output, lse, statistics = forward_of(problem)
    d_query, d_key, d_value = (torch.empty_like(tensor) for tensor in (problem.query, problem.key, problem.value))
    of_rows = None if problem.alibi_slopes is None else torch.zeros_like(lse)
    delta = Delta(output, drawn.d_output, drawn.d_lse)
    launch_bwd(problem, drawn.d_output, statistics, delta, None, Gradients(d_query, d_key, d_value, of_rows))
    found = {"output": output, "lse": lse, "d_query": d_query, "d_key": d_key, "d_value": d_value}
    if problem.bias is not None:
        found["d_bias"] = launch_attention_bias_bwd(problem, drawn.d_output, statistics, delta.tensor, None)
    if problem.alibi_slopes is not None and of_rows is not None:
        of_sequences = torch.stack([of_rows[0, :, rows].sum(1) for rows, _ in drawn.sequences])
        found["d_alibi_slopes"] = of_sequences.sum_to_size(problem.alibi_slopes.shape)
    return found


def expected_of(drawn, dtype, keep) -> dict[str, torch.Tensor]:
    """The same by the reference, of one sequence after another, of what ``keep`` holds under dropout; NaN where nothing
    is to be written."""
    problem = drawn.problem
    packed = problem.packed
    leaves = {
        name: tensor.to(dtype).requires_grad_()
        for name in ("query", "key", "value", "bias", "alibi_slopes")
        if (tensor := getattr(problem, name)) is not None
    }

    def of_sequence(tensor: torch.Tensor | None, number: int) -> Any:
        return None if tensor is None else tensor[number : number + 1] if len(tensor) > 1 else tensor

    output = torch.full_like(drawn.d_output, NAN, dtype=dtype)
    lse = torch.full_like(drawn.d_lse, NAN, dtype=dtype)
    outputs, gradients = [], []
    for number, (rows, keys) in enumerate(drawn.sequences):
        seqlen_q, seqlen_k = rows.stop - rows.start, keys.stop - keys.start
        shift = seqlen_k - seqlen_q if packed.bottom_right else 0
        bias = of_sequence(leaves.get("bias"), number)
        if bias is not None:
            bias = bias[:, :, : None if bias.shape[2] == 1 else seqlen_q, : None if bias.shape[3] == 1 else seqlen_k]
        of_this = reference(
            leaves["query"][:, :, rows],
            leaves["key"][:, :, keys],
            leaves["value"][:, :, keys],
            bias=bias,
            alibi_slopes=of_sequence(leaves.get("alibi_slopes"), number),
            sinks=of_sequence(None if problem.sinks is None else problem.sinks.to(dtype), number),
            prefix=of_sequence(problem.prefix, number),
            lower=None if problem.lower is None else problem.lower + shift,
            upper=None if problem.upper is None else problem.upper + shift,
            shift=shift,
            softcap=problem.softcap,
            scale=problem.scale,
            dropout_keep=None if keep is None else keep[number : number + 1, :, :seqlen_q, :seqlen_k],
            dropout_p=problem.dropout_p,
        )
        output[:, :, rows], lse[:, :, rows] = of_this.output.detach(), of_this.lse.detach()
        if seqlen_q:
            outputs += [of_this.output, of_this.lse]
            gradients += [drawn.d_output[:, :, rows].to(dtype), drawn.d_lse[:, :, rows].to(of_this.lse.dtype)]
    found = torch.autograd.grad(outputs, list(leaves.values()), gradients)
    return {"output": output, "lse": lse, **{f"d_{name}": gradient for name, gradient in zip(leaves, found)}}


def keep_of(drawn) -> torch.Tensor | None:
    """Boolean ``[N, H, longest rows, longest keys]``: what dropout keeps of each sequence, if there is dropout."""
    problem, sequences = drawn.problem, drawn.sequences
    if problem.seed is None:
        return None
    rows, keys = (max(each[side].stop - each[side].start for each in sequences) for side in (0, 1))
    shape = len(sequences), problem.query.shape[1], rows, keys
    keep = torch.empty(shape, dtype=torch.bool, device=problem.query.device)
    launch_dropout_keep(problem.seed, problem.dropout_p, keep)
    return keep


def compare(drawn, actual):
    keep = keep_of(drawn)
    truth, peer = (expected_of(drawn, dtype, keep) for dtype in (torch.float64, drawn.problem.query.dtype))
    for name, tensor in actual.items():
        if name in ("output", "lse"):  # rows of no sequence are left as they are
            assert torch.equal(tensor.isnan(), truth[name].isnan()), name
        assert_within_budget(tensor, truth=truth[name], peer=peer[name], name=name, feature="packed", backend="triton")


# ------------------------------------------------------------------------------------------------------------- parity

CASES = [
    Case(),
    Case(dtype=torch.bfloat16, upper=0, heads=(2, 2)),
    Case(upper=0, bottom_right=True, longer="keys", dtype=torch.float16, head_dim=64, value_dim=16),
    Case(upper=0, bottom_right=True, longer="queries", sinks=1),
    Case(lower=-20, upper=5, value_dim=48),
    Case(lower=-20, upper=5, bottom_right=True, slopes=1, used=True),
    Case(upper=0, prefix=True, slopes=2, sinks=2),
    Case(used=True, softcap=2.0, heads=(3, 1)),
    Case(bias="nhqk", upper=0, bottom_right=True, used=True),
    Case(bias="hk", dtype=torch.bfloat16, softcap=3.0),
    Case(bias="nhk", used=True, upper=3, heads=(2, 1), dropout=0.1),
    Case(bias="qk", slopes=1, lower=-30, value_dim=16),
    Case(bias="nq"),
    Case(dropout=0.3, upper=0, slopes=2),
    Case(dropout=0.2, used=True, bottom_right=True, lower=-9, dtype=torch.float16, head_dim=59, value_dim=59),
]


@pytest.mark.parametrize("case", quick(CASES, CASES[5]), ids=str)
def test_packed_sequences_match_reference(case, device, seed):
    """Values and gradients of every sequence; gradients of what belongs to none are zero."""
    drawn = draw(case, seed, device)
    compare(drawn, results_of(drawn))


@pytest.mark.parametrize("case", [CASES[3], CASES[7], CASES[9]], ids=str)
def test_packed_grad_in_one_pass_matches_reference(case, device, seed):
    drawn = draw(case, seed, device)
    compare(drawn, results_of(drawn, launch_attention_bwd_one_pass))


# ------------------------------------------------------------------------------------------------------ what leaks not


@pytest.mark.parametrize("launch_bwd", BACKWARDS.values(), ids=BACKWARDS)
def test_packed_sequences_are_deaf_to_their_neighbours(launch_bwd, device):
    """Whatever one of them holds, of all others nothing changes in the last bit."""
    drawn = draw(Case(upper=0, bottom_right=True), 3, device)
    rows, keys = drawn.sequences[1]
    clean = results_of(drawn, launch_bwd)
    for tensor, of in ((drawn.problem.query, rows), (drawn.problem.key, keys), (drawn.problem.value, keys)):
        tensor[:, :, of] = NAN
    spoilt = results_of(drawn, launch_bwd)
    for name, of in (("output", rows), ("d_query", rows), ("d_key", keys), ("d_value", keys)):
        assert spoilt[name][:, :, of].isnan().any()
        spoilt[name][:, :, of] = clean[name][:, :, of]
        assert torch.equal(spoilt[name].nan_to_num(7.0), clean[name].nan_to_num(7.0)), name


@pytest.mark.parametrize("launch_bwd", BACKWARDS.values(), ids=BACKWARDS)
@pytest.mark.parametrize("programs_at_once", [1, 3, 1000])
def test_packed_sequences_leak_no_nan_of_hidden_keys(launch_bwd, programs_at_once, device, monkeypatch):
    """Tiles that come out with NaN are computed again, carefully, however many of them a program looks after."""
    monkeypatch.setattr(marks, "multiprocessors", lambda _: programs_at_once)
    drawn = draw(Case(dtype=torch.float16, upper=0, bottom_right=True, longer="keys"), 4, device)
    rows, keys = drawn.sequences[1]
    shift = (keys.stop - keys.start) - (rows.stop - rows.start)
    hidden_until = (rows.stop - rows.start) // 2  # rows of the sequence that do not see the key of NaN
    key_of_nan = keys.start + shift + hidden_until
    expected = results_of(drawn, launch_bwd)
    drawn.problem.key[:, :, key_of_nan], drawn.problem.value[:, :, key_of_nan] = NAN, NAN
    actual = results_of(drawn, launch_bwd)
    sees = slice(rows.start + hidden_until, rows.stop)
    assert actual["output"][:, :, sees].isnan().all() and actual["d_query"][:, :, sees].isnan().all()
    for name in ("output", "d_query"):
        actual[name][:, :, sees] = expected[name][:, :, sees]
        torch.testing.assert_close(actual[name], expected[name], rtol=2e-3, atol=2e-3, equal_nan=True)
    for name in ("d_key", "d_value"):  # every key of the sequence is seen by a row that is NaN
        assert actual[name][:, :, keys].isnan().all()
        actual[name][:, :, keys] = expected[name][:, :, keys]
        torch.testing.assert_close(actual[name], expected[name], rtol=2e-3, atol=2e-3)


def test_packed_careful_launch_computes_tiles_with_a_mark_and_no_other(device, monkeypatch):
    """Of every sequence, wherever it begins."""
    monkeypatch.setattr(marks, "multiprocessors", lambda _: 2)
    problem, d_output, _, sequences = draw(Case(dtype=torch.float16, upper=0), 5, device)
    output, _, statistics = forward_of(problem)
    delta = Delta(output, d_output, None).tensor
    tile = careful_config(torch.float16, 32, 32)
    rows, keys = sequences[2]
    of_rows, of_keys = (torch.zeros(each.shape[:3], dtype=torch.int8, device=device) for each in (output, problem.key))
    of_rows[0, 3, rows.start + tile.block_m] = 1
    of_keys[0, 1, keys.start] = 1
    gradients = [torch.full_like(each, 7.0) for each in (problem.query, problem.key, problem.value)]
    given = GradientMarks(of_rows, of_keys)
    backward.launch_careful_bwd(problem, d_output, statistics, delta, None, Gradients(*gradients), given)
    for gradient, like, head, begin, end in (
        (gradients[0], of_rows, 3, rows.start + tile.block_m, min(rows.start + 2 * tile.block_m, rows.stop)),
        (gradients[1], of_keys, 1, keys.start, min(keys.start + tile.block_n, keys.stop)),
        (gradients[2], of_keys, 1, keys.start, min(keys.start + tile.block_n, keys.stop)),
    ):
        written = torch.zeros_like(like, dtype=torch.bool)
        written[0, head, begin:end] = True
        assert written.any()
        assert torch.equal((gradient != 7.0).any(3), written)


# ------------------------------------------------------------------------------------------------- offsets of all kinds

# No two sequences overlap, which would be a race.
BAD_OFFSETS = {
    "descending": [60, 40, 50, 10, 0],
    "negative": [-(2**31), -5, 30, -7, -7],
    "past the end": [0, 30, 2**31 - 1, 70, 2**31 - 1],
    "first is not 0": [33, 40, 41, 41, 64],
}


@pytest.mark.parametrize("of_keys", [False, True], ids=["of queries", "of keys"])
@pytest.mark.parametrize("offsets", quick(BAD_OFFSETS, *BAD_OFFSETS))
def test_packed_bad_offsets_touch_no_other_memory(offsets, of_keys, device, monkeypatch):
    """What lies around the results keeps what it holds. On the compiler's modules, a load outside is an error, too."""
    monkeypatch.setattr(marks, "multiprocessors", lambda _: 1)
    rows, heads, head_dim, around = 70, 2, 16, 4096
    bad = torch.tensor(BAD_OFFSETS[offsets], dtype=torch.int32, device=device)
    good = torch.tensor([0, 10, 20, 20, 70], dtype=torch.int32, device=device)
    used = torch.tensor([-3, 2**31 - 1, 5, 40], dtype=torch.int32, device=device)
    buffers = []

    def inside(*shape: int) -> torch.Tensor:
        size = math.prod(shape)
        buffers.append(torch.full((size + 2 * around,), 7.0, device=device))
        return buffers[-1][around : size + around].view(shape)

    query, key, value, d_output = (random_tensor(1, heads, rows, head_dim, seed=i, device=device) for i in range(4))
    bias = random_tensor(4, 1, 50, 50, seed=4, device=device)
    query[0, 0, 5] = NAN
    packed = Packed(good, bad, used) if of_keys else Packed(bad, good, used, bottom_right=True)
    problem = Problem(query, key, value, 0.3, bias=bias, upper=0, lower=-9, packed=packed)
    output, lse, statistics = inside(1, heads, rows, head_dim), inside(1, heads, rows), inside(1, heads, 2, rows)
    forward.launch_attention_fwd(problem, output, lse, statistics)
    gradients = Gradients(*(inside(1, heads, rows, head_dim) for _ in range(3)))
    delta = Delta(output, d_output, None)
    backward.launch_attention_bwd(problem, d_output, statistics, delta, None, gradients)
    launch_attention_bias_bwd(problem, d_output, statistics, delta.tensor, None)
    for buffer in buffers:
        assert (buffer[:around] == 7.0).all() and (buffer[-around:] == 7.0).all()
    if offsets == "first is not 0" and not of_keys:  # which is not bad at all: what lies in front belongs to nobody
        assert (output[:, :, :33] == 7.0).all() and (output[:, :, 33:64] != 7.0).any(3).all()
        assert (gradients.d_query[:, :, :33] == 0.0).all()


@pytest.mark.parametrize("sequences", [0, 1, 40])
def test_packed_sequences_that_are_empty_give_nothing(sequences, device):
    """All of them, or there is none: nothing is written but gradients, which are zero."""
    offsets = torch.zeros(sequences + 1, dtype=torch.int32, device=device)
    query, key, value, d_output = (random_tensor(1, 2, 50, 16, seed=i, device=device) for i in range(4))
    problem = Problem(query, key, value, 0.25, upper=0, packed=Packed(offsets, offsets))
    drawn = Drawn(problem, d_output, torch.zeros(1, 2, 50, device=device), [])
    found = results_of(drawn)
    assert found["output"].isnan().all() and found["lse"].isnan().all()
    assert not any(found[name].any() for name in ("d_query", "d_key", "d_value"))


def test_packed_sequence_of_everything_is_the_batch_entry_to_the_last_bit(device):
    query, key, value = (random_tensor(1, 2, length, 32, seed=length, device=device) for length in (100, 130, 130))
    padded = Problem(query, key, value, 0.2, upper=30, shift=30)
    ends = (torch.tensor([0, length], dtype=torch.int32, device=device) for length in (100, 130))
    packed = Problem(query, key, value, 0.2, upper=0, packed=Packed(*ends, bottom_right=True))
    incoming = random_tensor(1, 2, 100, 32, seed=1, device=device), torch.zeros(1, 2, 100, device=device)
    for name, tensor in results_of(Drawn(padded, *incoming, [])).items():
        assert torch.equal(results_of(Drawn(packed, *incoming, []))[name], tensor), name


def test_packed_problem_is_not_for_gluon(monkeypatch):
    monkeypatch.setattr(choice, "target_of", lambda device: choice.Target("cuda", 90))
    offsets = torch.tensor([0, 64], dtype=torch.int32)
    tensor = torch.empty(1, 2, 64, 64, dtype=torch.float16)
    for packed in (None, Packed(offsets, offsets)):
        for direction in ("forward", "backward"):
            reasons = choice.gluon_refusals(direction, Problem(tensor, tensor, tensor, 1.0, packed=packed))
            assert any("packed" in reason for reason in reasons) == (packed is not None)


def test_packed_plan_reads_the_offsets_of_the_call_that_it_runs(device):
    """A plan is of shapes: the sequences may be others in each call."""

    @planned
    def step(query, key, value, d_output, offsets):
        problem = Problem(query, key, value, 0.3, upper=0, packed=Packed(offsets, offsets))
        output, lse, statistics = forward_of(problem)
        gradients = [torch.empty_like(each) for each in (query, key, value)]
        delta = Delta(output, d_output, None)
        backward.launch_attention_bwd(problem, d_output, statistics, delta, None, Gradients(*gradients))
        return output, lse, *gradients

    for call, offsets in enumerate(([0, 40, 70], [0, 5, 60], [0, 0, 70], [10, 30, 50])):
        query, key, value, d_output = (random_tensor(1, 2, 70, 16, seed=4 * call + i, device=device) for i in range(4))
        ends = torch.tensor(offsets, dtype=torch.int32, device=device)
        inputs = query, key, value, d_output, ends
        for planned_result, result in zip(step(*inputs), step.__wrapped__(*inputs), strict=True):
            assert torch.equal(planned_result.nan_to_num(7.0), result.nan_to_num(7.0))
    assert len(step.plans.known()) == 1
