"""What the ranks of a test do; each function runs in every process of a group."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fastattn
from fastattn import distributed
from fastattn.distributed import ring
from fastattn.distributed.traffic import bytes_sent, messages_sent
from fastattn.distributed.workload import Workload
from tests.distributed import cases
from tests.distributed.cases import attend_on_shards

# Of groups that lose a rank.
SECONDS = 5.0
HEADS = 8


def qkv(world: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a whole sequence, ``length`` tokens for each rank, the same on all of them."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, HEADS, world * length, 16, dtype=torch.float64).to(dtype)
    return query, key, value


def own_qkv(group: dist.ProcessGroup, length: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """The shards of a rank, trained."""
    query, key, value = (distributed.shard(t, 2, group).requires_grad_() for t in qkv(group.size(), length))
    return query, key, value


# --------------------------------------------------------------------------------------------------- right, and counted


def every_call(group: dist.ProcessGroup) -> dict[str, Any]:
    """How far each call is from one process; a sentence where it is not what it should be."""
    wrong, farthest, count = [], 0.0, 0
    mesh = dist.init_device_mesh("cpu", (group.size() // 2, 2))
    for name, method, balance in cases.calls(group.size()):
        over = mesh if method == "2d" else group
        ours, expected = cases.both(name, method, balance, over)
        far, what = cases.distance(ours, expected)
        farthest, count = max(farthest, far), count + 1
        if not far <= cases.MOST:
            wrong.append(f"{name}, {method}, {balance}: {what} is off by {far:.3g}")
        if name == "everything" and not cases.is_same(ours, cases.both(name, method, balance, over)[0]):
            wrong.append(f"{name}, {method}, {balance}: another run gives other bits")
    return {"wrong": wrong, "farthest": farthest, "count": count}


def kernels(group: dist.ProcessGroup) -> dict[str, float]:
    """How far calls by the kernels, in Triton's interpreter, are from plain torch in one process."""
    calls = (
        ("everything", "allgather", "none"),
        ("everything", "ring", "zigzag"),
        ("everything", "ulysses", "stripe"),
        ("sinks", "ring", "stripe"),
        ("both-mods", "ring", "zigzag"),
    )
    return {" ".join(call): cases.distance(*cases.both(*call, group, backend="triton"))[0] for call in calls}


def traffic(group: dist.ProcessGroup) -> dict[str, dict[str, float]]:
    """What a rank sends, receives and computes in some forward passes, and in the backward of a ring."""
    found = {}
    documents = torch.full((1, 8), group.rank())
    calls: dict[str, dict[str, Any]] = {
        "all": {},
        "causal": {"is_causal": True},
        "window": {"window": (8, 0)},
        "documents": {"document_ids": documents},
        "zigzag": {"is_causal": True, "balance": "zigzag"},
        "allgather": {"method": "allgather"},
        "ulysses": {"method": "ulysses"},
    }
    for name, words in calls.items():
        with distributed.record_traffic() as counted, torch.no_grad():
            attend_on_shards(*own_qkv(group), group, **{"method": "ring", **words}, backend="torch")
        found[name] = dataclasses.asdict(counted)
    output = attend_on_shards(*own_qkv(group), group, method="ring", backend="torch")
    with distributed.record_traffic() as counted:
        output.sum().backward()
    return {**found, "backward": dataclasses.asdict(counted)}


def modelled(group: dist.ProcessGroup) -> list[str]:
    """Where bytes or messages of forward and backward are not those of the communication model, exactly."""
    world, rank, wrong = group.size(), group.rank(), []
    masks: Any = (
        {},
        {"is_causal": True},
        {"window": (3, 9)},
        {"is_causal": True, "window": (17, None)},
        {"window": (0, 0)},
    )
    mesh = dist.init_device_mesh("cpu", (world // 2, 2))
    calls: Any = itertools.product(cases.METHODS, cases.BALANCES, masks)
    for method, balance, words in calls:
        workload = Workload(batch=2, heads=8, kv_heads=2, length=12 * world, head_dim=16, **words)
        leaves = [torch.randn(2, heads, 12, 16, dtype=workload.dtype, requires_grad=True) for heads in (8, 2, 2)]
        over = mesh if method == "2d" else group
        with distributed.record_traffic() as forward:
            output = attend_on_shards(*leaves, over, method=method, balance=balance, **words, backend="torch")
        with distributed.record_traffic() as backward:
            output.sum().backward()
        for counted, is_backward in ((forward, False), (backward, True)):
            of_rank: Any = {"balance": balance, "rank": rank, "backward": is_backward, "ranks_per_node": 2}
            said = [count(method, workload, world, **of_rank) for count in (bytes_sent, messages_sent)]
            if said != [counted.bytes_sent, counted.messages]:
                wrong.append(f"{method}, {balance}, {words}, {is_backward}: {said} and {counted}")
    return wrong


def explained(group: dist.ProcessGroup) -> list[str]:
    """Where ``explain``, which one rank alone asks, says another method or other bytes than those that go."""
    world, wrong = group.size(), []
    calls: Any = itertools.product(("auto", "ring"), (True, False), (group, dist.init_device_mesh("cpu", (world, 1))))
    for method, is_causal, over in calls:
        leaves = [torch.randn(1, 8, 8, 16, requires_grad=True) for _ in range(3)]
        words: Any = {"is_causal": is_causal, "balance": "stripe", "method": method if over is group else "auto"}
        if group.rank() != world - 1:
            attend_on_shards(*leaves, over, **words, backend="torch").sum().backward()
            continue
        said = distributed.explain(*leaves, over, **words)
        with distributed.record_traffic() as counted:
            attend_on_shards(*leaves, over, **words, backend="torch").sum().backward()
        estimate: Any = said.estimates[said.method]
        modelled = (estimate.forward, estimate.backward)
        sent = [sum(of.bytes_sent for of in modelled), sum(of.messages for of in modelled)]
        if sent != [counted.bytes_sent, counted.messages]:
            wrong.append(f"{words}: {sent} and {counted}")
    return wrong


def sixteen_bits(group: dist.ProcessGroup) -> dict[str, list[float]]:
    """The largest errors beside float64 of output and gradients in bfloat16: of a ring, and of one process."""
    results = {}
    for name, dtype in (("truth", torch.float64), ("one process", torch.bfloat16), ("ring", torch.bfloat16)):
        leaves = [t.to(dtype).requires_grad_() for t in qkv(group.size(), 64, torch.bfloat16)]
        if name == "ring":
            leaves = [distributed.shard(t.detach(), 2, group).requires_grad_() for t in leaves]
            output = attend_on_shards(*leaves, group, method="ring", backend="torch")
        else:
            output = fastattn.attention(*leaves, backend="torch")
        assert isinstance(output, Tensor)
        found = [output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))]
        results[name] = [(t if name == "ring" else distributed.shard(t, 2, group)).double() for t in found]
    return {
        name: [(a - b).abs().max().item() for a, b in zip(results[name], results["truth"])]
        for name in ("one process", "ring")
    }


