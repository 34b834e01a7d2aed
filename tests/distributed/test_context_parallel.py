"""Attention on shards beside attention in one process: results, gradients, repeated runs, what is sent, faults."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastattn import distributed
from fastattn.distributed import call
from fastattn.distributed.layout import Place
from fastattn.distributed.model import choose
from fastattn.distributed.parts import Run, Span, bounds, reaches
from fastattn.distributed.workload import Workload
from fastattn.ops.attention.contract import Options
from tests.distributed import cases, tasks
from tests.distributed.cases import attend_on_shards
from tests.distributed.processes import run_on_ranks

# of one start of the processes
TASKS = ("every_call", "sharing_out", "disagreements", "traffic", "modelled", "explained", "sixteen_bits")


def none_raised(said):
    """What the ranks say, if all of them came to an end."""
    for of_rank in said:
        assert of_rank is not None, "a rank did not end"
        assert "raised" not in of_rank, of_rank["raised"]
    return said


# ---------------------------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("world", [2, 4, pytest.param(8, marks=pytest.mark.ranks)])
def test_shards_give_what_one_process_gives(world):
    """Results and every gradient, of every mask by every method and balance; the same bits in two runs; and what else
    ranks can be asked for. All in one test, since starting the processes takes longer than most of what they do."""
    several = [getattr(tasks, name) for name in TASKS]
    said = none_raised(run_on_ranks(world, several))
    for rank, of_rank in enumerate(said):
        assert of_rank["every_call"]["wrong"] == []
        assert of_rank["every_call"]["count"] == len(list(cases.calls(world)))
        assert of_rank["sharing_out"] == []
        assert of_rank["modelled"] == []
        assert of_rank["explained"] == []
        check_disagreements(of_rank["disagreements"], rank)
        for ours, theirs in zip(of_rank["sixteen_bits"]["ring"], of_rank["sixteen_bits"]["one process"]):
            # partial results are not rounded, however many there are; delta is made of an output that is
            assert ours <= 2.0 * theirs
    check_traffic([of_rank["traffic"] for of_rank in said])
    print(f"{world} ranks: at most {max(of_rank['every_call']['farthest'] for of_rank in said):.2g} from one process")


def check_disagreements(said, rank):
    """Every rank is told that rank 1 is the odd one, and what it has."""
    for name, words in {
        "length": ("query", '["float32", 1, 8, 9, 16]'),
        "dtype": ("key", "float64"),
        "mask": ("attn_mask", "bool"),
        "window": ("window", "[3, 0]"),
        "sinks": ("sinks", "of digest"),
        "columns": ("attn_mask_by", '"columns"'),
        "function": ("score_mod", "a program of digest"),
        "gradients": ("tensors that need gradients", "[]"),
    }.items():
        assert said[name].startswith("RanksDisagreeError: the ranks of the group were called with different arguments")
        assert "rank 1 has " in said[name]
        assert all(word in said[name] for word in words), said[name]
    if rank == 1:
        assert said["refused"].startswith("ValueError: softcap=-1.0")
        assert said["a tensor"].startswith("TypeError: key_padding_mask")
    else:
        assert "refuses its arguments, and nothing was exchanged: rank 1: softcap=-1.0" in said["refused"]
        assert "rank 1: key_padding_mask: expected a torch.Tensor" in said["a tensor"]
    assert said["afterwards"] == "right"


def check_traffic(said):
    """Bytes, messages, parts and skipped parts are those that can be counted on paper."""
    world, shard = len(said), 2 * tasks.HEADS * 8 * 16 * 4  # bytes of a rank's keys and values

    def of_ranks(what):
        return {name: [of_rank[name][what] for of_rank in said] for name in said[0]}

    sent, received, overlapped = (of_ranks(f"bytes_{what}") for what in ("sent", "received", "overlapped"))
    messages = {name: sum(counts) for name, counts in of_ranks("messages").items()}
    parts, skipped = of_ranks("parts"), of_ranks("parts_skipped")
    assert sent["all"] == sent["allgather"] == [(world - 1) * shard] * world
    assert parts["all"] == [world] * world
    # the keys of rank r go as far as the last rank, and rank r sees those of r + 1 ranks
    assert sum(sent["causal"]) == sum(range(world)) * shard
    assert messages["causal"] == sum(range(world))
    assert parts["causal"] == list(range(1, world + 1))
    assert skipped["causal"] == list(reversed(range(world)))
    assert sum(sent["window"]) == (world - 1) * shard
    assert parts["window"] == [1] + [2] * (world - 1)
    assert sent["documents"] == [(world - 1) * 8 * 8] * world  # the numbers of the documents, and no keys
    assert parts["documents"] == [1] * world
    assert parts["zigzag"] == [2 * world + 1] * world  # pairs of half shards: the same work everywhere
    of_rows = 8 * tasks.HEADS * 16 * 4  # query, key, value or output of a rank; and the LSE of its rows
    assert sent["ulysses"] == [(4 * of_rows + 8 * tasks.HEADS * 4) * (world - 1) // world] * world
    assert {name: sum(of_rank) for name, of_rank in sent.items()} == {n: sum(of) for n, of in received.items()}
    # all keys of a ring come beside the part before, and of the gradients all but the last, which come home
    assert overlapped["causal"] == received["causal"] == [rank * shard for rank in range(world)]
    assert all(overlapped[name] == received[name] for name in ("all", "window", "zigzag"))
    assert received["backward"] == [(2 * world - 1) * shard] * world
    assert overlapped["backward"] == [(2 * world - 2) * shard] * world
    assert overlapped["allgather"] == overlapped["ulysses"] == overlapped["documents"] == [0] * world
    for name in said[0]:
        for waited, under_way in zip(of_ranks("seconds_waited")[name], of_ranks("seconds_under_way")[name]):
            assert 0.0 < waited <= under_way or (waited == under_way == 0.0 and not sum(received[name]))


def test_shards_by_the_kernels_give_what_one_process_gives():
    """Parts in the kernels, which hand over float32 and take the LSE of the whole row."""
    pytest.importorskip("triton", reason="triton is not installed")
    for of_rank in none_raised(run_on_ranks(2, (tasks.kernels,), interprets=True)):
        # the kernels' exponentials are to base 2, so that they round scores once more
        assert max(of_rank["kernels"].values()) < 5 * cases.MOST, of_rank["kernels"]


def test_lost_rank_is_named_on_every_other():
    """A rank that is killed before a call or in its backward, or stopped: an error within the group's time-out that
    names it on both ranks that are left, no hang, and no gradient."""
    said = run_on_ranks(5, (tasks.losses,), lost=(2, 3, 4))
    assert said[2:] == [None] * 3
    for of_rank in none_raised(said[:2]):
        for victim, fault in ((2, "killed"), (3, "killed in the backward"), (4, "stopped")):
            found = of_rank["losses"][fault]
            assert f"rank {victim} did not come within the group's time-out, or is gone" in found["said"]
            assert found["seconds"] < 3.0 * tasks.SECONDS
            assert found["no gradient"]


# ---------------------------------------------------------------------------------------------------------- one process


@pytest.fixture
def group():
    """The group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_one_rank_gives_what_attention_gives(group):
    for name, method, balance in cases.calls(1):
        far, what = cases.distance(*cases.both(name, method, balance, group))
        assert far <= cases.MOST, f"{name}, {method}, {balance}: {what}"


