"""The support matrix of docs/support.md is what the backends say, cell by cell."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn

PAGE = (Path(__file__).parents[1] / "docs" / "support.md").read_text()

DIFFERENTIABLE = {"requires_grad": True}

# What each row of the support matrix means, as calls: (query options, arguments of attention). ``order`` says what is
# done with a call beside running it.
# What a score_mod reads, and a mask_mod.
LEARNED = torch.ones(4, 16, requires_grad=True)


def SEEN(batch, head, query_index, key_index):
    return (query_index + key_index + batch) % 3 < 2


CALLS: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "float16, bfloat16, float32": [({"dtype": d}, {}) for d in (torch.float16, torch.bfloat16, torch.float32)],
    "float64": [({"dtype": torch.float64}, {})],
    "head size 1 to 512, value size apart": [({"head_dim": d, "value_dim": 24}, {}) for d in (1, 257, 512)],
    "head size above 512": [({"head_dim": 513}, {})],
    "causal, top-left and bottom-right": [
        ({}, {"is_causal": True, "causal_alignment": alignment}) for alignment in ("top_left", "bottom_right")
    ],
    "sliding window, left and right": [({}, {"window": window}) for window in ((1, 0), (0, None), (None, 2))],
    "prefix tokens that everybody sees": [
        ({}, {"is_causal": True, "prefix": prefix}) for prefix in (2, torch.tensor([0, 4]))
    ],
    "boolean mask, any broadcast": [
        ({}, {"attn_mask": torch.ones(shape, dtype=torch.bool)}) for shape in ((3, 5), (2, 1, 1, 5), (1, 4, 3, 1))
    ],
    "key padding": [({}, {"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)})],
    "document ids": [({}, {"document_ids": (torch.zeros(2, 3).int(), torch.arange(5).expand(2, 5))})],
    "additive mask, any broadcast, with gradient": [
        ({}, {"attn_mask": torch.zeros(shape, requires_grad=True)}) for shape in ((3, 5), (2, 1, 1, 5), (1, 4, 3, 1))
    ],
    "ALiBi, with gradient of the slopes": [
        ({}, {"alibi_slopes": torch.ones(shape, requires_grad=True)}) for shape in ((4,), (2, 4))
    ],
    "softcap": [({}, {"softcap": 5.0})],
    "functions on scores and masks, with gradient of what they read": [
        ({}, {"score_mod": (lambda score, b, h, i, j, table: score + table[h, i - j], LEARNED), "mask_mod": SEEN})
    ],
    "sinks, with gradient": [({}, {"sinks": torch.zeros(4, requires_grad=True)})],
    "grouped-query heads": [({"kv_heads": 2}, {}), ({"kv_heads": 1}, {})],
    "dropout": [({}, {"dropout_p": 0.5})],
    "averaged and per-head weights, with gradient": [
        (DIFFERENTIABLE, {"need_weights": True, "average_attn_weights": average}) for average in (True, False)
    ],
    "LSE, with gradient": [(DIFFERENTIABLE, {"return_lse": True})],
    "rows that may see nothing": [({}, {"attn_mask": torch.zeros(3, 5, dtype=torch.bool)})],
    "second derivative": [(DIFFERENTIABLE, {"order": 2})],
    "forward mode": [({}, {"order": "jvp"})],
    "vmap, per-sample gradients": [({}, {"order": "vmap"})],
    "bitwise deterministic backward": [(DIFFERENTIABLE, {"order": "twice"})],
}

# The same of the norms: the dtype and size of x, and arguments of add_layer_norm.
VECTOR = torch.ones(8)
EVERYTHING = {
    "residual": torch.randn(3, 8),
    "weight": VECTOR,
    "bias": VECTOR,
    "x_bias": VECTOR,
    "row_scale": torch.ones(3),
    "dropout_p": 0.3,
}
NORMS: dict[str, list[dict[str, Any]]] = {
    "norms in float16, bfloat16, float32": [{"dtype": d} for d in (torch.float16, torch.bfloat16, torch.float32)],
    "norms in float64": [{"dtype": torch.float64}],
    "rows of 1 to 262144 elements": [{"shape": (1, n)} for n in (1, 262144)],
    "wider rows": [{"shape": (1, 262145)}],
    "residual, returned sum, each in a dtype of its own": [
        {"residual": torch.randn(3, 8).half(), "residual_dtype": torch.bfloat16, "return_residual": True}
    ],
    "weight, 1 + weight, bias, bias of the branch": [{name: VECTOR} for name in ("weight", "bias", "x_bias")]
    + [{"weight": VECTOR, "unit_offset": True}],
    "dropout, stochastic depth by rows": [{"dropout_p": 0.5}, {"row_scale": torch.ones(3)}],
    "any strides, any rank, several axes normalised": [
        {"shape": (8,)},
        {"shape": (2, 3, 4, 8)},
        {"shape": (3, 2, 8), "normalized_shape": (2, 8)},
    ],
    "gradient of everything, bitwise deterministic": [{"order": "twice", **EVERYTHING}],
    "second derivative of norms": [{"order": 2, **EVERYTHING}],
    "forward mode of norms": [{"order": "jvp"}],
    "per-sample gradients of norms": [{"order": "vmap"}],
}

# The same of additive attention: dtype, the values' size, heads, and arguments.
ADDITIVE: dict[str, list[dict[str, Any]]] = {
    "additive attention in float16, bfloat16, float32": [
        {"dtype": d} for d in (torch.float16, torch.bfloat16, torch.float32)
    ],
    "additive attention in float64": [{"dtype": torch.float64}],
    "values of 1 to 512 elements": [{"value_dim": d} for d in (1, 512)],
    "wider values": [{"value_dim": 513}],
    "several heads, each with its own vector": [{"heads": 3}],
    "causal, boolean and additive masks, key padding": [
        {"is_causal": True},
        {"attn_mask": torch.ones(3, 5, dtype=torch.bool)},
        {"attn_mask": torch.zeros(2, 1, 1, 5)},
        {"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)},
    ],
    "additive rows that may see nothing": [{"attn_mask": torch.zeros(3, 5, dtype=torch.bool)}],
    "weights of additive attention, with gradient": [
        {"need_weights": True, "average_attn_weights": average, "heads": 2} for average in (True, False)
    ],
    "its gradients of everything, bitwise deterministic": [{"attn_mask": torch.zeros(3, 5), "order": "twice"}],
    "second derivative of additive attention": [{"order": 2}],
    "forward mode of additive attention": [{"order": "jvp"}],
    "per-sample gradients of additive attention": [{"order": "vmap"}],
}

# The same of packed sequences: the dtype, and arguments of attention_varlen.
PACKED: dict[str, list[dict[str, Any]]] = {
    "packed sequences of unequal length, empty ones too": [
        {"dtype": d} for d in (torch.float16, torch.bfloat16, torch.float32)
    ],
    "causality in both alignments, windows, prefixes, ALiBi, biases by position, keys in use for each sequence": [
        {"is_causal": True, "causal_alignment": "bottom_right", "prefix": 1},
        {"window": (2, 1), "alibi_slopes": torch.ones(2)},
        {"attn_mask": torch.zeros(4, 4), "seqused_k": torch.tensor([2, 0, 3], dtype=torch.int32)},
    ],
    "functions on scores and masks of packed sequences": [
        {"score_mod": (lambda score, b, h, i, j, table: score * table[h, b], LEARNED), "mask_mod": SEEN}
    ],
    "every derivative of packed sequences, the LSE's too": [
        {"order": order, "return_lse": True} for order in (2, "jvp", "twice")
    ],
}

# The same of a cache: the dtype, the size of a page if there are any, and arguments of attention_with_kvcache.
CACHE: dict[str, list[dict[str, Any]]] = {
    "cache contiguous or in pages of any size and order, shared pages": [
        *({"dtype": d} for d in (torch.float16, torch.bfloat16, torch.float32)),
        {"block_table": torch.tensor([[3, 1], [3, 2]], dtype=torch.int32), "cache_seqlens": 6},
        {"block_table": torch.tensor([[3], [0]], dtype=torch.int32), "page_size": 7},
    ],
    "new tokens put in, rotary embedding in both conventions, lengths and padding of each sequence": [
        {"cache_leftpad": torch.tensor([1, 2], dtype=torch.int32)},
        *(
            {"rotary_cos": torch.ones(8, 4), "rotary_sin": torch.zeros(8, 4), "rotary_interleaved": i}
            for i in (True, False)
        ),
    ],
    "causality, windows, softcap, sinks, ALiBi, masks by slots, grouped heads, LSE over a cache": [
        {"is_causal": False, "window": (2, 1), "softcap": 5.0, "sinks": torch.zeros(4)},
        {"alibi_slopes": torch.ones(4), "attn_mask": torch.ones(2, 8, dtype=torch.bool), "return_lse": True},
    ],
    "functions on scores and masks over a cache": [
        {"score_mod": (lambda score, b, h, i, j, table: score + table[h, i - j], LEARNED.detach()), "mask_mod": SEEN}
    ],
    "gradients over a cache": [{"sinks": torch.zeros(4, requires_grad=True)}],
}


def matrix() -> dict[str, dict[str, str]]:
    rows = re.findall(r"^\| (.+?) \| (yes|no) \| (yes|no) \|$", PAGE, flags=re.MULTILINE)
    return {feature: {"triton": triton, "torch": torch_} for feature, triton, torch_ in rows}


def test_support_matrix_rows_are_the_ones_checked():
    assert list(matrix()) == [*CALLS, *NORMS, *ADDITIVE, *PACKED, *CACHE]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("feature", CALLS)
def test_support_matrix_cell_is_true(feature, backend, device):
    options: dict[str, Any]
    arguments: dict[str, Any]
    for options, arguments in CALLS[feature]:
        options = {"dtype": torch.float32, "head_dim": 16, "value_dim": 16, "kv_heads": 4, **options}
        make: dict[str, Any] = {
            "dtype": options["dtype"],
            "device": device,
            "requires_grad": options.get("requires_grad", False),
        }
        query = torch.randn(2, 4, 3, options["head_dim"], **make)
        key = torch.randn(2, options["kv_heads"], 5, options["head_dim"], **make)
        value = torch.randn(2, options["kv_heads"], 5, options["value_dim"], **make)
        arguments = {name: a.to(device) if isinstance(a, torch.Tensor) else a for name, a in arguments.items()}
        order = arguments.pop("order", 1)
        runs = fastattn.explain(query, key, value, backend=backend, **arguments).backend == backend
        assert runs == (matrix()[feature][backend] == "yes")
        if runs:
            results = derived((query, key, value), order, backend, arguments)
            assert all(tensor.isfinite().all() for tensor in results)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("feature", NORMS)
def test_support_matrix_cell_of_norms_is_true(feature, backend, device):
    for given in NORMS[feature]:
        arguments: dict[str, Any] = {n: a.to(device) if isinstance(a, torch.Tensor) else a for n, a in given.items()}
        dtype, order = arguments.pop("dtype", torch.float32), arguments.pop("order", 1)
        x = torch.randn(arguments.pop("shape", (3, 8)), dtype=dtype, device=device)
        leaves = [t.requires_grad_() for t in (x, *arguments.values()) if isinstance(t, torch.Tensor)]

        def normed(x: torch.Tensor, arguments: dict[str, Any] = arguments) -> torch.Tensor:
            result = fastattn.add_layer_norm(x, backend=backend, **arguments)
            return result if isinstance(result, torch.Tensor) else result[0] + result[1]

        def gradients(seed: int, leaves: list[torch.Tensor] = leaves, x: torch.Tensor = x, **options: Any) -> Any:
            torch.manual_seed(seed)
            return torch.autograd.grad(normed(x).square().sum(), leaves, **options)

        if matrix()[feature][backend] == "no":
            with pytest.raises(NotImplementedError, match=f"the {backend} backend refuses"):
                normed(x)
            continue
        if order == "jvp":
            found = [torch.func.jvp(normed, (x,), (x,))[1]]
        elif order == "vmap":
            found = [torch.func.vmap(torch.func.grad(lambda row: normed(row).square().sum()))(x)]
        else:
            first = gradients(1, create_graph=order == 2)
            found = [normed(x), *first]
            if order == 2:
                found += torch.autograd.grad([g.square().sum() for g in first], leaves)
            if order == "twice":
                assert all(torch.equal(a, b) for a, b in zip(first, gradients(1)))
        assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("feature", ADDITIVE)
def test_support_matrix_cell_of_additive_attention_is_true(feature, backend, device):
    for given in ADDITIVE[feature]:
        arguments: dict[str, Any] = {n: a.to(device) if isinstance(a, torch.Tensor) else a for n, a in given.items()}
        make: Any = {"dtype": arguments.pop("dtype", torch.float32), "device": device, "requires_grad": True}
        heads, order = arguments.pop("heads", 1), arguments.pop("order", 1)
        query, key = torch.randn(2, heads, 3, 8, **make), torch.randn(2, heads, 5, 8, **make)
        value = torch.randn(2, heads, 5, arguments.pop("value_dim", 4), **make)
        weight = torch.randn(heads, 8, **make)
        if "attn_mask" in arguments and arguments["attn_mask"].is_floating_point():
            arguments["attn_mask"].requires_grad_()
        leaves = (query, key, value, weight)

        def attend(*leaves: torch.Tensor, arguments: dict[str, Any] = arguments) -> tuple[torch.Tensor, ...]:
            result = fastattn.additive_attention(*leaves, backend=backend, **arguments)
            return result if isinstance(result, tuple) else (result,)

        if matrix()[feature][backend] == "no":
            with pytest.raises(NotImplementedError, match=f"the {backend} backend refuses"):
                attend(*leaves)
        else:
            found = differentiated(attend, leaves, [arguments.get("attn_mask")], order)
            assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("feature", PACKED)
def test_support_matrix_cell_of_packed_sequences_is_true(feature, backend, device):
    cu_seqlens = torch.tensor([0, 2, 2, 6], dtype=torch.int32, device=device)
    for given in PACKED[feature]:
        arguments: dict[str, Any] = {n: a.to(device) if isinstance(a, torch.Tensor) else a for n, a in given.items()}
        make: Any = {"dtype": arguments.pop("dtype", torch.float32), "device": device, "requires_grad": True}
        order = arguments.pop("order", 1)
        leaves = tuple(torch.randn(6, 2, 8, **make) for _ in range(3))

        def attend(*leaves: torch.Tensor, arguments: dict[str, Any] = arguments) -> tuple[torch.Tensor, ...]:
            query, key, value = leaves
            result: Any = fastattn.attention_varlen(query, key, value, cu_seqlens, backend=backend, **arguments)
            return result if isinstance(result, tuple) else (result,)

        if matrix()[feature][backend] == "no":
            with pytest.raises(NotImplementedError, match=f"the {backend} backend refuses"):
                attend(*leaves)
        else:
            found = differentiated(attend, leaves, [], order)
            assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("feature", CACHE)
def test_support_matrix_cell_of_a_cache_is_true(feature, backend, device):
    for given in CACHE[feature]:
        arguments: dict[str, Any] = {n: a.to(device) if isinstance(a, torch.Tensor) else a for n, a in given.items()}
        make: Any = {"dtype": arguments.pop("dtype", torch.float32), "device": device}
        room = arguments.pop("page_size", 4 if "block_table" in arguments else 8)
        of_tokens = [torch.randn(2, heads, 2, 8, **make) for heads in (4, 2, 2)]
        caches = [torch.randn(4 if "block_table" in arguments else 2, 2, room, 8, **make) for _ in range(2)]
        query, *new = of_tokens
        options: Any = {"cache_seqlens": 5, "backend": backend, **arguments}
        if matrix()[feature][backend] == "no":
            with pytest.raises(NotImplementedError, match=f"the {backend} backend refuses"):
                fastattn.attention_with_kvcache(query, *caches, *new, **options)
            continue
        result: Any = fastattn.attention_with_kvcache(query, *caches, *new, **options)
        results = result if isinstance(result, tuple) else (result,)
        leaves = [t for t in arguments.values() if isinstance(t, torch.Tensor) and t.requires_grad]
        if leaves:
            results += torch.autograd.grad(results[0].sum(), leaves)
        assert all(t.isfinite().all() for t in results)
        if "block_table" not in arguments:
            torch.testing.assert_close(caches[1][:, :, 5:7], new[1], rtol=0, atol=0)


def derived(
    qkv: tuple[torch.Tensor, ...], order: int | str, backend: str, arguments: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """The call's results and, where anything requires it, its gradients; or what ``order`` names."""

    def attend(*qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result: Any = fastattn.attention(*qkv, backend=backend, **arguments)  # type: ignore[arg-type]
        return result if isinstance(result, tuple) else (result,)

    return differentiated(attend, qkv, arguments.values(), order)


def differentiated(
    function: Any, inputs: tuple[torch.Tensor, ...], others: Iterable[Any], order: int | str
) -> tuple[torch.Tensor, ...]:
    """The results and the gradients of what requires any, among the inputs and what else a call is given."""
    leaves = [t for t in (*inputs, *others) if isinstance(t, torch.Tensor) and t.requires_grad]

    def gradients(**options: Any) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad([t.square().sum() for t in function(*inputs)], leaves, **options)

    if order == "jvp":
        return torch.func.jvp(function, inputs, inputs)[1]
    if order == "vmap":

        def loss(*qkv: torch.Tensor) -> torch.Tensor:
            return function(*(t[None] for t in qkv), *inputs[3:])[0].sum()

        return torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*inputs[:3])
    results = function(*inputs)
    if not leaves:
        return results
    first = gradients(create_graph=order == 2)
    if order == 2:
        first += torch.autograd.grad([t.square().sum() for t in first], leaves)
    if order == "twice":
        assert all(torch.equal(a, b) for a, b in zip(first, gradients()))
    return (*results, *first)
