"""The communication model: its bytes against a ring that is played through, closed forms by hand, and what it says."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from fastattn.distributed.cluster import A2_ULTRA, DGX_H100, INFINIBAND_NDR, NVLINK_4, PCIE_4, Cluster, Link
from fastattn.distributed.model import Choice, choose, estimate
from fastattn.distributed.traffic import METHODS, Balance, Method, bytes_sent, messages_sent
from fastattn.distributed.workload import Workload

# Of 1 * 8 heads * 16 tokens * 4 numbers of a bfloat16: a rank of four has 256 bytes of queries, and 128 of K and V
# together.
SMALL = Workload(batch=1, heads=8, kv_heads=2, length=16, head_dim=4)
LLAMA = Workload(batch=1, heads=32, kv_heads=8, length=2**20, head_dim=128, is_causal=True, training=True)


def changed(workload: Workload, **sizes: Any) -> Workload:
    return dataclasses.replace(workload, **sizes)


def mask(workload: Workload) -> torch.Tensor:
    """``[L, L]``, True where the row's query sees the column's key, by the definition."""
    behind = torch.arange(workload.length)[:, None] - torch.arange(workload.length)
    left, right = workload.window or (None, None)
    seen = torch.ones(workload.length, workload.length, dtype=torch.bool)
    if workload.is_causal:
        seen &= behind >= 0
    if left is not None:
        seen &= behind <= left
    if right is not None:
        seen &= behind >= -right
    return seen


MASKS = [
    {"is_causal": causal, "window": window}
    for causal in (False, True)
    for window in (None, (0, 0), (1, None), (None, 2), (3, 0), (0, 5), (4, 4), (5, None), (50, 50))
]
MASK_NAMES = [f"{'causal' if m['is_causal'] else 'full'}-{m['window']}" for m in MASKS]


# ------------------------------------------------------------------------------------------------------- pairs, by hand


@pytest.mark.parametrize("masked", MASKS, ids=MASK_NAMES)
def test_pairs_are_those_of_the_mask(masked):
    workload = changed(SMALL, length=24, **masked)
    seen = mask(workload)
    for first, stop in itertools.combinations(range(0, 25, 3), 2):
        assert workload.pairs(first, stop) == seen[first:stop].sum()
    for shards in (1, 2, 4, 8, 24):
        assert workload.most_pairs(shards) == seen.view(shards, -1).sum(1).max()


# ------------------------------------------------------------------------------------------------------- bytes, by hand


@pytest.mark.parametrize(
    ("method", "forward", "backward"),
    [
        # 128 bytes of K and V, to three others; again, and as much of dK and dV, which are twice as wide.
        ("allgather", 3 * 128, 3 * 128 + 3 * 256),
        # Three passes; again, with dK and dV, which have a fourth one, home.
        ("ring", 3 * 128, 3 * 128 + 4 * 256),
        # To each of three 1/4 of q and of o, 64 + 64 bytes, a head of K and V (two ranks get the same), 64, and the LSE
        # of 2 heads and 4 tokens, 32.
        ("ulysses", 3 * (128 + 64 + 32), 3 * (128 + 64)),
        # One to the other of the node: half of q and o, 128 + 128, a head of K and V, 64, and an LSE, 64. One pass of
        # 128 to the other node, which comes back as a sum.
        ("2d", 256 + 64 + 64 + 128, 256 + 64 + 128 + 2 * 256),
    ],
)
def test_bytes_by_hand(method, forward, backward):
    assert bytes_sent(method, SMALL, 4, ranks_per_node=2) == forward
    assert bytes_sent(method, SMALL, 4, ranks_per_node=2, backward=True) == backward
    for rank in range(4):
        assert bytes_sent(method, SMALL, 4, ranks_per_node=2, rank=rank) == forward


@pytest.mark.parametrize(
    ("method", "forward", "backward"), [("allgather", 3, 9), ("ring", 3, 7), ("ulysses", 6, 6), ("2d", 3, 5)]
)
def test_messages_by_hand(method, forward, backward):
    """K and V go together, their gradients too, but in an all-gather's backward; Q, K and V go, and O and the LSE
    come."""
    assert messages_sent(method, SMALL, 4, ranks_per_node=2) == forward
    assert messages_sent(method, SMALL, 4, ranks_per_node=2, backward=True) == backward


@pytest.mark.parametrize(
    ("dtype", "size", "sums"), [(torch.float16, 2, 4), (torch.float32, 4, 4), (torch.float64, 8, 8)]
)
def test_sums_are_float32_or_wider(dtype, size, sums):
    workload = changed(SMALL, dtype=dtype)
    assert bytes_sent("allgather", workload, 4, backward=True) == 3 * 64 * (size + sums)


def positions(world_size: int, length: int, balance: Balance) -> torch.Tensor:
    """``[ranks, tokens]``, where in the sequence each rank's tokens stand."""
    if balance == "stripe":
        return torch.arange(length).view(-1, world_size).T
    if balance == "none":
        return torch.arange(length).view(world_size, -1)
    pieces = torch.arange(length).view(2 * world_size, -1)
    return torch.cat([pieces[:world_size], pieces[world_size:].flip(0)], dim=1)