def test_mesh_of_one_dimension_is_a_group(group):
    mesh = dist.init_device_mesh("cpu", (1,), mesh_dim_names=("context",))
    tensors = tasks.own_qkv(group)
    output = attend_on_shards(*tensors, mesh["context"], backend="torch")
    assert torch.equal(output, attend_on_shards(*tensors, group, backend="torch"))


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        ({"method": "tree"}, ValueError, "method='tree': expected one of 'auto', 'allgather', 'ring', 'ulysses', '2d'"),
        ({"balance": "even"}, ValueError, "balance='even': expected one of 'none', 'zigzag', 'stripe'"),
        ({"attn_mask_by": "keys"}, ValueError, "attn_mask_by='keys': expected one of 'rows', 'columns'"),
        ({"score_mod": 3}, TypeError, "score_mod=3: expected a function"),
        ({"mask_mod": (lambda *places: places[2] >= places[3], 1)}, TypeError, "mask_mod: behind the function stand"),
        ({"window": (4, -1)}, ValueError, r"window=\(4, -1\)"),
        ({"attn_mask": torch.ones(9, 8, dtype=torch.bool)}, ValueError, r"attn_mask has shape \(9, 8\)"),
        ({"key_padding_mask": torch.zeros(1, 9, dtype=torch.bool)}, ValueError, "key_padding_mask has shape"),
        ({"backend": "cuda"}, ValueError, "backend='cuda'"),
        ({"backend": "triton", "dropout_p": 0.5}, NotImplementedError, "dropout_p=0.5: the kernels draw by a weight"),
    ],
)
def test_wrong_argument_is_named(words, error, said, group):
    with pytest.raises(error, match=said):
        attend_on_shards(*tasks.own_qkv(group), group, **words)


def test_wrong_tensor_or_group_is_named(group):
    query, key, value = tasks.own_qkv(group)
    with pytest.raises(TypeError, match=r"group_or_mesh: expected .*ProcessGroup or DeviceMesh, got int"):
        attend_on_shards(query, key, value, 1)
    with pytest.raises(ValueError, match=r"group_or_mesh has the dimensions \(1, 1, 1\): expected a mesh of one"):
        distributed.position_ids(8, dist.init_device_mesh("cpu", (1, 1, 1)))
    with pytest.raises(ValueError, match="method='2d' over ranks in 1 dimensions: expected '2d' or 'auto' on a device"):
        attend_on_shards(query, key, value, group, method="2d")
    with pytest.raises(TypeError, match=r"query: expected a torch\.Tensor, got list"):
        attend_on_shards([1], key, value, group)
    with pytest.raises(ValueError, match="expected at least one query and one key on each rank"):
        attend_on_shards(query[:, :, :0], key, value, group)


