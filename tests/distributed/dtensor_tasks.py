"""What the ranks of the tests of DTensors do: calls of DTensors beside the same calls of plain tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import fastattn

Leaves = dict[str, Tensor]


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def _attention(**words: Any) -> Callable[..., Any]:
    def call(query: Any, key: Any, value: Any, **own: Any) -> Any:
        return fastattn.attention(query, key, value, **own, **words, backend="torch")

    return call


_QKV: dict[str, tuple[int, ...]] = {"query": (4, 8, 6, 8), "key": (4, 4, 6, 8), "value": (4, 4, 6, 8)}
_CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()
_PADDING = torch.arange(6) >= torch.tensor([[6], [4], [1], [5]])

# Of each call the function, the shapes of its leaves, and other tensors.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, tuple[int, ...]], Leaves]] = {
    "causal": (_attention(is_causal=True), _QKV, {}),
    "one key head": (_attention(window=(2, 1)), {**_QKV, "key": (4, 1, 6, 8), "value": (4, 1, 6, 8)}, {}),
    "everything": (
        _attention(is_causal=True, return_lse=True, prefix=2, softcap=5.0),
        {**_QKV, "attn_mask": (4, 8, 6, 6), "alibi_slopes": (8,), "sinks": (8,)},
        {"key_padding_mask": _PADDING},
    ),
    "bias for all": (_attention(), {**_QKV, "attn_mask": (1, 8, 6, 6)}, {}),
    "average weights": (_attention(need_weights=True), _QKV, {"attn_mask": _CAUSAL}),
    "weights of heads": (_attention(need_weights=True, average_attn_weights=False, return_lse=True), _QKV, {}),
    "documents": (_attention(document_ids=torch.arange(6)[None] // 3), _QKV, {}),
    "scaled_dot_product_attention": (
        lambda query, key, value: fastattn.scaled_dot_product_attention(query, key, value, is_causal=True),
        {**_QKV, "query": (4, 4, 6, 8)},
        {},
    ),
    "additive": (
        lambda query, key, value, weight, attn_mask: fastattn.additive_attention(
            query, key, value, weight, attn_mask=attn_mask, need_weights=True
        ),
        {**dict.fromkeys(("query", "key", "value"), (4, 4, 6, 8)), "weight": (4, 8)},
        {"attn_mask": _CAUSAL},
    ),
    "add_layer_norm": (
        lambda query, residual, weight, bias: fastattn.add_layer_norm(
            query, residual, weight, bias, return_residual=True
        ),
        {"query": (4, 4, 8), "residual": (4, 4, 8), "weight": (8,), "bias": (8,)},
        {},
    ),
    "add_rms_norm": (
        lambda query, residual, weight, row_scale: fastattn.add_rms_norm(query, residual, weight, row_scale=row_scale),
        {"query": (4, 4, 8), "residual": (4, 8), "weight": (8,), "row_scale": (4, 1)},
        {},
    ),
    "layer_norm": (
        lambda query, weight: fastattn.layer_norm(query, (4, 8), weight), {"query": (4, 3, 4, 8), "weight": (4, 8)}, {}
    ),
    "rms_norm": (lambda query: fastattn.rms_norm(query, (8,)), {"query": (4, 4, 8)}, {}),
}  # fmt: skip


def _placed(name: str, tensor: Tensor, mesh: DeviceMesh, dims: tuple[int | None, ...]) -> Any:
    """A leaf as a DTensor: four-dimensional tensors as told, others where they have an axis of the same name."""
    placements: list[Any] = []
    for dim in dims:
        own = None
        if name in ("query", "key", "value", "residual", "attn_mask") and dim is not None and tensor.dim() > 2:
            own = dim if tensor.shape[dim] % mesh.size() == 0 else None
        placements.append(Replicate() if own is None else Shard(own))
    return distribute_tensor(tensor.detach(), mesh, placements).requires_grad_(tensor.requires_grad)


def _run(function: Callable[..., Any], leaves: Leaves, others: Leaves) -> tuple[list[Any], Leaves]:
    found = function(**leaves, **others)
    results = list(found) if isinstance(found, tuple) else [found]
    loss: Any = 0
    for result in results:
        weight: Any = torch.linspace(-1, 1, result.numel()).view(result.shape)
        if isinstance(result, DTensor):
            weight = distribute_tensor(weight, result.device_mesh, [Replicate()] * result.device_mesh.ndim)
        loss = loss + (result.masked_fill(result == -float("inf"), 0) * weight).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return results, dict(zip(leaves, gradients))


def dtensors(group: dist.ProcessGroup) -> dict[str, Any]:
    """How far calls of DTensors are from those of plain tensors, by every placement; what was sent without need."""
    found: dict[str, Any] = {"apart": 0.0, "sent": [], "calls": 0}
    meshes = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    for name, (function, shapes, others) in CALLS.items():
        torch.manual_seed(sum(map(ord, name)))
        leaves = {leaf: _randn(*shape) for leaf, shape in shapes.items()}
        expected, gradients = _run(function, leaves, others)
        dims = range(min(3, leaves["query"].dim()))
        for mesh in meshes:
            for own in itertools.product((None, *dims[: 4 - mesh.ndim]), repeat=mesh.ndim):
                placed = {leaf: _placed(leaf, tensor, mesh, own) for leaf, tensor in leaves.items()}
                with CommDebugMode() as sent:
                    function(**placed, **others)
                results, found_gradients = _run(function, placed, others)
                pairs: list[tuple[Any, Tensor]] = list(zip(results, expected))
                pairs += [(found_gradients[leaf], gradients[leaf]) for leaf in leaves]
                for sharded, plain in pairs:
                    ours = sharded.full_tensor()
                    same = ours == plain
                    far = (ours - plain).abs().masked_fill(same, 0).max().item()
                    found["apart"] = max(found["apart"], far / max(1.0, plain.nan_to_num(neginf=0).abs().max().item()))
                # two axes of the residual stand behind three of the other tensor
                by_entries = all(dim in (None, 0, 1) for dim in own) and name != "add_rms_norm"
                if by_entries and sent.get_total_counts():
                    found["sent"].append(f"{name}, {own}: {sent.get_comm_counts()}")
                found["calls"] += 1
    return found


def _leaf(tensor: Tensor, mesh: DeviceMesh, placement: Any) -> Any:
    return distribute_tensor(tensor, mesh, [placement]).requires_grad_()


def dtensor_kinds(group: dist.ProcessGroup) -> dict[str, Any]:
    """Placements of results and gradients, dropout, a module, a graph, and what is refused."""
    mesh = init_device_mesh("cpu", (4,))
    found: dict[str, Any] = {}
    attend: Any = fastattn.attention
    torch.manual_seed(0)
    query, key, value = (_leaf(torch.randn(4, 4, 6, 8), mesh, Shard(0)) for _ in "123")
    output = attend(query, key, value)
    output.sum().backward()
    found["placements"] = [str(t.placements) for t in (output, query.grad)]
    by_heads = [t.detach().redistribute(mesh, [Shard(1)]) for t in (query, key, value)]
    found["by heads"] = str(attend(*by_heads).placements)

    ones = torch.ones(4, 4, 64, 8)
    alike = [distribute_tensor(ones, mesh, [Shard(0)]) for _ in "123"]
    dropped = attend(*alike, dropout_p=0.5).full_tensor()
    found["ranks drop alike"] = any(torch.equal(dropped[0], dropped[entry]) for entry in (1, 2, 3))
    behind = [torch.empty(1) for _ in range(4)]
    dist.all_gather(behind, torch.rand(1))
    found["generators are alike"] = len({number.item() for number in behind}) == 1

    torch.manual_seed(1)
    module: Any = fastattn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(4, 6, 16)
    expected = module(x, x, x)
    for name, parameter in list(module.named_parameters()):
        owner = module.get_submodule(name.rpartition(".")[0])
        sharded = distribute_tensor(parameter.detach(), mesh, [Replicate()])
        owner.register_parameter(name.rpartition(".")[2], torch.nn.Parameter(sharded))
    sharded = distribute_tensor(x, mesh, [Shard(0)])
    ours = module(sharded, sharded, sharded)
    found["module"] = max((a.full_tensor() - b).abs().max().item() for a, b in zip(ours, expected))

    compiled = torch.compile(_attention(is_causal=True), backend="aot_eager", fullgraph=True)
    own: Any = [t.detach().requires_grad_() for t in (query, key, value)]
    output = compiled(*own)
    (gradient,) = torch.autograd.grad(output.square().sum(), own[0])
    plain = [t.full_tensor().detach().requires_grad_() for t in own]
    whole = _attention(is_causal=True)(*plain)
    (expected_gradient,) = torch.autograd.grad(whole.square().sum(), plain[0])
    pairs = (output, whole), (gradient, expected_gradient)
    found["compiled"] = max((a.full_tensor() - b).abs().max().item() for a, b in pairs)

    other = init_device_mesh("cpu", (2, 2))
    refused: dict[str, Callable[[], Any]] = {
        "plain key": lambda: attend(query, key.full_tensor(), value),
        "plain input of a norm": lambda: fastattn.add_layer_norm(ones, key),
        "plain bias": lambda: attend(query, key, value, attn_mask=torch.zeros(6, 6, requires_grad=True)),
        "plain sinks": lambda: attend(query, key, value, sinks=torch.ones(4, requires_grad=True)),
        "score_mod": lambda: attend(query, key, value, score_mod=lambda score, *places: score * 2),
        "mesh": lambda: attend(query, key, distribute_tensor(torch.ones(4, 4, 6, 8), other, [Replicate()] * 2)),
    }
    found["refused"] = {}
    for name, call in refused.items():
        try:
            call()
            found["refused"][name] = "nothing"
        except (TypeError, ValueError, NotImplementedError) as error:
            found["refused"][name] = f"{type(error).__name__}: {error}"
    return found