def played_ring(workload: Workload, world_size: int, balance: Balance) -> list[tuple[int, int]]:
    """Of each rank, the blocks and the gradients of blocks that it sends on, found by following each block."""
    of_rank = positions(world_size, workload.length, balance)
    seen = mask(workload)
    sent = [[0, 0] for _ in range(world_size)]
    for owner in range(world_size):
        behind = range(1, world_size)
        visited = [s for s in behind if seen[of_rank[(owner + s) % world_size]][:, of_rank[owner]].any()]
        for step in range(max(visited, default=0)):
            sent[(owner + step) % world_size][0] += 1
            sent[(owner + step) % world_size][1] += 1
        if visited:  # the last that sees the block sends its gradient home
            sent[(owner + max(visited)) % world_size][1] += 1
    return [(blocks, gradients) for blocks, gradients in sent]


@pytest.mark.parametrize("masked", MASKS, ids=MASK_NAMES)
@pytest.mark.parametrize("balance", ["none", "zigzag", "stripe"])
def test_ring_sends_what_somebody_sees(masked, balance):
    workload = changed(SMALL, length=24, kv_heads=1, **masked)
    for world_size in (1, 2, 3, 4, 6, 12) + (8, 24) * (balance != "zigzag"):
        block = 2 * (24 // world_size) * 4
        played = played_ring(workload, world_size, balance)
        forward = [2 * block * blocks for blocks, _ in played]
        backward = [block * (2 * blocks + 4 * gradients) for blocks, gradients in played]
        words: Any = {"ranks_per_node": 1, "balance": balance}
        ranks = range(world_size)
        assert [bytes_sent("ring", workload, world_size, rank=rank, **words) for rank in ranks] == forward
        assert [bytes_sent("ring", workload, world_size, rank=r, backward=True, **words) for r in ranks] == backward
        assert bytes_sent("ring", workload, world_size, **words) == max(forward)
        assert bytes_sent("ring", workload, world_size, backward=True, **words) == max(backward)
        assert messages_sent("ring", workload, world_size, **words) == max(blocks for blocks, _ in played)


def test_2d_is_ring_of_nodes_of_one_and_ulysses_on_one_node():
    for backward in (False, True):
        both = [bytes_sent(m, SMALL, 8, ranks_per_node=1, backward=backward) for m in ("2d", "ring")]
        assert both[0] == both[1]
        both = [bytes_sent(m, SMALL, 8, ranks_per_node=8, backward=backward) for m in ("2d", "ulysses")]
        assert both[0] == both[1]


def test_one_rank_sends_nothing():
    for method in METHODS:
        for backward in (False, True):
            assert bytes_sent(method, SMALL, 1, backward=backward) == 0
            assert messages_sent(method, SMALL, 1, backward=backward) == 0


def test_bytes_of_16_million_tokens_on_4096_ranks_are_exact():
    workload = changed(LLAMA, length=2**24)
    block = 2 * 8 * 2**12 * 128
    assert bytes_sent("ring", workload, 4096, balance="zigzag", backward=True) == 4095 * block * 2 + 4096 * block * 4
    exchanged = 7 * ((2 * 2 * block + block) * 2 + 32 * 2**12 * 4) // 8
    assert bytes_sent("2d", workload, 4096, balance="zigzag") == 511 * block * 2 + exchanged


# ------------------------------------------------------------------------------------------------------------ the times

# Links, rates and latencies of 1, so that a time is a count.
UNIT = Link("unit", 1.0, 0.5)
PLAIN = Cluster("plain", UNIT, UNIT, 4, 4, 1.0, 1.0, 1e9, 12.0, 1.0)


def test_allgather_waits_for_all_of_its_transfers():
    forward = estimate("allgather", SMALL, 4, PLAIN).forward
    assert forward.transfer_s == 3 * 0.5 + 384
    assert forward.hidden_s == 0
    assert (
        forward.compute_s == 1 + 4 * 4 * 8 * 4 * 16
    )  # a launch; 4 D operations for each head and each of 4 x 16 pairs
    assert forward.time_s == forward.transfer_s + forward.compute_s


def test_ring_computes_while_it_sends():
    """Four parts of 2048 operations each, of which three are merged: a read of two and a write of one number in
    float32, 128 numbers."""
    forward = estimate("ring", SMALL, 4, PLAIN).forward
    assert forward.compute_s == (2048 + 1) + 3 * (2048 + 1 + 128)
    assert forward.transfer_s == 3 * (0.5 + 128)
    assert forward.hidden_s == forward.transfer_s  # each is shorter than what is computed meanwhile
    slow = dataclasses.replace(PLAIN, within=Link("slow", 0.01, 0.5))
    forward = estimate("ring", SMALL, 4, slow).forward
    assert forward.hidden_s == 3 * (2048 + 1 + 128)
    assert forward.time_s == pytest.approx((2048 + 1) + 3 * (0.5 + 12800))


def test_ring_of_ranks_has_one_port_and_a_ring_of_nodes_all():
    """A block of 128 bytes: from node to node one rank sends, or both of a node, which share a port."""
    far = dataclasses.replace(PLAIN, ranks_per_node=2, ports_per_node=1, between=Link("far", 0.1, 0.0))
    assert estimate("ring", SMALL, 4, far).forward.transfer_s == 3 * 1280
    exchange = 2 * 0.5 + 256 + 64 + 64
    assert estimate("2d", SMALL, 4, far).forward.transfer_s == exchange + 2560
    two_ports = dataclasses.replace(far, ports_per_node=2)
    assert estimate("2d", SMALL, 4, two_ports).forward.transfer_s == exchange + 1280


def test_zigzag_halves_the_time_of_a_causal_ring():
    plain, zigzag = (estimate("ring", LLAMA, 64, balance=balance) for balance in ("none", "zigzag"))
    assert plain.time_s / zigzag.time_s == pytest.approx(2, rel=0.05)


def test_memory_by_hand():
    """K and V, Q and O have 128 and 512 bytes on a rank, the LSE 4 bytes for each of 8 heads and 4 tokens."""
    own = 128 + 512 + 128
    assert estimate("allgather", SMALL, 4, PLAIN).memory == own + 4 * 128
    assert estimate("ring", SMALL, 4, PLAIN).memory == own + 2 * 128 + 2 * 512
    trained = estimate("allgather", changed(SMALL, training=True), 4, PLAIN).memory
    assert trained == own + 128 + 512 + 4 * 128 + 4 * 256


@pytest.mark.parametrize("method", METHODS)
def test_more_tokens_take_longer_and_more_memory(method):
    estimates = [estimate(method, changed(LLAMA, length=2**power), 32, balance="zigzag") for power in range(14, 25)]
    for shorter, longer in itertools.pairwise(estimates):
        assert shorter.time_s < longer.time_s
        assert shorter.memory < longer.memory
        assert shorter.forward.bytes_sent < longer.forward.bytes_sent


@pytest.mark.parametrize("method", METHODS)
def test_a_faster_link_is_never_slower(method):
    slow = dataclasses.replace(DGX_H100, within=PCIE_4, between=Link("slow", 1e9, 20e-6))
    assert estimate(method, LLAMA, 32, slow).time_s > estimate(method, LLAMA, 32).time_s


@pytest.mark.parametrize("method", METHODS)
def test_training_adds_a_backward(method):
    trained, not_trained = (estimate(method, changed(LLAMA, training=training), 32) for training in (True, False))
    assert not_trained.backward is None
    assert trained.forward == not_trained.forward
    assert trained.backward is not None
    assert trained.backward.compute_s > 2 * trained.forward.compute_s


def test_hidden_transfers_are_a_part_of_all():
    for method, length, cluster in itertools.product(METHODS, (2**14, 2**20), (DGX_H100, A2_ULTRA)):
        forward = estimate(method, changed(LLAMA, length=length), 32, cluster).forward
        assert 0 <= forward.hidden_s <= forward.transfer_s
        assert forward.time_s == pytest.approx(forward.compute_s + forward.transfer_s - forward.hidden_s)


# ----------------------------------------------------------------------------------------------------------- the choice


def assert_best(choice: Choice, method: Method) -> None:
    assert choice.method == method, str(choice)


def test_heads_are_shared_where_there_are_enough():
    """Ulysses sends the least, as long as each rank has a head; beyond that, heads are shared within nodes."""
    assert_best(choose(LLAMA, 8, balance="zigzag"), "ulysses")
    choice = choose(LLAMA, 256, balance="zigzag")
    assert_best(choice, "2d")
    assert choice.reasons["ulysses"] == "not ulysses: heads=32: ulysses over 256 ranks takes a multiple of 256"


# What tensor parallelism leaves: each node is one rank, with one port and an eighth of the heads.
ALONE = dataclasses.replace(DGX_H100, ranks_per_node=1, ports_per_node=1)
FEW_HEADS = changed(LLAMA, heads=4, kv_heads=1)


def test_few_tokens_are_gathered():
    """Steps of a ring that compute next to nothing wait for their latency; a collective has a protocol for that."""
    assert_best(choose(changed(FEW_HEADS, length=2**15), 256, ALONE, balance="zigzag"), "allgather")


def test_long_sequences_of_few_heads_go_round():
    """Heads cannot be shared any more, and gathering all keys takes long."""
    choice = choose(changed(FEW_HEADS, length=2**22), 64, ALONE, balance="zigzag")
    assert_best(choice, "ring")
    assert choice.reasons["2d"] == "not 2d: 1 of 64 ranks in a node: it would be ring"
    assert choice.reasons["ulysses"] == "not ulysses: heads=4: ulysses over 64 ranks takes a multiple of 64"


def test_collective_of_small_messages_takes_another_protocol():
    """64 messages one after the other, each of a latency of 2.7 instead of 14; of long ones the bytes decide."""
    short, long = (estimate("allgather", changed(FEW_HEADS, length=length), 65, ALONE) for length in (65, 65 * 2**20))
    assert short.forward.transfer_s == pytest.approx(64 * 2.7e-6, rel=0.01)
    assert long.forward.transfer_s == pytest.approx(64 * 2**20 * 512 / 48.5e9, rel=0.01)


def test_choice_is_the_fastest_that_fits():
    for length, world_size, cluster in itertools.product((2**15, 2**19, 2**23), (8, 64, 512), (DGX_H100, A2_ULTRA)):
        choice = choose(changed(LLAMA, length=length), world_size, cluster, balance="zigzag")
        fitting = [of for of in choice.estimates.values() if of.memory <= cluster.memory]
        if fitting:
            assert choice.method == min(fitting, key=lambda of: of.time_s).method
        assert set(choice.reasons) == set(METHODS)


def test_what_does_not_fit_is_not_chosen():
    holds = {method: of.memory for method, of in choose(LLAMA, 64, balance="zigzag").estimates.items()}
    choice = choose(LLAMA, 64, balance="zigzag", memory=holds["2d"] - 1)
    assert_best(choice, "ring")
    assert choice.reasons["2d"].startswith("not 2d: it holds ")
    least = min(holds, key=lambda method: holds[method])
    nothing = choose(LLAMA, 64, balance="zigzag", memory=1.0)
    assert nothing.method == least
    assert "but the others hold more" in nothing.reasons[least]


def test_choice_is_among_those_asked_for():
    choice = choose(LLAMA, 256, balance="zigzag", methods=("ring", "ulysses"))
    assert_best(choice, "ring")
    assert set(choice.reasons) == {"ring", "ulysses"}
    with pytest.raises(ValueError, match="expected one that can be used: heads=32: ulysses over"):
        choose(LLAMA, 256, methods=("ulysses",))


def test_choice_says_why():
    said = str(choose(LLAMA, 8, balance="zigzag")).splitlines()
    assert said[0].startswith("ulysses: ")
    assert said[0].endswith(" waiting")
    assert sorted(line.split(":")[0] for line in said[1:]) == ["not 2d", "not allgather", "not ring"]


# ------------------------------------------------------------------------------------------------------ wrong arguments


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"batch": 0}, ValueError, "batch=0: expected an int above 0"),
        ({"length": 16.0}, TypeError, "length=16.0: expected an int above 0, got float"),
        ({"heads": True}, TypeError, "heads=True: expected an int above 0, got bool"),
        ({"kv_heads": 3}, ValueError, "kv_heads=3: expected a divisor of heads=8"),
        ({"dtype": torch.int8}, TypeError, "dtype=torch.int8: expected float16, bfloat16, float32 or float64"),
        ({"is_causal": 1}, TypeError, "is_causal=1: expected True or False"),
        ({"window": 4}, TypeError, r"window=4: expected a pair \(left, right\) or None"),
        ({"window": (-1, 0)}, ValueError, r"window=\(-1, 0\): expected 0 or more keys on each side"),
    ],
)
def test_wrong_workload(sizes, error, message):
    with pytest.raises(error, match=message):
        changed(SMALL, **sizes)