def test_gradient_of_a_gradient_is_refused(group):
    query, key, value = tasks.own_qkv(group)
    output = attend_on_shards(query, key, value, group, backend="torch")
    (gradient,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("words", "heads", "expected"),
    [
        ({}, (8, 8), "by the model"),
        ({"is_causal": True, "window": (64, None)}, (8, 2), "by the model"),
        ({"document_ids": True}, (8, 8), "ulysses"),
        ({"document_ids": True}, (6, 6), "allgather"),
    ],
)
def test_auto_is_what_the_model_has_as_fastest(words: dict[str, Any], heads: tuple[int, int], expected: str) -> None:
    """Or a rule where the model does not know the call."""
    query, key = (torch.zeros(1, count, 256, 64) for count in heads)
    documents = torch.zeros(1, 256, dtype=torch.int64) if words.pop("document_ids", False) else None
    tensors = call.Tensors(query, key, key, document_ids=documents)
    checked = call.check(tensors, call.Words(**words, backend="torch"), (Place(None, 1, 4),))
    if expected == "by the model":
        window = (words["window"][0], 0) if words else None
        workload = Workload(batch=1, heads=heads[0], kv_heads=heads[1], length=1024, head_dim=64,
                            dtype=torch.float32, window=window)  # fmt: skip
        expected = choose(workload, 4, methods=("allgather", "ring", "ulysses")).method
    assert checked.method == expected


def seen_by(run: Run) -> int:
    """The pairs of a query and a key that a rank's parts compute, by their bounds, where no lower one is."""
    count = 0
    for owner in range(run.place.world):
        for of_rows, of_keys, seen in run.pairs(run.place.rank, owner):
            _, upper, _ = bounds(of_rows, of_keys, run.options)
            of_part = (torch.arange(of_rows.tokens) + upper + 1).clamp(0, of_keys.tokens).sum()
            assert seen == bool(of_part)
            count += int(of_part)
    return count


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_balances_give_ranks_the_same_work_under_causality(world):
    """Zigzag exactly; stripes but for a key of each query, from rank to rank, all of which is less than one part; and
    contiguous shards do not."""
    tokens = 12
    runs = {
        balance: [
            Run(
                place=Place(None, rank, world),
                balance=balance,
                rows=tokens,
                keys=tokens,
                heads=1,
                kv_heads=1,
                mask_axes=(False, False),
                options=Options(None, 0, 0, None, 1.0, 0.0, "none", "torch"),
                longest_prefix=0,
                query_spans=None,
                key_spans=None,
            )
            for rank in range(world)
        ]
        for balance in cases.BALANCES
    }
    work = {balance: [seen_by(run) for run in of_ranks] for balance, of_ranks in runs.items()}
    whole = world * tokens
    assert {sum(of_ranks) for of_ranks in work.values()} == {whole * (whole + 1) // 2}
    assert work["zigzag"] == [whole * (whole + 1) // 2 // world] * world
    assert max(work["stripe"]) - min(work["stripe"]) == (world - 1) * tokens <= tokens**2
    assert max(work["none"]) - min(work["none"]) == (world - 1) * tokens**2


def test_keys_go_round_as_far_as_the_last_rank_that_sees_some():
    """Of all ranks at once, beside a look at each pair of ranks."""
    draw = random.Random(0)
    for number in range(300):
        world, rows, keys = draw.randint(1, 6), 2 * draw.randint(1, 4), 2 * draw.randint(1, 4)
        edges: Any = [draw.choice((None, draw.randint(-6 * keys, 6 * keys))) for _ in range(2)]
        documents = [
            tuple(
                tuple(draw.choice((None, Span(least := draw.randint(0, 5), least + draw.randint(0, 2)))) for _ in "12")
                for _ in range(world)
            )
            for _ in range(2)
        ]
        run = Run(
            place=Place(None, 0, world),
            balance=draw.choice(cases.BALANCES),
            rows=rows,
            keys=keys,
            heads=1,
            kv_heads=1,
            mask_axes=(False, False),
            options=Options(edges[0], edges[1], 0, None, 1.0, 0.0, "none", "torch"),
            longest_prefix=draw.choice((0, 0, draw.randint(1, world * keys))),
            query_spans=documents[0] if number % 2 else None,
            key_spans=documents[1] if number % 2 else None,
        )
        needed = [[any(seen for *_, seen in run.pairs(rank, owner)) for rank in range(world)] for owner in range(world)]
        expected = [
            max((step for step in range(1, world) if needed[owner][(owner + step) % world]), default=0)
            for owner in range(world)
        ]
        assert list(reaches(run)) == expected, run
