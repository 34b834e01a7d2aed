"""What a case of the laboratory launches: the launchers that ``fastattn`` calls, on small tensors of no content.

A case is a dictionary of plain values, for it is handed to another process: dtype, sizes, the features that it has, and
whether careful launches are wanted, too (``stand_in`` leaves them out otherwise). It is of a norm where it has a
``size``, of additive attention where it has an ``attention_dim``, of attention over a cache where it has a ``room``,
else of attention, by the kernels for Hopper if it says ``hopper``.
"""
# ruff: noqa: TID251  # the laboratory looks at the kernels themselves

from __future__ import annotations

import collections
from typing import Any

import torch

from benchmarks.laboratory import functions

Case = dict[str, Any]
PASSES = ("fwd", "dkdv", "dq", "bias", "weights")


def launch(case: Case) -> None:
    """Launch every kernel of a case."""
    if "size" in case:
        launch_norm(case)
    elif "attention_dim" in case:
        launch_additive(case)
    elif "room" in case:
        launch_decode(case)
    elif case.get("hopper"):
        launch_hopper(case)
    else:
        launch_attention(case)


# ---------------------------------------------------------------------------------------------------------- attention


def launch_attention(case: Case) -> None:
    """Launch the ``passes`` of attention; with ``unless_under`` without those whose tile that heavier load has, too."""
    from fastattn.ops.attention.functions.launch import gradients_of_reads
    from fastattn.ops.attention.functions.program import Program
    from fastattn_kernels.attention import backward, backward_one_pass, bias_gradient, forward
    from fastattn_kernels.attention import weights as weights_kernels
    from fastattn_kernels.common.delta import launch_delta
    from fastattn_kernels.common.gradients import Gradients, WeightsGradient
    from fastattn_kernels.common.tile_map import tile_map_for

    problem = attention_problem(case)
    query, key, value = problem.query, problem.key, problem.value
    dtype, (batch, heads, length), keys = query.dtype, query.shape[:3], key.shape[2]
    output = torch.empty(batch, heads, length, value.shape[3], dtype=dtype)
    lse, statistics = torch.empty(batch, heads, length), torch.empty(batch, heads, 2, length)
    d_weights = WeightsGradient(torch.empty(batch, length, keys, dtype=dtype), heads) if case.get("weights") else None
    passes = case.get("passes", PASSES)
    if "unless_under" in case:
        tiles, heavier = _tiles_of(case, problem.load(d_weights)), _tiles_of(case, case["unless_under"])
        passes = [name for name in passes if name not in tiles or tiles[name] != heavier[name]]
    if "fwd" in passes:
        forward.launch_attention_fwd(problem, output, lse, statistics, tile_map_for(problem))
    for name in ("dkdv", "dq"):
        if name in passes:
            delta = launch_delta(output, output, None)
            nothing = query[:0]
            d_query, d_key, d_value = (nothing, key, value) if name == "dkdv" else (query, nothing, nothing)
            backward.launch_attention_bwd(
                problem, output, statistics, delta, d_weights,
                Gradients(d_query, d_key, d_value, torch.zeros(batch, heads, length) if case.get("slopes") else None),
                tile_map_for(problem),
            )  # fmt: skip
    if "one_pass" in passes:
        backward_one_pass.launch_attention_bwd_one_pass(
            problem, output, statistics, lse, d_weights, Gradients(query, key, value), tile_map_for(problem)
        )
    if "bias" in passes:
        bias_gradient.launch_attention_bias_bwd(problem, output, statistics, lse, d_weights)
    if "captured" in passes:
        bias_gradient.launch_attention_captured_bwd(
            problem, output, statistics, lse, d_weights, functions.of_table(case["score_mod"]),
            (False, True, True, True), (0, 64),
        )  # fmt: skip
    traced = functions.of_cookbook(case["cookbook"], query, key).get("score_mod") if "reads" in passes else None
    if traced is not None:
        for number, access in enumerate(Program.of(traced.text).accesses):
            saved = output, statistics, lse, d_weights
            collections.deque(gradients_of_reads(problem, traced.text, number, access, *saved), maxlen=0)
    if "weights" in passes:
        weights = torch.empty(batch, length, keys, dtype=dtype)
        weights_kernels.launch_attention_weights(problem, statistics, weights, average=True)
        gradient = WeightsGradient(weights, heads)
        weights_kernels.launch_attention_weights_delta(problem, statistics, gradient, lse)