@pytest.mark.parametrize(
    ("method", "world_size", "words", "message"),
    [
        ("rings", 4, {}, "method='rings': expected one of 'allgather', 'ring', 'ulysses', '2d'"),
        ("ring", 0, {}, "world_size=0: expected an int above 0"),
        ("ring", 4, {"balance": "even"}, "balance='even': expected one of 'none', 'zigzag', 'stripe'"),
        ("ring", 4, {"ranks_per_node": 3}, "world_size=4: expected a multiple of ranks_per_node=3"),
        ("ring", 4, {"rank": 4}, "rank=4: expected an int from 0 to 3, or None"),
        ("ring", 5, {"ranks_per_node": 1}, "length=16: expected a multiple of 5, for world_size=5 and balance='none'"),
        ("ring", 16, {"balance": "zigzag"}, "length=16: expected a multiple of 32"),
        ("ulysses", 16, {}, "heads=8: ulysses over 16 ranks takes a multiple of 16"),
        ("2d", 16, {"ranks_per_node": 16}, "heads=8: 2d over 16 ranks takes a multiple of 16"),
    ],
)
def test_wrong_arguments(method, world_size, words, message):
    with pytest.raises(ValueError, match=message):
        bytes_sent(method, SMALL, world_size, **words)


def test_heads_of_keys_that_ranks_cannot_share():
    workload = changed(SMALL, heads=12, kv_heads=4, length=12)
    with pytest.raises(ValueError, match="kv_heads=4: ulysses over 6 ranks takes a multiple or a divisor of 6"):
        bytes_sent("ulysses", workload, 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Link("l", 0.0, 0.0), "bandwidth=0.0: expected a finite number above 0"),
        (lambda: Link("l", 1.0, -1.0), "latency=-1.0: expected a finite number of seconds, 0 or more"),
        (lambda: dataclasses.replace(DGX_H100, ports_per_node=0), "ports_per_node=0: expected an int above 0"),
        (
            lambda: dataclasses.replace(DGX_H100, forward_rate=-1.0),
            r"forward_rate=-1.0: expected a finite number above 0",
        ),
        (lambda: choose(LLAMA, 8, memory=0), "memory=0: expected a finite number above 0"),
        (lambda: choose(changed(LLAMA, length=1000), 64), "length=1000: expected a multiple of 64"),
    ],
)
def test_wrong_figures(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bandwidths_are_below_those_of_the_data_sheets():
    for link, sheet in ((NVLINK_4, 450e9), (INFINIBAND_NDR, 50e9), (PCIE_4, 32e9)):
        assert 0.7 * sheet < link.bandwidth < sheet
