"""The operator over a cache on the Triton kernels. Imports triton, so it is imported late."""

from __future__ import annotations

from typing import Any

from fastattn.ops.attention.functions.launch import modifier
from fastattn.ops.attention.kvcache.contract import KVCacheInputs, KVCacheOptions, KVCacheResults, empty_results
from fastattn.ops.attention.kvcache.modified import programs
from fastattn_kernels.attention.decode.append import launch_append
from fastattn_kernels.attention.decode.forward import division_of, launch_attention_decode
from fastattn_kernels.attention.decode.problem import CacheProblem
from fastattn_kernels.common.plans import planned


def _problem(inputs: KVCacheInputs, options: KVCacheOptions) -> CacheProblem:
    lower, upper = options.lower, options.upper
    functions: dict[str, Any] = {kind: modifier(text, read) for kind, text, read in programs(inputs, options)}
    furthest = inputs.room + inputs.query.shape[2]
    return CacheProblem(
        scale=options.scale,
        rotary_interleaved=options.rotary_interleaved,
        # the kernels add slots to these, in 32 bits; further out they rule nothing
        lower=None if lower is None else max(lower, -furthest),
        upper=None if upper is None else min(upper, furthest),
        softcap=options.softcap,
        **{name: getattr(inputs, name) for name in KVCacheInputs._fields},
        **functions,
    )


def describe(inputs: KVCacheInputs, options: KVCacheOptions) -> str:
    """How many kernels would run, and how the slots are divided."""
    _, _, splits = division_of(_problem(inputs, options), options.num_splits)
    kernels = ["append"] * (inputs.key is not None) + ["attention"] + ["merge"] * (splits > 1)
    return f"{', '.join(kernels)}; slots divided by {splits}"


@planned
def forward(inputs: KVCacheInputs, options: KVCacheOptions) -> KVCacheResults:
    """The contract of ``fastattn::attention_with_kvcache``."""
    results, problem = empty_results(inputs, options), _problem(inputs, options)
    launch_append(problem)
    launch_attention_decode(problem, *results, options.num_splits)
    return results
