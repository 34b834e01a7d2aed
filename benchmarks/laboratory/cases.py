"""Which cases docs/kernel_resources.md has rows of, and which of them `make test` compiles.

A case's ``name`` and its kernel's are a row's identity: under the name of a case the configurations may change, and the
table is then written anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.cookbook.examples import EXAMPLES, by_name
from benchmarks.laboratory.compile import Job
from benchmarks.laboratory.launch_case import Case

TARGETS = ["cuda:80", "cuda:90", "cuda:120", "hip:gfx942"]
# What a tile of scores carries beside itself; the last asks for all there is.
LOADS: dict[str, dict[str, Any]] = {
    "plain": {"causal": True, "sinks": True},
    "masked": dict.fromkeys(("causal", "window", "prefix", "mask", "padding", "documents", "sinks"), True),
}
LOADS["biased"] = {**LOADS["masked"], "bias": True, "slopes": True}
LOADS["heavy"] = {**LOADS["biased"], "softcap": True, "dropout": True, "weights": True}

_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def attention_cases(dtype: str, target: str, head_dim: int) -> list[Case]:
    """Every tile of the attention kernels under the heaviest load that has it."""
    shared: Case = {"dtype": dtype, "head_dim": head_dim}
    name, loads = f"attention {_SHORT[dtype]} D{head_dim}", list(LOADS)
    # the careful pass takes the most shared memory where there is the least of it
    careful = head_dim == 512 and target in ("cuda:120", "hip:gfx942")
    cases = [{**shared, **LOADS["heavy"], "name": f"{name} heavy", "careful": careful}]
    for load, heavier in itertools.pairwise(loads):
        lighter = {"name": f"{name} {load}", "unless_under": heavier, "passes": ["fwd", "dkdv", "dq"]}
        cases.append({**shared, **LOADS[load], **lighter})
    return cases


def one_pass_cases(head_dim: int) -> list[Case]:
    """The backward that adds up dQ by atomics, under the lightest load and the heaviest."""
    return [
        {
            "dtype": "bfloat16", "head_dim": head_dim, **LOADS[load], "passes": ["one_pass"],
            "name": f"attention bf16 D{head_dim} {load} one pass",
        }
        for load in ("heavy", "plain")
    ]  # fmt: skip


COOKBOOK = tuple(example.name for example in EXAMPLES)
FUNCTION_FEATURES: dict[str, dict[str, Any]] = {
    "score": {"causal": True, "score_mod": 30.0, "passes": ["fwd", "dkdv", "dq", "captured"]},
    "mask": {"mask_mod": True, "passes": ["fwd", "dkdv", "dq"]},
}
FUNCTION_FEATURES["everything"] = {
    **dict.fromkeys(("causal", "bias", "softcap", "mask_mod"), True),
    "score_mod": 30.0,
    "passes": ["fwd", "dkdv", "dq", "captured"],
}


def function_cases(dtype: str, head_dim: int, features: Iterable[str] = tuple(FUNCTION_FEATURES)) -> list[Case]:
    """Functions of a user's: of scores, in the predicate, and both beside much else."""
    return [
        {
            "dtype": dtype, "head_dim": head_dim, **FUNCTION_FEATURES[name],
            "name": f"functions {_SHORT[dtype]} D{head_dim} {name}",
        }
        for name in features
    ]  # fmt: skip


def cookbook_cases(dtype: str, head_dim: int, examples: Iterable[str] = COOKBOOK) -> list[Case]:
    """Functions of the cookbook, as tracing writes them: both directions, and what each place where scores read what
    is learned adds to its gradient."""
    return [
        {
            "dtype": dtype, "head_dim": head_dim, "cookbook": name, "passes": ["fwd", "dkdv", "dq", "reads"],
            "length": 16 if by_name(name).drafts else 256, "name": f"cookbook {_SHORT[dtype]} D{head_dim} {name}",
        }
        for name in examples
    ]  # fmt: skip


def packed_cases(dtype: str, head_dim: int) -> list[Case]:
    """Three packed sequences under every load, as far as these have no masks, and do not return weights."""
    without = ("mask", "padding", "documents", "weights")
    return [
        {
            "dtype": dtype, "head_dim": head_dim, "packed": 3, "name": f"packed {_SHORT[dtype]} D{head_dim} {load}",
            **{feature: value for feature, value in features.items() if feature not in without},
            "passes": ["fwd", "dkdv", "dq", *(["bias"] if "bias" in features else [])],
        }
        for load, features in LOADS.items()
    ]  # fmt: skip


_OVER_A_CACHE = ("leftpad", "rotary", "bias", "slopes", "sinks", "window", "softcap")
DECODE_FEATURES: dict[str, dict[str, Any]] = {
    "one query": {},
    "one query, pages of 16": {"page_size": 16},
    "one query, pages of 64": {"page_size": 64},
    "few queries": {"length": 3, "group": 8},
    "many queries": {"length": 32, "group": 8},
    "everything": {"length": 3, "group": 8, "page_size": 16, **dict.fromkeys(_OVER_A_CACHE, True)},
    "functions": {"length": 3, "group": 8, "score_mod": 30.0, "mask_mod": True},
}


def decode_cases(dtype: str, head_dim: int, features: Iterable[str] = tuple(DECODE_FEATURES)) -> list[Case]:
    """Attention over a cache whose slots two programs divide: queries by number, the cache whole and in pages."""
    return [
        {
            "dtype": dtype, "head_dim": head_dim, "room": 4096, **DECODE_FEATURES[name],
            "name": f"decode {_SHORT[dtype]} D{head_dim} {name}",
        }
        for name in features
    ]  # fmt: skip


