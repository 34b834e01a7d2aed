"""Which method of context parallelism is fastest: the time and the memory of each, by its bytes and messages.

The bytes are exact (:func:`fastattn.distributed.traffic.bytes_sent`). The times are an estimate, made to rank methods:
what is left out of them stands in docs/distributed_model.md. Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastattn.distributed.cluster import DGX_H100, Cluster, check_above_zero
from fastattn.distributed.traffic import (
    METHODS,
    Arrangement,
    Balance,
    Method,
    arranged,
    block_elements,
    bytes_sent,
    exchanged_bytes,
    messages_sent,
    passes,
    query_elements,
)
from fastattn.distributed.workload import Workload

# Adding a partial result to a sum, both float32: two are read, and one is written.
_BYTES_OF_A_MERGE = 12


@dataclass(frozen=True)
class Pass:
    """The forward or the backward of a call, on the rank that has most to do.

    Args:
        bytes_sent: to other ranks.
        messages: to other ranks.
        compute_s: seconds that the rank computes: its attention, the merges of partial results, the launches.
        transfer_s: seconds that the transfers take.
        hidden_s: seconds of the transfers during which the rank computes.
    """

    bytes_sent: int
    messages: int
    compute_s: float
    transfer_s: float
    hidden_s: float

    @property
    def waiting_s(self) -> float:
        """Seconds in which the rank waits for transfers and computes nothing."""
        return self.transfer_s - self.hidden_s

    @property
    def time_s(self) -> float:
        """Seconds from the first transfer or computation to the last."""
        return self.compute_s + self.waiting_s


@dataclass(frozen=True)
class Estimate:
    """What a method takes for a call. Printed, it says so in a line.

    Args:
        method: the method.
        forward: the forward pass.
        backward: the backward pass, None without training.
        memory: bytes that the call holds on a rank at its peak: inputs, results, their gradients and all buffers.
    """

    method: Method
    forward: Pass
    backward: Pass | None
    memory: int

    @property
    def waiting_s(self) -> float:
        """Seconds of both passes in which the rank waits for transfers."""
        return self.forward.waiting_s + (self.backward.waiting_s if self.backward else 0.0)

    @property
    def time_s(self) -> float:
        """Seconds of both passes."""
        return self.forward.time_s + (self.backward.time_s if self.backward else 0.0)

    def __str__(self) -> str:
        passes = [self.forward] if self.backward is None else [self.forward, self.backward]
        sent, messages = sum(of.bytes_sent for of in passes), sum(of.messages for of in passes)
        times = f"{_seconds(self.time_s)}, {_seconds(self.waiting_s)} of it waiting"
        return f"{self.method}: {times}; {_bytes(sent)} sent in {messages} messages, {_bytes(self.memory)} held"


@dataclass(frozen=True)
class Choice:
    """The best method for a call and why. Printed, it says so in a line for each method.

    Args:
        method: the fastest of those that can be used and fit into memory. Where none fits, that which holds least.
        estimates: of the methods that can be used, the fastest first.
        reasons: of each method, in words.
    """

    method: Method
    estimates: dict[Method, Estimate]
    reasons: dict[Method, str]

    def __str__(self) -> str:
        return "\n".join(self.reasons.values())


def estimate(
    method: Method,
    workload: Workload,
    world_size: int,
    cluster: Cluster = DGX_H100,
    *,
    balance: Balance = "none",
) -> Estimate:
    """The time and the memory of one call with one method.

    Args:
        method: ``"allgather"``, ``"ring"``, ``"ulysses"`` or ``"2d"``.
        workload: the call.
        world_size: ranks that share the sequence: nodes of the cluster, or a part of one.
        cluster: what links and ranks can do.
        balance: how tokens lie on ranks, ``"none"``, ``"zigzag"`` or ``"stripe"``. Without a balance the busiest rank
            decides; with one, all are taken to have the same work.

    Raises:
        ValueError: as :func:`fastattn.distributed.traffic.bytes_sent`.
    """
    arrangement = arranged(method, workload, world_size, cluster.ranks_per_node, balance)
    directions = (False, True) if workload.training else (False,)
    done = [_pass(method, workload, arrangement, cluster, balance, backward) for backward in directions]
    return Estimate(method, done[0], done[1] if workload.training else None, _memory(method, workload, arrangement))


def choose(
    workload: Workload,
    world_size: int,
    cluster: Cluster = DGX_H100,
    *,
    balance: Balance = "none",
    methods: Sequence[Method] = METHODS,
    memory: float | None = None,
) -> Choice:
    """The fastest method for a call, and why the others are not.

    Args:
        workload: the call.
        world_size: ranks that share the sequence: nodes of the cluster, or a part of one.
        cluster: what links and ranks can do.
        balance: how tokens lie on ranks.
        methods: those to choose from.
        memory: bytes that the call may hold on a rank; None is all that a rank of the cluster has.

    Raises:
        ValueError: shards are not even, no method can be used, or an argument is outside of its range.
    """
    limit = cluster.memory if memory is None else memory
    check_above_zero("memory", limit)
    # What no method can do raises here; in the loop a ValueError is the refusal of one.
    arranged("allgather", workload, world_size, cluster.ranks_per_node, balance)
    found: dict[Method, Estimate] = {}
    refused: dict[Method, str] = {}
    for method in methods:
        try:
            arrangement = arranged(method, workload, world_size, cluster.ranks_per_node, balance)
            same = "ring" if arrangement.group == 1 else "ulysses"
            if method == "2d" and 1 in arrangement and same in methods:
                refused[method] = f"{arrangement.group} of {world_size} ranks in a node: it would be {same}"
            else:
                found[method] = estimate(method, workload, world_size, cluster, balance=balance)
        except ValueError as error:
            refused[method] = str(error)
    if not found:
        raise ValueError(f"methods={tuple(methods)!r}: expected one that can be used: {'; '.join(refused.values())}")
    by_time = {of.method: of for of in sorted(found.values(), key=lambda of: of.time_s)}
    fitting = [method for method, of in by_time.items() if of.memory <= limit]
    best = fitting[0] if fitting else min(by_time, key=lambda method: by_time[method].memory)
    reasons = {best: _why(by_time[best], world_size, None if fitting else limit)}
    reasons |= {method: _why_not(of, by_time[best], limit) for method, of in by_time.items() if method != best}
    reasons |= {method: f"not {method}: {reason}" for method, reason in refused.items()}
    return Choice(best, by_time, reasons)


# ------------------------------------------------------------------------------------------------------------- in words


def _why(best: Estimate, world_size: int, missed: float | None) -> str:
    times = f"{_seconds(best.time_s)} on each of {world_size} ranks, {_seconds(best.waiting_s)} of it waiting"
    said = f"{best.method}: {times}"
    if missed is not None:
        said += f"; it holds {_bytes(best.memory)} on a rank, more than {_bytes(missed)}, but the others hold more"
    return said


def _why_not(other: Estimate, best: Estimate, limit: float) -> str:
    said = f"not {other.method}: "
    if other.memory > limit:
        return said + f"it holds {_bytes(other.memory)} on a rank, more than {_bytes(limit)}"
    waiting = other.waiting_s - best.waiting_s
    computing = other.time_s - best.time_s - waiting
    differences = [
        f"{_seconds(abs(seconds))} {'more' if seconds > 0 else 'less'} {what}"
        for seconds, what in ((waiting, "waiting"), (computing, "computing"))
        if abs(seconds) > 0.001 * best.time_s
    ]
    return said + f"{_seconds(other.time_s)}" + (f", {' and '.join(differences)}" if differences else ", as fast")


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g} bytes"


# ------------------------------------------------------------------------------------------------------------ the times


def _pass(
    method: Method, workload: Workload, arrangement: Arrangement, cluster: Cluster, balance: Balance, backward: bool
) -> Pass:
    """One pass on the busiest rank: the exchange within its group, and computation beside the ring's transfers."""
    ranks, node = arrangement.ranks, min(cluster.ranks_per_node, arrangement.ranks)
    sent, messages = (
        count(method, workload, ranks, ranks_per_node=node, balance=balance, backward=backward)
        for count in (bytes_sent, messages_sent)
    )
    attention = _attention_seconds(workload, arrangement, cluster, balance, backward)
    if method == "allgather":
        transfer = _collective_seconds(sent, ranks, node, cluster, phases=3 if backward else 1)
        return Pass(sent, messages, attention + cluster.launch, transfer, 0.0)
    exchange = _exchange_seconds(exchanged_bytes(workload, arrangement, backward), arrangement.group, node, cluster)
    steps = _steps(workload, arrangement, balance)
    first = attention / (steps + 1) + cluster.launch
    step = first + _merge_seconds(workload, arrangement, cluster, backward)
    transfer, home = _ring_step_seconds(workload, arrangement, node, cluster, backward)
    return Pass(
        sent,
        messages,
        first + steps * step,
        exchange + steps * transfer + (home if steps else 0.0),
        steps * min(step, transfer),
    )


