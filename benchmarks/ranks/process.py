"""What each of the processes does: every call as it is to be computed, checked, then timed in turn with the others."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fastattn
from benchmarks.measure.timing import Neighbours, keep_freed_memory, without_collection
from benchmarks.ranks import peers
from benchmarks.ranks.cases import ALONE, HEAD_DIM, HEADS, Case, Variant
from benchmarks.ranks.transports import Line, transport
from fastattn.distributed import context_parallel_attention, position_ids, record_traffic, shard

# Beside the largest number, or 1: of a call on shards in float32 beside one process, as the tests have it.
_MOST = 2e-6
_TIMEOUT = datetime.timedelta(seconds=60)

Step = Callable[[], list[Tensor]]  # the output of this rank's rows, and the gradients of query, key and value


def work(rank: int, world: int, cases: list[Case], seconds: float, fewest: int, times: Tensor, folder: str) -> None:
    """Measure the cases as one of ``world`` processes, and write what was found.

    Args:
        rank: of this process.
        world: how many there are.
        cases: the calls.
        seconds: of timing a case.
        fewest: rounds of a case, however long they take.
        times: of :func:`benchmarks.ranks.transports.sending_times`.
        folder: where the processes meet, and write.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=_TIMEOUT)
    line, found = Line(times, rank), []
    for case in cases:
        of_case = _Calls(case, line)
        refused = of_case.check()
        timed = [variant for variant in case.variants if variant.name not in refused]
        samples: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in timed}
        neighbours, wall, own = Neighbours(), time.perf_counter(), time.process_time()
        with without_collection():
            for number in _rounds(seconds, fewest) if timed else ():
                for variant in timed if number % 2 else timed[::-1]:
                    samples[variant.name].append(of_case.sample(variant))
        cores = {
            "others": neighbours.cores() or 0.0,  # than this process
            "own": (time.process_time() - own) / (time.perf_counter() - wall),
        }
        pairs = {balance: of_case.pairs(balance) for balance in dict.fromkeys(v.balance for v in timed)}
        found.append({"refused": refused, "samples": samples, "pairs": pairs, "cores": cores})
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()  # the store goes with the first process
    dist.destroy_process_group()


def _rounds(seconds: float, fewest: int) -> Iterator[int]:
    """Numbers of rounds for so long, by the clock of the first rank."""
    end, number = time.perf_counter() + seconds, 0
    goes_on = torch.ones(1, dtype=torch.uint8)
    while goes_on:
        yield number
        number += 1
        goes_on[0] = number < fewest or time.perf_counter() < end
        dist.broadcast(goes_on, 0)


class _Calls:
    """The variants of a case.

    Args:
        case: the call.
        line: by which messages come late.
    """

    def __init__(self, case: Case, line: Line) -> None:
        group = dist.group.WORLD
        assert group is not None
        self._case, self._line, self._group, self._world = case, line, group, group.size()
        torch.manual_seed(0)
        *whole, self._d_output = torch.randn(4, 1, HEADS, case.length, HEAD_DIM)
        self._whole = [tensor.requires_grad_() for tensor in whole]
        self._flat = dist.init_device_mesh("cpu", (self._world,))
        self._two = dist.init_device_mesh("cpu", (self._world // 2, 2) if self._world % 2 == 0 else (self._world, 1))

    def _step(self, variant: Variant) -> Step:
        """One call, forward and backward."""
        if variant.method == ALONE:
            return self._alone
        own = [shard(t.detach(), 2, self._group, balance=variant.balance) for t in (*self._whole, self._d_output)]
        leaves, d_output = [t.clone().requires_grad_() for t in own[:3]], own[3].clone()
        if variant.method == "torch ring":
            return lambda: peers.ring(leaves, d_output, self._group)
        if variant.method == "torch context_parallel":
            return lambda: peers.sdpa(leaves, d_output, is_causal=self._case.is_causal)
        over = self._two if variant.method == "2d" else self._group
        query, key, value = leaves

        def step() -> list[Tensor]:
            output: Any = context_parallel_attention(
                query, key, value, over, method=variant.method, balance=variant.balance, is_causal=self._case.is_causal
            )
            return [output.detach(), *torch.autograd.grad(output, leaves, d_output)]

        return step

    def _alone(self) -> list[Tensor]:
        """All of it on the first rank, while the others wait."""
        if self._group.rank() > 0:
            return []
        query, key, value = self._whole
        output: Any = fastattn.attention(query, key, value, is_causal=self._case.is_causal, backend="torch")
        return [output.detach(), *torch.autograd.grad(output, self._whole, self._d_output)]

    def _around(self, variant: Variant) -> contextlib.AbstractContextManager[None]:
        """What a variant's call stands in."""
        if variant.is_at_once or variant.delay_ms is not None:
            return transport(self._line, is_at_once=variant.is_at_once, delay_ms=variant.delay_ms)
        if variant.method == "torch context_parallel":
            return peers.context_parallel(self._flat, variant.backend)
        return contextlib.nullcontext()

    def check(self) -> dict[str, str]:
        """Why peers do not take the call. Whoever does has to give what one process gives.

        Raises:
            RuntimeError: some variant gives something else.
        """
        expected, refused = self._from_first(), {}
        self._steps = {variant.name: self._step(variant) for variant in self._case.variants}
        for variant in self._case.variants:
            if variant.method == ALONE:
                continue
            try:
                with self._around(variant):
                    found = self._steps[variant.name]()
            except (NotImplementedError, RuntimeError) as error:
                if not variant.is_peer:
                    raise
                refused[variant.name] = f"{type(error).__name__}: {error}"
                continue
            for name, ours, whole in zip(("output", "dQ", "dK", "dV"), found, expected):
                own = shard(whole, 2, self._group, balance=variant.balance)
                far = ((ours - own).abs().max() / own.abs().max().clamp(min=1)).item()
                if not far <= _MOST:
                    raise RuntimeError(f"{self._case.kind}, {variant.name}: {name} is {far:.3g} from one process")
        return refused

    def _from_first(self) -> list[Tensor]:
        """Results of the whole call, computed once and for all ranks."""
        results = [t.contiguous() for t in self._alone()] or [torch.empty_like(self._d_output) for _ in range(4)]
        for result in results:
            dist.broadcast(result, 0)
        return results

    def sample(self, variant: Variant) -> dict[str, Any]:
        """Seconds of a call on this rank, those in which its thread had a core, and what was sent meanwhile."""
        step = self._steps[variant.name]
        with self._around(variant), record_traffic() as traffic:
            dist.barrier()
            thread, wall = time.thread_time(), time.perf_counter()
            step()
            wall, thread = time.perf_counter() - wall, time.thread_time() - thread
        return {"wall": wall, "thread": thread, **dataclasses.asdict(traffic)}

    def pairs(self, balance: Any) -> int:
        """How many keys the queries of this rank see, together, in one head."""
        if not self._case.is_causal:
            return self._case.length**2 // self._world
        return int((position_ids(self._case.length, self._group, balance=balance) + 1).sum())