# Every way in which a row becomes tiles: many rows a tile, one, one in two parts, in several, and odd ones.
NORM_SIZES = (7, 64, 1000, 4096, 8192, 16384, 65536)
NORM_FEATURES: dict[str, dict[str, Any]] = {
    "layer": {"residual": True, "vectors": True},
    "rms": {"residual": True, "vectors": True, "kind": "rms"},
    "mixed": {"residual": True, "vectors": True, "float32_residual": True},
}
NORM_FEATURES["strided"] = {**NORM_FEATURES["layer"], "strided": True}
NORM_FEATURES["everything"] = {
    **NORM_FEATURES["mixed"],
    **dict.fromkeys(("x_bias", "row_scale", "dropout", "unit_offset"), True),
}


def norm_cases(dtype: str, features: Iterable[str] = NORM_FEATURES) -> list[Case]:
    """Every size with each of these sets of features."""
    return [
        {"dtype": dtype, "size": size, **NORM_FEATURES[name], "name": f"norm {_SHORT[dtype]} N{size} {name}"}
        for size in NORM_SIZES
        for name in features
        if dtype != "float32" or name != "mixed"
    ]


ADDITIVE_FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": dict.fromkeys(("causal", "padding", "mask"), True),
    "everything": dict.fromkeys(("causal", "padding", "mask", "bias", "weights"), True),
}


def additive_cases(dtype: str) -> list[Case]:
    """Additive attention by a hundred elements, for values of two widths."""
    return [
        {
            "dtype": dtype, "attention_dim": 100, "value_dim": value_dim, "length": 100, "keys": 100, **features,
            "name": f"additive {_SHORT[dtype]} Dv{value_dim} {name}",
        }
        for value_dim in (64, 256)
        for name, features in ADDITIVE_FEATURES.items()
    ]  # fmt: skip


HOPPER_FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "masked": dict.fromkeys(("causal", "window", "prefix", "mask", "padding", "documents", "sinks"), True),
    "bias": {"causal": True, "bias": True},
    "softcap": {"causal": True, "softcap": True},
}
HOPPER_FEATURES["everything"] = {**HOPPER_FEATURES["masked"], "bias": True, "softcap": True}


def hopper_cases(head_dim: int, passes: Sequence[str], features: Iterable[str] = tuple(HOPPER_FEATURES)) -> list[Case]:
    """The kernels written for sm_90, a case for every pass: fwd, pair and one pass; so long that a program computes
    several tiles, which the forward under masks has a counter for."""
    shared: Case = {"hopper": True, "dtype": "bfloat16", "head_dim": head_dim, "length": 2048}
    return [
        {**shared, **HOPPER_FEATURES[name], "passes": [one], "name": f"hopper bf16 D{head_dim} {name} {one}"}
        for name in features
        for one in passes
    ]


# (dtype, target, head size) and (dtype, target): a few of every kind, which `make test` holds to their rows.
QUICK_ATTENTION = [
    *(("bfloat16", target, 128) for target in ("cuda:80", "cuda:90")),
    ("bfloat16", "cuda:120", 512),
    ("bfloat16", "hip:gfx942", 64),
    ("float32", "cuda:90", 64),
    ("float32", "hip:gfx942", 128),
]
QUICK_NORMS = [("bfloat16", "cuda:90"), ("float32", "hip:gfx942")]
QUICK_DECODING = ("bfloat16", "cuda:90", 128)
_TABLE_ATTENTION = [
    *(("bfloat16", target, head_dim) for target in ("cuda:80", "cuda:90", "hip:gfx942") for head_dim in (64, 128, 256)),
    *(case for case in QUICK_ATTENTION if case[0] == "float32" or case[2] == 512),
]
_TABLE_NORM_SIZES, _TABLE_NORM_FEATURES = (64, 4096, 8192, 16384, 65536), ("layer", "everything")


def in_table(case: Case) -> bool:
    """Whether a case has rows: of norms, which have very many, some do."""
    return "size" not in case or (
        case["size"] in _TABLE_NORM_SIZES and case["name"].rpartition(" ")[2] in _TABLE_NORM_FEATURES
    )


def table_jobs() -> list[Job]:
    """Targets and cases of the whole table, as pieces of a minute or so."""
    jobs = [(target, attention_cases(dtype, target, size)) for dtype, target, size in _TABLE_ATTENTION]
    jobs += [(target, [case for case in norm_cases(dtype) if in_table(case)]) for dtype, target in QUICK_NORMS]
    jobs += [(target, additive_cases("bfloat16")) for target in ("cuda:80", "cuda:90", "hip:gfx942")]
    jobs += [(target, one_pass_cases(size)) for target in ("cuda:80", "cuda:90") for size in (64, 128)]
    jobs += [("cuda:90", hopper_cases(size, [one])) for size in (64, 128) for one in ("fwd", "pair", "one pass")]
    jobs += [("cuda:90", hopper_cases(256, ["fwd"]))]
    targets = "cuda:80", "cuda:90", "hip:gfx942"
    jobs += [(target, packed_cases("bfloat16", size)) for target in targets for size in (64, 128)]
    jobs += [(target, decode_cases("bfloat16", size)) for target in targets for size in (64, 128, 256)]
    jobs += [(target, function_cases("bfloat16", size)) for target in targets[:2] for size in (64, 128)]
    jobs += [(target, cookbook_cases("bfloat16", size)) for target in targets[:2] for size in (64, 128)]
    return sorted(jobs, key=lambda job: TARGETS.index(job[0]))
