"""What each method of context parallelism sends: bytes and messages of a rank, exact for even shards.

Every method is a ring of groups. Ranks of a group share heads: each takes all of the group's tokens, of its part of the
heads. Blocks of keys and values then go round the ring. ``"ring"`` is a ring of single ranks, ``"ulysses"`` one group,
and ``"2d"`` a ring of nodes, each of which is a group; ``"allgather"`` stands apart.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from fastattn.distributed.cluster import check_count
from fastattn.distributed.layout import Balance
from fastattn.distributed.workload import Workload

Method = Literal["allgather", "ring", "ulysses", "2d"]

METHODS: tuple[Method, ...] = get_args(Method)


class Arrangement(NamedTuple):
    """A method on a number of ranks: groups in a ring. Ranks of a group are neighbours in rank."""

    ring: int  # groups
    group: int  # ranks of each

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.ring * self.group


def bytes_sent(
    method: Method,
    workload: Workload,
    world_size: int,
    *,
    ranks_per_node: int = 8,
    balance: Balance = "none",
    rank: int | None = None,
    backward: bool = False,
) -> int:
    """How many bytes a rank sends in one pass: queries, keys, values, outputs and their gradients.

    | method | forward | backward |
    | --- | --- | --- |
    | allgather | K, V to all others | K, V again; dK, dV reduce-scattered as sums |
    | ring | K, V passed on as far as somebody sees them | K, V again; dK, dV with them as sums, and home |
    | ulysses | Q, K, V to each rank its heads; O and the LSE back | dO; dQ, dK, dV back |
    | 2d | ulysses within a node, ring from node to node | the same of gradients |

    Sums and the LSE are float32 (float64 of float64 inputs); all else has the dtype of the inputs. In an all-gather and
    a reduce-scatter a rank sends ``world_size - 1`` shards. Where a group has more ranks than there are heads of keys,
    each rank gets the one head that its queries see. In a ring a block stops at the last rank that sees a key of it.

    Args:
        method: ``"allgather"``, ``"ring"``, ``"ulysses"`` or ``"2d"``.
        workload: the call.
        world_size: ranks that share the sequence.
        ranks_per_node: the size of the groups of ``"2d"``; fewer ranks than that are one node.
        balance: how tokens lie on ranks: contiguous, in two pieces from both ends, or one by one in turn.
        rank: whose bytes; None is the rank that sends most.
        backward: the backward's bytes, and not the forward's.

    Raises:
        ValueError: shards are not even, the heads cannot be shared so, or an argument is outside of its range.
    """
    arrangement = arranged(method, workload, world_size, ranks_per_node, balance)
    return max(
        _sent(method, workload, arrangement, balance, place, backward)[0] for place in _places(arrangement, rank)
    )


def messages_sent(
    method: Method,
    workload: Workload,
    world_size: int,
    *,
    ranks_per_node: int = 8,
    balance: Balance = "none",
    rank: int | None = None,
    backward: bool = False,
) -> int:
    """How many messages a rank sends in one pass: what goes to one rank at one time is one.

    Args and errors are those of :func:`fastattn.distributed.traffic.bytes_sent`.
    """
    arrangement = arranged(method, workload, world_size, ranks_per_node, balance)
    return max(
        _sent(method, workload, arrangement, balance, place, backward)[1] for place in _places(arrangement, rank)
    )


# --------------------------------------------------------------------------------------------------------- arrangements


def arranged(method: Method, workload: Workload, world_size: int, ranks_per_node: int, balance: Balance) -> Arrangement:
    """The groups of a method, or ValueError where an argument is outside of its range or the method cannot be used."""
    for name, value, accepted in (("method", method, Method), ("balance", balance, Balance)):
        if value not in get_args(accepted):
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, get_args(accepted)))}")
    check_count("world_size", world_size)
    check_count("ranks_per_node", ranks_per_node)
    node = min(ranks_per_node, world_size)
    if world_size % node:
        raise ValueError(f"world_size={world_size}: expected a multiple of ranks_per_node={ranks_per_node}")
    group = {"allgather": 1, "ring": 1, "ulysses": world_size, "2d": node}[method]
    arrangement = Arrangement(world_size // group, group)
    pieces = 2 * world_size if balance == "zigzag" else world_size
    if workload.length % pieces:
        raise ValueError(
            f"length={workload.length}: expected a multiple of {pieces}, for world_size={world_size} and "
            f"balance={balance!r}"
        )
    if reason := refusal(method, workload, arrangement):
        raise ValueError(reason)
    return arrangement


def refusal(method: Method, workload: Workload, arrangement: Arrangement) -> str | None:
    """Why the ranks of a group cannot share the heads, or None where they can."""
    heads, kv_heads, group = workload.heads, workload.kv_heads, arrangement.group
    if heads % group:
        return f"heads={heads}: {method} over {group} ranks takes a multiple of {group}"
    if kv_heads % group and group % kv_heads:
        return f"kv_heads={kv_heads}: {method} over {group} ranks takes a multiple or a divisor of {group}"
    return None


def copies(workload: Workload, arrangement: Arrangement) -> int:
    """How many ranks of a group hold each head of keys and values."""
    return max(1, arrangement.group // workload.kv_heads)


# --------------------------------------------------------------------------------------------------------- what is sent


def query_elements(workload: Workload, arrangement: Arrangement) -> int:
    """Elements of a rank's queries, which are those of its outputs, too."""
    return workload.batch * workload.heads * (workload.length // arrangement.ranks) * workload.head_dim


def block_elements(workload: Workload, arrangement: Arrangement) -> int:
    """Elements of a rank's keys and values together, once its group has shared them: what goes round the ring."""
    tokens = workload.length // arrangement.ranks
    heads = workload.kv_heads * copies(workload, arrangement)
    return 2 * workload.batch * heads * tokens * workload.head_dim


def exchanged_bytes(workload: Workload, arrangement: Arrangement, backward: bool) -> int:
    """Bytes that a rank of a group sends to each other rank of it in one pass: its heads, and tokens back.

    Forward these are Q, K and V, then O and its LSE; backward dO, then dQ, dK and dV.
    """
    size, sums = workload.element_size, workload.sum_size
    of_queries = 2 * query_elements(workload, arrangement) * size
    of_keys = block_elements(workload, arrangement) * size
    lse = 0 if backward else query_elements(workload, arrangement) // workload.head_dim * sums
    return (of_queries + of_keys + lse) // arrangement.group


def passes(workload: Workload, arrangement: Arrangement, balance: Balance, place: int) -> tuple[int, int]:
    """How many blocks of K and V, and how many of their gradients, the group at ``place`` of the ring sends on.

    A block goes from place to place, from the last to the first, as far as somebody sees a key of it. Its gradient goes
    with it, and from the last place that sees it home to its owner.
    """
    ring, last = arrangement.ring, arrangement.ring - 1
    if last == 0:
        return 0, 0
    steps, others = _reach(workload, ring, balance)
    if others == "round":
        # All blocks but the first come to the place in front of their own, so that each place sends all but one of them
        # on.
        of_first = steps > 0 and place <= steps
        return (last if place == last else last - 1 + (place < steps)), last + of_first
    if steps == 0:
        return 0, 0
    if others == "alike":
        return steps, steps + 1
    return (min(place + 1, steps), min(place + 1, steps + 1)) if place < last else (0, steps)


def _reach(workload: Workload, ring: int, balance: Balance) -> tuple[int, Literal["alike", "to the end", "round"]]:
    """How many places the first block goes, and how the others do: as far, as far but not past the last place, or past
    it to the place in front of their own."""
    last, tokens = ring - 1, workload.length // ring
    left, right = (workload.length if side is None else side for side in workload.bounds)
    if balance == "zigzag":
        # A place has a piece from each end of the sequence. Others see keys of one that have a piece so many pieces
        # away, to whichever side: a place's pieces lie in the opposite order at the end.
        pieces = -(-max(left, right) // (tokens // 2))
        if pieces == 0:
            return 0, "alike"
        return (last if pieces >= ring else pieces), "round"
    if balance == "stripe" and tokens > 1:
        return (min(left, last) if right == 0 else last), "alike"
    steps = min(last, -(-left // tokens))
    return steps, "to the end" if right == 0 else "round"


def _places(arrangement: Arrangement, rank: int | None) -> tuple[int, ...]:
    """The rank's place in the ring; for None places of which one sends as much as any: the ends, and the last but
    one."""
    if rank is None:
        return (0, max(0, arrangement.ring - 2), arrangement.ring - 1)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < arrangement.ranks:
        raise ValueError(f"rank={rank!r}: expected an int from 0 to {arrangement.ranks - 1}, or None")
    return (rank // arrangement.group,)


def _sent(
    method: Method, workload: Workload, arrangement: Arrangement, balance: Balance, place: int, backward: bool
) -> tuple[int, int]:
    """Bytes and messages of one pass, of a rank in the group at ``place``."""
    size, sums = workload.element_size, workload.sum_size
    block = block_elements(workload, arrangement)
    others = arrangement.group - 1
    if method == "allgather":
        shards = arrangement.ring - 1
        return shards * block * (size + (sums if backward else 0)), shards * (3 if backward else 1)
    blocks, gradients = passes(workload, arrangement, balance, place)
    if not backward:
        gradients = 0
    in_group = others * exchanged_bytes(workload, arrangement, backward)
    return in_group + block * (blocks * size + gradients * sums), 2 * others + blocks + gradients
