"""Steps that launch this package's kernels themselves, each configuration a variant of its own: what a sweep tries.

Triton is imported late: without it the variants are listed all the same, and refuse.
"""
# ruff: noqa: TID251  # the configurations are the kernels' own

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.cases import AttentionCase
from benchmarks.families.masks import inputs, masks
from benchmarks.variants import Refused, Step, Variant
from fastattn.ops.attention.call import make_call
from fastattn.ops.common.blocks import empty_in_order_of

Kernels = Literal["triton", "gluon"]
Part = Literal["forward", "pair", "dkdv", "dq", "one-pass"]
Numbers = tuple[int, ...]
Gradients = tuple[Tensor, Tensor, Tensor]

# By kernels, part and head size: the tables' choices and those neighbours that compile for sm_90 with no more than some
# bytes spilled. In plain Triton rows and keys of a tile, warps, stages, and a 1 where the next tile's product goes
# ahead; in Gluon's forward keys, stages, whether the output has shared memory of its own (1) or not (0), and a 1 where
# the warpgroups take turns; in its backward rows of a tile where dK and dV are made, keys where dQ is, and stages.
_CONFIGURATIONS: dict[tuple[Kernels, Part], dict[int, tuple[Numbers, ...]]] = {
    ("triton", "forward"): {
        64: ((128, 128, 8, 3, 1), (128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)),
        128: ((128, 128, 8, 2, 1), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2)),
        256: ((64, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
    },
    ("triton", "dkdv"): {
        64: ((64, 128, 8, 2), (64, 64, 4, 2), (32, 128, 8, 2)),
        128: ((32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
        256: ((32, 32, 8, 1), (32, 32, 8, 2)),
    },
    ("triton", "dq"): {
        64: ((128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 2)),
        128: ((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2)),
        256: ((64, 32, 8, 2), (128, 32, 8, 2)),
    },
    ("triton", "one-pass"): {
        64: ((64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 8, 2)),
        128: ((32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
        256: ((32, 32, 8, 1),),
    },
    ("gluon", "forward"): {
        64: ((128, 4, 1), (128, 4, 1, 1), (128, 3, 1), (128, 2, 1), (64, 4, 1)),
        128: ((128, 2, 1), (128, 2, 1, 1), (128, 2, 0), (64, 2, 1), (64, 3, 1)),
        256: ((64, 2, 0), (32, 3, 1), (32, 4, 0)),
    },
    ("gluon", "pair"): {
        64: ((128, 128, 2), (128, 128, 3), (64, 128, 2), (64, 128, 3)),
        128: ((64, 128, 2), (64, 64, 2), (64, 64, 3)),
    },
    ("gluon", "one-pass"): {64: ((128, 128, 2), (64, 128, 2), (64, 128, 3)), 128: ((64, 128, 2),)},
}


# ----------------------------------------------------------------------------------------------------------- candidates


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Kernels with a configuration.

    Attributes:
        kernels: plain Triton's, or Gluon's for Hopper.
        part: what is configured; where that is one pass of the backward's pair, the other is as the package has it.
        numbers: of the configuration; empty: the package's own for these kernels.
        head_dims: the head sizes that it is worth; empty: any.
    """

    kernels: Kernels
    part: Part
    numbers: Numbers = ()
    head_dims: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """As in ``fastattn-triton-dq-128x64-w8-s2`` and ``fastattn-gluon-n128-s2``."""
        parts = ["fastattn", self.kernels] + ([] if self.part == "forward" else [self.part])
        match self.kernels, self.numbers:
            case "triton", (rows, keys, warps, stages, *ahead):
                parts += [f"{rows}x{keys}", f"w{warps}", f"s{stages}"] + (["pipelined"] if ahead else [])
            case "gluon", (keys, stages, staged, *turns) if self.part == "forward":
                parts += (
                    [f"n{keys}", f"s{stages}"] + ([] if staged else ["unstaged"]) + (["ping-pong"] if turns else [])
                )
            case "gluon", (rows, keys, stages):
                parts += [f"m{rows}"] + ([f"n{keys}"] if self.part == "pair" else []) + [f"s{stages}"]
        return "-".join(parts)

    def takes(self, case: AttentionCase) -> bool:
        """Whether the direction and the head size are its own."""
        return case.backward == (self.part != "forward") and (not self.head_dims or case.head_dim in self.head_dims)


def _candidates() -> tuple[Candidate, ...]:
    """The package's own choices first. Head sizes that have a configuration in common share its variant."""
    parts: tuple[Part, ...] = ("forward", "pair", "one-pass")
    kinds: tuple[Kernels, ...] = ("gluon", "triton")
    found = [Candidate(kernels, part) for part in parts for kernels in kinds]
    for (kernels, part), by_size in _CONFIGURATIONS.items():
        sizes: dict[Numbers, list[int]] = {}
        for head_dim, several in by_size.items():
            for numbers in several:
                sizes.setdefault(numbers, []).append(head_dim)
        found += [Candidate(kernels, part, numbers, tuple(dims)) for numbers, dims in sizes.items()]
    return tuple(found)


CANDIDATES = _candidates()


def names_for(case: AttentionCase, *, every: bool) -> tuple[str, ...]:
    """The variants that are worth a case: every configuration for it, or only what the package chooses for each kind of
    kernels."""
    return tuple(c.name for c in CANDIDATES if c.takes(case) and (every or not c.numbers))


# ------------------------------------------------------------------------------------------------------------ refusals


def _applies(candidate: Candidate) -> Callable[[AttentionCase], str | None]:
    def applies(case: AttentionCase) -> str | None:
        if case.weights:
            return "returns no weights"
        if not candidate.takes(case):
            direction = "backward" if case.backward else "forward"
            return f"has no {direction} for head_dim={case.head_dim}"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        return _no_device(candidate.kernels, case)

    return applies


def _no_device(kernels: Kernels, case: AttentionCase) -> str | None:
    if torch.device(case.device).type == "cuda":
        capability = torch.cuda.get_device_capability(case.device)
        if kernels == "gluon" and (torch.version.hip is not None or capability != (9, 0)):
            return f"is for compute capability 9.0, and this is {capability[0]}.{capability[1]}"
        return None
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if kernels == "triton" and interpreted:
        return None
    return "needs a GPU: on a CPU only Triton's interpreter runs it, which is no measure"


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise Refused("; ".join(reasons))


# ------------------------------------------------------------------------------------------------------------- launches


def _problem(query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> Any:
    """What the kernels are told of a call of ``fastattn.attention`` with these arguments."""
    from fastattn_kernels.common.problem import Problem

    call = make_call(query, key, value, **arguments)
    return Problem(
        query=call.query,
        key=call.key,
        value=call.value,
        scale=call.scale,
        bias=call.bias,
        alibi_slopes=call.alibi_slopes,
        mask=call.mask,
        key_padding_mask=call.key_padding_mask,
        query_documents=call.query_documents,
        key_documents=call.key_documents,
        lower=call.lower,
        upper=call.upper,
        shift=call.shift,
        softcap=call.softcap,
    )


def forward_launch(candidate: Candidate, problem: Any) -> Callable[..., None]:
    """``launch(out, lse, statistics)`` of a candidate; raise Refused where it cannot."""
    from fastattn_kernels.common.tile_map import tile_map_for

    config: Any = None
    if candidate.kernels == "gluon":
        from fastattn_kernels.attention.hopper import forward as kernels
        from fastattn_kernels.attention.hopper.config import ForwardConfig
        from fastattn_kernels.attention.hopper.problem import refusals

        _refuse(refusals(problem))
        if candidate.numbers:
            keys, stages, staged, *turns = candidate.numbers
            if keys % 64 and problem.masks:
                raise Refused(f"tiles of {keys} keys: packed masks have words for multiples of 64")
            # two warpgroups' rows
            config = ForwardConfig(128, keys, stages, stage_output=bool(staged), ping_pong=bool(turns))
    else:
        from fastattn_kernels.attention import forward as kernels

        config = _tile(candidate.numbers)

    def launch(out: Tensor, lse: Tensor, statistics: Tensor) -> None:
        kernels.launch_attention_fwd(problem, out, lse, statistics, tile_map_for(problem), config)

    return launch


def backward_launch(candidate: Candidate, problem: Any) -> Callable[..., None]:
    """``launch(d_out, statistics, delta, (dq, dk, dv))`` of a candidate; raise Refused where it cannot."""
    from fastattn_kernels.common import gradients as kinds
    from fastattn_kernels.common.tile_map import tile_map_for

    if candidate.kernels == "gluon":
        from fastattn_kernels.attention.hopper import backward as hopper
        from fastattn_kernels.attention.hopper.config import BackwardConfig, backward_config

        _refuse(hopper.refusals(problem))
        one_pass = candidate.part == "one-pass"
        of_hopper = backward_config(problem, deterministic=not one_pass)
        if one_pass and not of_hopper.one_pass:  # it would be the pair under another name
            raise Refused("does not fit in one pass")
        if candidate.numbers:
            of_hopper = BackwardConfig(*candidate.numbers, one_pass=one_pass)

        def launch(d_out: Tensor, statistics: Tensor, delta: Tensor, gradients: Gradients) -> None:
            tiles = tile_map_for(problem)
            hopper.launch_attention_bwd(
                problem, d_out, statistics, delta, kinds.Gradients(*gradients), tiles, of_hopper
            )

    elif candidate.part == "one-pass":
        from fastattn_kernels.attention.backward_one_pass import launch_attention_bwd_one_pass, one_pass_refusals

        _refuse(one_pass_refusals(problem, needs_alibi_slopes=False))
        tile = _tile(candidate.numbers)

        def launch(d_out: Tensor, statistics: Tensor, delta: Tensor, gradients: Gradients) -> None:
            tiles = tile_map_for(problem)
            launch_attention_bwd_one_pass(
                problem, d_out, statistics, delta, None, kinds.Gradients(*gradients), tiles, tile
            )

    else:
        from fastattn_kernels.attention.backward import launch_attention_bwd

        config = _backward_config(candidate, problem)

        def launch(d_out: Tensor, statistics: Tensor, delta: Tensor, gradients: Gradients) -> None:
            tiles = tile_map_for(problem)
            launch_attention_bwd(problem, d_out, statistics, delta, None, kinds.Gradients(*gradients), tiles, config)

    return launch


def _tile(numbers: Numbers) -> Any:
    """Of plain Triton; None: the package's own."""
    from fastattn_kernels.common.config import Config

    if not numbers:
        return None
    rows, keys, warps, stages, *ahead = numbers
    return Config(rows, keys, warps, stages, pipelined=bool(ahead))


def _backward_config(candidate: Candidate, problem: Any) -> Any:
    """The package's own with the candidate's tile for its part; None: the package's own."""
    from fastattn_kernels.attention.config import backward_config

    if not candidate.numbers:
        return None
    query, value = problem.query, problem.value
    own = backward_config(query.device, query.dtype, query.shape[3], value.shape[3], problem.load())
    return dataclasses.replace(own, **{candidate.part: _tile(candidate.numbers)})


# ---------------------------------------------------------------------------------------------------------------- steps


def _build(candidate: Candidate) -> Callable[[AttentionCase, torch.dtype], Step]:
    def build(case: AttentionCase, dtype: torch.dtype) -> Step:
        from triton.runtime.errors import OutOfResources

        try:
            step = _step(candidate, case, dtype)
            step()
        except ImportError as error:  # this triton has another Gluon
            raise Refused(f"does not load: {error}") from error
        except OutOfResources as error:  # a bias takes shared memory that the tile wants
            raise Refused(" ".join(str(error).split())) from error
        return step

    return build


def _step(candidate: Candidate, case: AttentionCase, dtype: torch.dtype) -> Step:
    """The forward or the backward alone, with all that the package does around the launch in each call."""
    from fastattn_kernels.common.delta import launch_delta

    query, key, value, d_out = inputs(case, dtype)
    problem = _problem(query, key, value, masks(case, dtype))
    out = _unwritten(query)
    lse, statistics = (query.new_full(shape, math.nan, dtype=torch.float32) for shape in _shapes(query))
    if not case.backward:
        forward = forward_launch(candidate, problem)

        def forward_step() -> tuple[Tensor, ...]:
            forward(out, lse, statistics)
            return (out,)

        return forward_step

    backward = backward_launch(candidate, problem)
    forward_launch(Candidate("triton", "forward"), problem)(out, lse, statistics)
    gradients = _unwritten(query), _unwritten(key), _unwritten(value)

    def backward_step() -> tuple[Tensor, ...]:
        delta = launch_delta(out, d_out, None)
        backward(d_out, statistics, delta, gradients)
        return out, *gradients

    return backward_step


def _shapes(query: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the LSE and of the statistics."""
    batch, heads, seqlen = query.shape[:3]
    return (batch, heads, seqlen), (batch, heads, 2, seqlen)


def _unwritten(like: Tensor) -> Tensor:
    """NaN throughout: memory that is only empty may hold another variant's right result."""
    return empty_in_order_of(like, tuple(like.shape)).fill_(math.nan)


VARIANTS = tuple(Variant(c.name, _build(c), _applies(c)) for c in CANDIDATES)