def _steps(workload: Workload, arrangement: Arrangement, balance: Balance) -> int:
    """How many blocks the busiest group of a ring gets from others, one after the other."""
    last = arrangement.ring - 1
    return max(passes(workload, arrangement, balance, place)[0] for place in (max(0, last - 1), last))


def _attention_seconds(
    workload: Workload, arrangement: Arrangement, cluster: Cluster, balance: Balance, backward: bool
) -> float:
    """The operations of the busiest rank: two products forward and five backward for a pair that is seen."""
    if balance == "none":
        pairs = workload.most_pairs(arrangement.ring) / arrangement.group
    else:
        pairs = workload.pairs(0, workload.length) / arrangement.ranks
    of_a_pair = (10 if backward else 4) * workload.batch * workload.heads * workload.head_dim
    return pairs * of_a_pair / (cluster.backward_rate if backward else cluster.forward_rate)


def _merge_seconds(workload: Workload, arrangement: Arrangement, cluster: Cluster, backward: bool) -> float:
    """Adding a part's outputs to those before it, or its dQ, and to a block's dK and dV."""
    elements = query_elements(workload, arrangement) + backward * block_elements(workload, arrangement)
    return _BYTES_OF_A_MERGE * elements / cluster.memory_bandwidth


def _ring_step_seconds(
    workload: Workload, arrangement: Arrangement, node: int, cluster: Cluster, backward: bool
) -> tuple[float, float]:
    """A block's way to the next group, and the way home of its gradient, on the slowest link of the ring.

    From node to node a ring of ranks has one rank that sends, alone on its port; of a ring of nodes all ranks send.
    """
    if arrangement.ranks == node and arrangement.group == 1:
        link, bandwidth = cluster.within, cluster.within.bandwidth
    else:
        link, bandwidth = cluster.between, _port_bandwidth(cluster, senders=arrangement.group)
    block = block_elements(workload, arrangement)
    gradients = block * workload.sum_size if backward else 0
    step = link.latency + (block * workload.element_size + gradients) / bandwidth
    return step, link.latency + gradients / bandwidth if backward else 0.0


