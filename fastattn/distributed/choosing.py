"""Which method a call on shards goes by where its user leaves that open, and why not by the others.

All ranks have to come to the same answer, and none asks another one: it follows from what they were all called with.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import torch

from fastattn.distributed import ulysses
from fastattn.distributed.cluster import DGX_H100, Cluster
from fastattn.distributed.layout import Balance, Place, ranks_of
from fastattn.distributed.model import Choice, choose
from fastattn.distributed.traffic import METHODS, Method
from fastattn.distributed.workload import Workload
from fastattn.ops.attention.contract import AttentionCall

# Of calls that the communication model does not know: from so many keys on each rank on, a ring. Computing on a shard
# then takes longer than the start of a message, and all keys at once are much memory. An estimate, and no measurement.
_FEWEST_KEYS_OF_RING = 4096


class Chosen(NamedTuple):
    """What ``"auto"`` stands for."""

    method: Method
    reason: str  # in words


def auto(call: AttentionCall, places: tuple[Place, ...], balance: Balance) -> Chosen:
    """Of the methods that can run a call the one that the communication model has as the fastest, or one by a rule
    where the model does not know such a call."""
    absent = left_out(call, places, balance)
    methods = tuple(method for method in METHODS if method not in absent)
    if len(methods) == 1:
        return Chosen(methods[0], "there is no other to choose")
    if not unknown_of(call):
        cluster, choice = _cluster(places), modelled(call, places, balance, methods)
        reason = "the fastest that fits into memory"
        if choice.estimates[choice.method].memory > cluster.memory:
            reason = "the one that holds least, since none fits into memory"
        return Chosen(choice.method, f"{reason}, by the communication model of nodes of {cluster.name}")
    keys = call.key.shape[2]
    if "ulysses" in methods:
        return Chosen("ulysses", "the ranks can share the heads")
    if keys >= _FEWEST_KEYS_OF_RING:
        return Chosen("ring", f"a rank has {keys} keys, {_FEWEST_KEYS_OF_RING} or more")
    return Chosen("allgather", f"a rank has {keys} keys, fewer than {_FEWEST_KEYS_OF_RING}")


def left_out(call: AttentionCall, places: tuple[Place, ...], balance: Balance) -> dict[Method, str]:
    """The methods that ``"auto"`` does not choose from, with the reasons; at least one is left."""
    if len(places) == 2:
        return {method: "the mesh has two dimensions" for method in METHODS if method != "2d"}
    world = places[0].world
    found: dict[Method, str] = {"2d": "it takes a mesh of two dimensions"}
    if world == 1:
        return {"ring": "there is one rank", "ulysses": "there is one rank", **found}
    refusal = ulysses.refusal(call.query.shape[1], call.key.shape[1], world)
    if refusal is not None:
        return {"ulysses": refusal, **found}
    if balance == "stripe" and call.alibi_slopes is not None:
        apart = "the distances of alibi_slopes between two stripes are no whole numbers of their tokens"
        return {"allgather": apart, "ring": apart, **found}
    if call.bias is not None or call.mask is not None:
        return {"ulysses": "it sends the rows of attn_mask, and the others do not", **found}
    return found


def modelled(call: AttentionCall, places: tuple[Place, ...], balance: Balance, methods: tuple[Method, ...]) -> Choice:
    """What the communication model has of some methods, for a call that it knows."""
    world = ranks_of(places)
    return _choice(workload_of(call, world), world, _cluster(places), balance if world > 1 else "none", methods)


def unknown_of(call: AttentionCall) -> list[str]:
    """What of a call the communication model does not know."""
    found = {
        "document_ids": call.query_documents is not None,
        "a prefix": call.prefix is not None,
        "an attn_mask": call.bias is not None or call.mask is not None,
        "a mask_mod": call.mask_mod is not None,
        "keys of another length than the queries'": call.query.shape[2] != call.key.shape[2],
        "values of another head size than the keys'": call.value.shape[3] != call.key.shape[3],
    }
    return [name for name, has_it in found.items() if has_it]


def workload_of(call: AttentionCall, world: int) -> Workload:
    """A call that the communication model knows, in its terms."""
    batch, heads, length, head_dim, kv_heads = (_plain(size) for size in (*call.query.shape, call.key.shape[1]))
    lower, upper = (None if bound is None else _plain(bound) for bound in (call.lower, call.upper))
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (call.query, call.key, call.value))
    return Workload(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        length=length * world,
        head_dim=head_dim,
        dtype=call.query.dtype,
        window=None if lower is upper is None else (None if lower is None else -lower, upper),
        training=trains,
    )


def _plain(number: Any) -> int:
    """A number that may be a symbol of a graph for sequences of any length. The graph becomes one for this length,
    since the choice goes by it."""
    return int(number)


def _cluster(places: tuple[Place, ...]) -> Cluster:
    """Eight H100 in a node; or where the ranks do not fill such nodes, as many as do, each with its port."""
    node, world = DGX_H100.ranks_per_node, ranks_of(places)
    if len(places) == 2:
        node = places[1].world
    elif world > node:
        node = math.gcd(world, node)
    if node == DGX_H100.ranks_per_node:
        return DGX_H100
    name = f"{node} ranks, each as one of {DGX_H100.name}"
    return dataclasses.replace(DGX_H100, name=name, ranks_per_node=node, ports_per_node=node)


# Remembered, since a model calls it once for each layer and step: an answer takes 0.1 ms.
@functools.lru_cache(maxsize=256)
def _choice(workload: Workload, world: int, cluster: Cluster, balance: Balance, methods: tuple[Method, ...]) -> Choice:
    return choose(workload, world, cluster, balance=balance, methods=methods)
