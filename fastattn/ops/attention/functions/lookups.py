"""Integers that a program makes of floating numbers (``log`` of a distance, rounded to a bucket), looked up.

Such an integer jumps where the floating number passes a whole one, and at distances that are powers of 2 the buckets of
T5 lie just there: whether ``log(16 / 8) / log(16) * 8`` is 2 or a little less is a matter of the last digit, in which
torch, Triton and its interpreter differ. So where the integer depends on one index alone, or on the difference of query
and key, torch works it out for every value of that, once a call, and the program reads it from the tensor. Then all
backends and both passes agree, and no kernel takes a logarithm for every pair.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, fx

from fastattn.ops.attention.functions.program import DIFFERENCE, Program, is_difference, printed
from fastattn.ops.attention.functions.writing import INDICES, described


class Lookup(NamedTuple):
    """A program that makes the integers of a lookup of ``value``, and of which index that is, or of the difference."""

    text: str
    of: str


class WithLookups(NamedTuple):
    """A program that reads lookups as its last captured tensors, and what these are made by."""

    text: str
    lookups: tuple[Lookup, ...]


@functools.lru_cache(maxsize=1024)
def with_lookups(text: str) -> WithLookups:
    """A program without the integers that can be looked up."""
    program = Program.of(text)
    found: list[Lookup] = []
    spelled: dict[fx.Node, str] = {}
    annotated = [f'{name}: "{kind}"' for name, kind in zip(program.captured, program.kinds)]
    own = list(program.arguments[: len(program.arguments) - len(annotated)])
    for node in program.graph.nodes:
        of = _looked_up_by(node)
        if of is None:
            continue
        name, index = f"captured_{len(annotated)}", of
        if of == DIFFERENCE:
            index = "aten.sub.Tensor(query_index, key_index)"
        spelled[node] = f"read({name}, [{index}])"
        found.append(Lookup(_making(program, node, of), of))
        annotated.append(f'{name}: "{described(torch.empty(0, dtype=node.meta["dtype"], device="meta"))}"')
    if not found:
        return WithLookups(text, ())
    return WithLookups(printed(program, program.name, [*own, *annotated], program.results, spelled), tuple(found))


def _looked_up_by(node: fx.Node) -> str | None:
    """Of which index a node is an integer that was a floating number; None: it is no such node."""
    if str(node.target) != "aten._to_copy.default" or node.meta["dtype"].is_floating_point:
        return None
    source = node.args[0]
    is_real = isinstance(source, fx.Node) and source.meta["dtype"].is_floating_point
    places = node.meta["places"]
    if not is_real or "score" in node.meta["depends"] or len(places) != 1:
        return None
    return next(iter(places))


def _making(program: Program, node: fx.Node, of: str) -> str:
    """The program of a lookup."""
    spelled = {}
    for each in program.graph.nodes:
        if each.op == "placeholder" and of == each.target:
            spelled[each] = "value"
        elif of == DIFFERENCE and is_difference(each):
            spelled[each] = "value" if str(each.args[0]) == "query_index" else "aten.neg.default(value)"
        elif each.op == "placeholder" and each.target == "batch":
            spelled[each] = "value"  # of which constants take the shape
    annotated = [f'{name}: "{kind}"' for name, kind in zip(program.captured, program.kinds)]
    return printed(program, "lookup", ["value", *annotated], (node,), spelled)


class Extent(NamedTuple):
    """How many values each of the indices takes, those that functions are told."""

    batch: int
    head: int
    query_index: int
    key_index: int


def extent_of(query: Tensor, key: Tensor) -> Extent:
    """How many values each of the indices takes in a call on ``[B, H, L, D]`` and ``[B, Hk, S, D]``."""
    batch, heads, rows = query.shape[:3]
    return Extent(batch, heads, rows, key.shape[2])


def made(lookup: Lookup, extent: Extent, captured: tuple[Tensor, ...], device: torch.device) -> Tensor:
    """The integers of a lookup, ``[values]``; those of negative differences stand at the end, where a negative index
    finds them."""
    if lookup.of != DIFFERENCE:
        values = torch.arange(extent[INDICES.index(lookup.of)], dtype=torch.int32, device=device)
    else:
        ahead, behind = extent.query_index, extent.key_index
        values = torch.cat([torch.arange(ahead, device=device), torch.arange(-behind, 0, device=device)]).int()
    return Program.of(lookup.text).function(values, *captured).expand(values.shape).contiguous()