def sharing_out(group: dist.ProcessGroup) -> list[str]:
    """What of ``shard``, ``unshard`` and ``position_ids`` does not go together."""
    wrong = []
    whole = torch.randn(3, 8 * group.size(), 2, generator=torch.Generator().manual_seed(0))
    mesh = dist.init_device_mesh("cpu", (group.size() // 2, 2))
    calls: Any = itertools.product(cases.BALANCES, (group, mesh))
    for balance, over in calls:
        own = distributed.shard(whole, 1, over, balance=balance).requires_grad_()
        back = distributed.unshard(own, -2, over, balance=balance)
        places = distributed.position_ids(whole.shape[1], over, balance=balance)
        if not torch.equal(back, whole):
            wrong.append(f"{balance}: unshard")
        if not torch.equal(whole[:, places], own):
            wrong.append(f"{balance}: position_ids")
        (back * whole * (group.rank() + 1)).sum().backward()
        expected = own.detach() * sum(range(1, group.size() + 1))
        if own.grad is None or not torch.allclose(own.grad, expected):
            wrong.append(f"{balance}: the gradient of unshard")
    return wrong


# --------------------------------------------------------------------------------------------------------------- faults


def _doubled(score: Tensor, *places: Tensor) -> Tensor:
    return score * 2.0


def _halved(score: Tensor, *places: Tensor) -> Tensor:
    return score * 0.5


def disagreements(group: dist.ProcessGroup) -> dict[str, str]:
    """What a rank is told where rank 1 is called with something else; and that the group is none the worse for it."""
    odd, said = group.rank() == 1, {}
    query, key, value = own_qkv(group)
    longer = distributed.shard(qkv(group.size(), 9)[0], 2, group)
    mask, square = torch.ones(8, 8 * group.size(), dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    for name, tensors, words in (
        ("length", (longer if odd else query, key, value), {}),
        ("dtype", [t.double() if odd else t for t in (query, key, value)], {}),
        ("mask", (query, key, value), {"attn_mask": mask if odd else None}),
        ("window", (query, key, value), {"window": (3, 0) if odd else (2, 0)}),
        ("sinks", (query, key, value), {"sinks": torch.full((HEADS,), float(odd))}),
        ("columns", (query, key, value), {"attn_mask": square, "attn_mask_by": "columns" if odd else "rows"}),
        ("function", (query, key, value), {"score_mod": _doubled if odd else _halved}),
        ("gradients", [t.detach() if odd else t for t in (query, key, value)], {}),
        ("refused", (query, key, value), {"softcap": -1.0 if odd else 1.0}),
        ("a tensor", (query, key, value), {"key_padding_mask": "none" if odd else None}),
    ):
        try:
            attend_on_shards(*tensors, group, **words, backend="torch")
            said[name] = "nothing"
        except (TypeError, ValueError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    output = attend_on_shards(query, key, value, group, method="ring", backend="torch")
    said["afterwards"] = "right" if torch.isfinite(output).all() else "wrong"
    return said


def die(*arguments: Any) -> Any:
    """As a process does that runs out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def losses(group: dist.ProcessGroup) -> dict[str, Any]:
    """What ranks 0 and 1 are told where a third one is killed before a call or in its backward, or stopped."""
    timeout = datetime.timedelta(seconds=SECONDS)
    rank, said = group.rank(), {}
    groups: dict[int, Any] = {victim: dist.new_group([0, 1, victim], timeout=timeout) for victim in (2, 3, 4)}
    dist.barrier()
    for victim, fault in ((2, "killed"), (3, "killed in the backward"), (4, "stopped")):
        if rank not in (0, 1, victim):
            continue
        if rank == victim and fault == "killed":
            die()
        if rank == victim and fault == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if rank == victim:
            method: Any = ring
            method.backward = die
        leaves, start = own_qkv(groups[victim]), time.monotonic()
        try:
            output = attend_on_shards(*leaves, groups[victim], method="ring", backend="torch")
            output.sum().backward()
            message = "nothing"
        except distributed.RankLostError as error:
            message = str(error)
        gradients = [leaf.grad is None for leaf in leaves]
        said[fault] = {"said": message, "seconds": time.monotonic() - start, "no gradient": all(gradients)}
    return said