def launch_hopper(case: Case) -> None:
    """Launch the ``passes`` of attention on Hopper: fwd, pair (dK and dV, then dQ) and one pass (all three)."""
    from fastattn_kernels.attention.hopper import backward, forward
    from fastattn_kernels.common.gradients import Gradients
    from fastattn_kernels.common.tile_map import tile_map_for

    problem = attention_problem(case)
    query, key, value = problem.query, problem.key, problem.value
    output = torch.empty(*query.shape[:3], value.shape[3], dtype=query.dtype)
    lse, statistics = torch.empty(query.shape[:3]), torch.empty(*query.shape[:2], 2, query.shape[2])
    tile_map = tile_map_for(problem)
    if "fwd" in case["passes"]:
        forward.launch_attention_fwd(problem, output, lse, statistics, tile_map)
    for name in ("pair", "one pass"):
        if name in case["passes"]:
            backward.launch_attention_bwd(
                problem, output, statistics, lse, Gradients(query, key, value), tile_map, deterministic=name == "pair"
            )


def launch_decode(case: Case) -> None:
    """Launch all kernels over a cache of two sequences, with so much ``room`` for each, two heads of keys, and a
    ``group`` of heads for either; in pages if the case has a ``page_size``, and with the features that it has."""
    from fastattn_kernels.attention.decode.append import launch_append
    from fastattn_kernels.attention.decode.forward import launch_attention_decode
    from fastattn_kernels.attention.decode.problem import CacheProblem

    def only(feature: str, value: Any) -> Any:
        return value if case.get(feature) else None

    dtype, head_dim = getattr(torch, case["dtype"]), case["head_dim"]
    batch, kv_heads, group, length, room = 2, 2, case.get("group", 4), case.get("length", 1), case["room"]
    heads, value_dim, page_size = kv_heads * group, case.get("value_dim", head_dim), case.get("page_size", room)
    entries = batch * room // page_size

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    of_sequence = torch.zeros(batch, dtype=torch.int32)
    output, lse = empty(batch, heads, length, value_dim), empty(batch, heads, length, dtype=torch.float32)
    problem = CacheProblem(
        query=empty(batch, heads, length, head_dim),
        key_cache=empty(entries, kv_heads, page_size, head_dim),
        value_cache=empty(entries, kv_heads, page_size, value_dim),
        cache_seqlens=of_sequence,
        scale=0.1,
        key=empty(batch, kv_heads, length, head_dim),
        value=empty(batch, kv_heads, length, value_dim),
        block_table=only("page_size", torch.zeros(batch, room // page_size, dtype=torch.int32)),
        cache_leftpad=only("leftpad", of_sequence),
        rotary_cos=only("rotary", empty(room, head_dim // 2)),
        rotary_sin=only("rotary", empty(room, head_dim // 2)),
        bias=only("bias", empty(batch, heads, length, room)),
        alibi_slopes=only("slopes", empty(1, heads)),
        sinks=only("sinks", empty(1, heads)),
        lower=only("window", -100),
        upper=0,
        softcap=only("softcap", 30.0),
        score_mod=functions.score_mod(heads, case["score_mod"]) if "score_mod" in case else None,
        mask_mod=functions.mask_mod(batch, room) if "mask_mod" in case else None,
    )
    launch_append(problem)
    launch_attention_decode(problem, output, lse, case.get("splits", 2))


def attention_problem(case: Case) -> Any:
    """Of two batch entries, or so many sequences as are ``packed``, and four heads in two groups, with the dtype, sizes
    and features of the case."""
    from fastattn.ops.attention.functions.launch import modifier
    from fastattn_kernels.common.packed import Packed
    from fastattn_kernels.common.problem import Problem

    def only(feature: str, value: Any) -> Any:
        return value if case.get(feature) else None

    dtype, head_dim = getattr(torch, case["dtype"]), case["head_dim"]
    batch, heads, kv_heads, length, keys = 2, 4, 2, case.get("length", 128), case.get("keys", 256)
    packed, in_memory = None, batch
    if case.get("packed"):
        batch, in_memory = case["packed"], 1
        offsets, used = (torch.zeros(size, dtype=torch.int32) for size in (batch + 1, batch))
        packed = Packed(offsets, offsets, used, bottom_right=True)
    query = torch.empty(in_memory, heads, length, head_dim, dtype=dtype)
    key = torch.empty(in_memory, kv_heads, keys, head_dim, dtype=dtype)
    traced = functions.of_cookbook(case["cookbook"], query, key) if "cookbook" in case else {}
    modifiers = {kind: modifier(*each, trains=kind == "score_mod") for kind, each in traced.items()}
    if "score_mod" in case:
        modifiers["score_mod"] = functions.score_mod(heads, case["score_mod"])
    if case.get("mask_mod"):
        modifiers["mask_mod"] = functions.mask_mod(batch, max(length, keys))
    return Problem(
        query=query,
        key=key,
        value=torch.empty(in_memory, kv_heads, keys, case.get("value_dim", head_dim), dtype=dtype),
        scale=0.1,
        bias=only("bias", torch.empty(1, heads, length, keys, dtype=dtype)),
        alibi_slopes=only("slopes", torch.empty(1, heads)),
        sinks=only("sinks", torch.empty(1, heads)),
        mask=only("mask", torch.ones(batch, 1, length, keys, dtype=torch.bool)),
        key_padding_mask=only("padding", torch.zeros(batch, keys, dtype=torch.bool)),
        query_documents=only("documents", torch.zeros(batch, length, dtype=torch.int32)),
        key_documents=only("documents", torch.zeros(batch, keys, dtype=torch.int32)),
        prefix=only("prefix", torch.zeros(batch, dtype=torch.int32)),
        lower=only("window", keys - length - 100),
        upper=only("causal", keys - length),
        shift=keys - length,
        softcap=only("softcap", 30.0),
        seed=only("dropout", torch.zeros(2, dtype=torch.int64)),
        dropout_p=0.1 if case.get("dropout") else 0.0,
        packed=packed,
        **modifiers,
    )


def _tiles_of(case: Case, load: Any) -> dict[str, Any]:
    """The tiles that a case's kernels have under a load."""
    from fastattn_kernels.attention import config

    arguments = torch.device("cpu"), getattr(torch, case["dtype"]), case["head_dim"], case["head_dim"], load
    backward = config.backward_config(*arguments)
    return {"fwd": config.forward_config(*arguments), "dkdv": backward.dkdv, "dq": backward.dq}


# ------------------------------------------------------------------------------------------------------------- norms


def launch_norm(case: Case) -> None:
    """Launch the norm kernels for ``case``: dtype, size, rows, kind ("layer" or "rms"), and the features that it has
    (residual, x_bias, row_scale, dropout, unit_offset, vectors: weight and bias; float32_residual)."""
    from fastattn_kernels.residual_norm.backward import launch_residual_norm_bwd
    from fastattn_kernels.residual_norm.forward import launch_residual_norm_fwd
    from fastattn_kernels.residual_norm.problem import NormProblem

    dtype, rows, size = getattr(torch, case["dtype"]), case.get("rows", 4096), case["size"]
    residual_dtype = torch.float32 if case.get("float32_residual") else dtype

    def only(feature: str, *shape: int, dtype: torch.dtype = dtype) -> Any:
        return torch.empty(shape, dtype=dtype) if case.get(feature) else None

    x, total = torch.empty(rows, size, dtype=dtype), torch.empty(rows, size, dtype=residual_dtype)
    d_output = x
    if case.get("strided"):  # heads that lie inside, in front and in the gradient
        x, total = (t.view(2, 4, rows // 8, size) for t in (x, total))
        d_output = x.transpose(1, 2).contiguous().transpose(1, 2)
    problem = NormProblem(
        x,
        total if case.get("residual") else None,
        only("vectors", size),
        only("vectors", size),
        only("x_bias", size),
        only("row_scale", rows, 1, dtype=torch.float32),
        is_rms=case.get("kind") == "rms",
        unit_offset=bool(case.get("unit_offset")),
        seed=only("dropout", 2, dtype=torch.int64),
        dropout_p=0.1 if case.get("dropout") else 0.0,
    )
    added = any(case.get(feature) for feature in ("residual", "x_bias", "row_scale", "dropout"))
    statistics = torch.empty(3, rows)
    output = torch.empty_like(d_output)
    launch_residual_norm_fwd(problem, output, total if added else None, statistics, residual_dtype)
    apart = case.get("row_scale") or case.get("dropout") or residual_dtype != dtype
    vectors = (bool(case.get("vectors")), bool(case.get("vectors")), bool(case.get("x_bias")))
    launch_residual_norm_bwd(
        problem, d_output, total if added else None, total, statistics, total if apart else None, x, vectors,
        bool(case.get("row_scale")), dtype,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- additive attention


def launch_additive(case: Case) -> None:
    """Launch the kernels of additive attention for ``case``: dtype, attention_dim, value_dim, whether carefully, and
    the features it names (causal, padding, mask, bias, weights)."""
    from fastattn_kernels.additive_attention.backward import launch_additive_bwd
    from fastattn_kernels.additive_attention.forward import launch_additive_fwd
    from fastattn_kernels.additive_attention.pairs import launch_additive_weights
    from fastattn_kernels.additive_attention.problem import AdditiveProblem
    from fastattn_kernels.common.gradients import Gradients, WeightsGradient
    from fastattn_kernels.common.tile_map import tile_map_for

    dtype, size, value_dim = getattr(torch, case["dtype"]), case["attention_dim"], case.get("value_dim", 64)
    batch, heads, length, keys = 2, 2, case.get("length", 256), case.get("keys", 512)

    def only(feature: str, value: Any) -> Any:
        return value if case.get(feature) else None

    query, key = (
        torch.empty(batch, heads, length, size, dtype=dtype),
        torch.empty(batch, heads, keys, size, dtype=dtype),
    )
    value = torch.empty(batch, heads, keys, value_dim, dtype=dtype)
    problem = AdditiveProblem(
        query,
        key,
        value,
        scale=1.0,
        bias=only("bias", torch.empty(1, heads, length, keys, dtype=dtype)),
        mask=only("mask", torch.ones(batch, 1, length, keys, dtype=torch.bool)),
        key_padding_mask=only("padding", torch.zeros(batch, keys, dtype=torch.bool)),
        upper=only("causal", 1) and 0,
        weight=torch.empty(1, size, dtype=dtype),
    )
    output, tile_map = torch.empty(batch, heads, length, value_dim, dtype=dtype), tile_map_for(problem)
    statistics, weights = torch.empty(batch, heads, 2, length), torch.empty(batch, heads, length, keys, dtype=dtype)
    launch_additive_fwd(problem, output, statistics, tile_map)
    if case.get("weights"):
        launch_additive_weights(problem, statistics, weights)
    launch_additive_bwd(
        problem, output, statistics, torch.empty(batch, heads, length), only("weights", weights),
        only("weights", WeightsGradient(weights, heads)), Gradients(query, key, value), tile_map,
    )  # fmt: skip