def _collective_seconds(sent: int, ranks: int, node: int, cluster: Cluster, phases: int) -> float:
    """An all-gather, or one and two reduce-scatters, on rings of all ranks, one ring through each port."""
    nodes = ranks // node
    within = sent / cluster.within.bandwidth if node > 1 else 0.0
    between = sent / (cluster.between.bandwidth * cluster.ports_per_node) if nodes > 1 else 0.0
    simple = ((cluster.within.latency, 1.0), (cluster.between.latency, 1.0))
    return min(
        phases * ((ranks - nodes) * near + (nodes - 1) * far) + max(within / kept_near, between / kept_far)
        for (near, kept_near), (far, kept_far) in (simple, *zip(cluster.within.protocols, cluster.between.protocols))
    )


def _exchange_seconds(to_each: int, group: int, node: int, cluster: Cluster) -> float:
    """The all-to-all of a group, there and back, in which each rank sends to all others at once."""
    near = min(group, node) - 1
    far = group - 1 - near
    within = near * to_each / cluster.within.bandwidth
    between = far * to_each / _port_bandwidth(cluster, senders=node)
    latency = cluster.between.latency if far else cluster.within.latency if near else 0.0
    return 2 * latency + max(within, between)


def _port_bandwidth(cluster: Cluster, senders: int) -> float:
    """Bytes a second of each of a node's ranks that send to other nodes at the same time."""
    return cluster.between.bandwidth * min(1.0, cluster.ports_per_node / senders)


# ----------------------------------------------------------------------------------------------------------- the memory


def _memory(method: Method, workload: Workload, arrangement: Arrangement) -> int:
    """Bytes that a rank holds at the peak of the call."""
    size, sums = workload.element_size, workload.sum_size
    queries, block = query_elements(workload, arrangement), block_elements(workload, arrangement)
    one_rank = Arrangement(arrangement.ranks, 1)
    inputs = (2 * queries + block_elements(workload, one_rank)) * size  # and the output
    statistics = 4 * queries // workload.head_dim  # the LSE
    held = (2 if workload.training else 1) * inputs + statistics  # and a gradient of each
    if method == "allgather":
        whole = arrangement.ranks * block
        return held + whole * (size + (sums if workload.training else 0))
    if arrangement.group > 1:
        # Query, keys, values and output by heads, which the backward reads; their gradients; a copy to send from.
        by_heads = (2 * queries + block) * size
        held += (2 if workload.training else 1) * by_heads + (queries + block) * size
    if arrangement.ring > 1:
        # The block that is used and the one that comes; the sum and the part that is added to it, of outputs or of dQ.
        held += 2 * block * size + 2 * queries * sums
        if workload.training:
            held += 3 * block * sums  # dK and dV of the block that is used, of the one that comes, and a part
    return held
