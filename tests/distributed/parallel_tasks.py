"""What the ranks of the tests of ``parallelize`` do: each compares its part of a parallel model with a whole one."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import fastattn
from fastattn import distributed
from fastattn.models import TransformerConfig, TransformerEncoderDecoder, TransformerLanguageModel

Batches = Sequence[tuple[Tensor, ...]]  # each the arguments of a loss

STEPS = 20
FULL = StateDictOptions(full_state_dict=True)
MESHES: dict[str, dict[str, int]] = {
    "tensor x data": {"data": 2, "tensor": 2},
    "tensor x context": {"context": 2, "tensor": 2},
    "context x data": {"data": 2, "context": 2},
}
# FSDP2 replicates along the first dimension and shards along the second.
_ALL_THREE = {"all three": {"data": 2, "context": 1, "tensor": 2}}


def mesh_of(sizes: dict[str, int]) -> DeviceMesh:
    """The ranks of all processes, by the names of the dimensions."""
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def language_model(layers: int = 2) -> TransformerLanguageModel:
    """The same on every rank."""
    torch.manual_seed(0)
    config = TransformerConfig(width=16, heads=4, layers=layers, feed_forward=32, max_length=32)
    return TransformerLanguageModel(11, config)


def train(model: Any, batches: Batches) -> list[float]:
    """The losses of a training by Adam, with clipped gradients."""
    # eps: the keys' biases have no gradient but rounding, which Adam would make as large as any
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-4, foreach=True)
    return losses_of(model, optimizer, batches)


def losses_of(model: Any, optimizer: torch.optim.Optimizer, batches: Batches) -> list[float]:
    """The loss of each step, in front of it."""
    losses = []
    for batch in batches:
        loss = model.loss(*batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        losses.append(loss.item())
    return losses


def of_this_rank(batches: Batches, mesh: DeviceMesh) -> Batches:
    """A rank's share of every batch."""
    if "data" not in (mesh.mesh_dim_names or ()):
        return batches
    data = mesh["data"]
    return [tuple(t.chunk(data.size())[data.get_local_rank()] for t in batch) for batch in batches]


def mean_over_data(losses: list[float], mesh: DeviceMesh) -> list[float]:
    """The losses of the whole batch, of those of its shares."""
    if "data" not in (mesh.mesh_dim_names or ()):
        return losses
    total = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(total, group=mesh["data"].get_group())
    return (total / mesh["data"].size()).tolist()


def apart(ours: list[float], expected: list[float]) -> float:
    """The largest difference of two losses, relative to what was expected."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, expected))


def training(group: dist.ProcessGroup) -> dict[str, Any]:
    """For each mesh, how far losses and trained weights are from one process."""
    torch.manual_seed(1)
    batches = [(torch.randint(11, (4, 17)),) for _ in range(STEPS)]
    whole, found = language_model(), {}
    models = {name: distributed.parallelize(copy.deepcopy(whole), mesh_of(sizes)) for name, sizes in MESHES.items()}
    expected = train(whole, batches)
    for name, model in models.items():
        mesh = mesh_of(MESHES[name])
        ours = mean_over_data(train(model, of_this_rank(batches, mesh)), mesh)
        state = get_model_state_dict(model, options=FULL)
        found[name] = {
            "losses": apart(ours, expected),
            "weights": max((state[key] - value).abs().max().item() for key, value in whole.state_dict().items()),
            "learned": expected[0] - expected[-1],
            "all DTensors": all(isinstance(parameter, DTensor) for parameter in model.parameters()),
        }
    return found


# ------------------------------------------------------------------------------------------------ attention and layers

# Arguments of the module; of a call, of the whole sequence. Masks: True = not allowed.
ATTENTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "no weights": ({}, {"need_weights": False}),
    "weights of heads": ({"bias": False}, {"average_attn_weights": False}),
    "appended keys": ({"add_bias_kv": True, "add_zero_attn": True}, {}),
    "three weights": ({"kdim": 6, "vdim": 10}, {}),
    "mask": ({}, {"attn_mask": torch.ones(6, 6, dtype=torch.bool).triu(1), "need_weights": False}),
    "causal": ({}, {"attn_mask": torch.ones(6, 6, dtype=torch.bool).triu(1), "is_causal": True, "need_weights": False}),
    "mask of heads": ({}, {"attn_mask": torch.linspace(-3, 3, 12 * 36).sin().view(12, 6, 6)}),
    "mask of entries": ({"batch_first": False}, {"attn_mask": torch.linspace(-3, 3, 3 * 36).sin().view(3, 6, 6)}),
    "padding": ({}, {"key_padding_mask": torch.arange(6) >= torch.tensor([[6], [4], [1]]), "need_weights": False}),
}


def _seams(module: nn.Module, inputs: list[Tensor], words: dict[str, Any]) -> dict[str, Tensor]:
    """Results and the gradients of everything, of a loss that weighs them."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    output, weights = module(leaves[0], *(leaves * 3)[1:3] if len(leaves) == 3 else leaves * 2, **words)
    results = {"output": output} if weights is None else {"output": output, "weights": weights}
    losses = [(r * torch.linspace(-1, 1, r.numel()).view(r.shape)).sum() for r in results.values()]
    torch.stack(losses).sum().backward()
    found = {name: result.detach() for name, result in results.items()}
    found |= {f"input {i}": leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}
    for name, parameter in module.named_parameters():
        gradient: Any = parameter.grad
        gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        found[name] = gradient.flatten(0, 1) if gradient.dim() == 3 and gradient.shape[0] == 3 else gradient
    return found


def attention(group: dist.ProcessGroup) -> dict[str, float]:
    """How far results and gradients of a module with shared heads are from those of a whole one."""
    mesh = mesh_of({"data": 2, "tensor": 2})["tensor"]
    found = {}
    for name, (of_module, words) in ATTENTIONS.items():
        torch.manual_seed(2)
        arguments: dict[str, Any] = {"batch_first": True, **of_module}
        module = fastattn.MultiheadAttention(8, 4, **arguments)
        widths = (8, 6, 10) if "kdim" in of_module else (8,)
        shape = (3, 6) if module.batch_first else (6, 3)
        inputs = [torch.randn(*shape, width) for width in widths]
        whole = _seams(copy.deepcopy(module), inputs, words)
        ours = _seams(distributed.parallelize(module, mesh), inputs, words)
        assert ours.keys() == whole.keys(), (ours.keys(), whole.keys())
        found[name] = max((ours[key] - value).abs().max().item() for key, value in whole.items())
    return found


# Arguments of a call of self-attention: of this rank's rows where they have any.
CONTEXTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"attn_mask": torch.ones(8, 8, dtype=torch.bool).triu(2)},
    "bias of heads": {"attn_mask": torch.linspace(-3, 3, 12 * 64).sin().view(12, 8, 8)},
    "causal, padded": {
        "attn_mask": torch.ones(8, 8, dtype=torch.bool).triu(1),
        "is_causal": True,
        "key_padding_mask": torch.arange(8) >= torch.tensor([[8], [6], [3]]),
    },
}


def context(group: dist.ProcessGroup) -> dict[str, float]:
    """How far this rank's rows of a module with shared heads and shared sequences are from those of a whole one."""
    mesh = mesh_of({"context": 2, "tensor": 2})
    found = {}
    for name, given in CONTEXTS.items():
        torch.manual_seed(3)
        module = fastattn.MultiheadAttention(8, 4, batch_first=True)
        x = torch.randn(3, 8, 8)
        words: dict[str, Any] = {"need_weights": False, **given}
        whole = distributed.shard(module(x, x, x, **words)[0], 1, mesh["context"], balance="zigzag")
        for key, dim in (("attn_mask", -2), ("key_padding_mask", 1)):
            if key in words:
                words[key] = distributed.shard(words[key], dim, mesh["context"], balance="zigzag")
        distributed.parallelize(module, mesh, balance="zigzag")
        own = distributed.shard(x, 1, mesh["context"], balance="zigzag")
        ours = module(own, own, own, **words)[0]
        found[name] = (ours - whole).abs().max().item()
    return found


def sequence_to_sequence(group: dist.ProcessGroup) -> dict[str, float]:
    """How far the losses of padded batches are from one process, of an encoder with a decoder."""
    torch.manual_seed(4)
    padding = torch.arange(8) >= torch.tensor([[8], [5], [3], [8]])
    batches = [(torch.randint(9, (4, 8)), torch.randint(7, (4, 9)), padding) for _ in range(2)]
    config = TransformerConfig(width=8, heads=4, layers=1, feed_forward=16, max_length=16)
    whole = TransformerEncoderDecoder(9, 7, config)
    found = {}
    for name, balance in (("tensor x context", "zigzag"), ("context x data", "stripe"), ("all three", "none")):
        mesh = mesh_of({**MESHES, **_ALL_THREE}[name])
        model = distributed.parallelize(copy.deepcopy(whole), mesh, balance=balance)
        ours = mean_over_data(train(model, of_this_rank(batches, mesh)), mesh)
        found[name] = apart(ours, train(copy.deepcopy(whole), batches))
    return found


def fused_layers(group: dist.ProcessGroup) -> dict[str, float]:
    """How far torch's encoder, fused and shared out, is from itself, in training and in inference."""
    torch.manual_seed(5)
    layer = nn.TransformerEncoderLayer(8, 4, 16, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)
    x = torch.randn(4, 6, 8)
    expected = model(x)
    fastattn.fuse(model)
    mesh = mesh_of({"data": 2, "tensor": 2})
    distributed.parallelize(model, mesh, fsdp={"reshard_after_forward": False})
    (own,) = of_this_rank([(x,)], mesh)[0]
    (rows,) = of_this_rank([(expected,)], mesh)[0]
    found = {"training": (model(own) - rows).abs().max().item()}
    model.eval()
    with torch.no_grad():
        found["inference"] = (model(own) - rows).abs().max().item()
    return found


# -------------------------------------------------------------------------------------------- state dicts, checkpoints


def _equal(ours: dict[str, Any], expected: dict[str, Tensor]) -> bool:
    return list(ours) == list(expected) and all(torch.equal(ours[name], value) for name, value in expected.items())


# Arguments of modules with other parameters than most have.
_MODULES: dict[str, dict[str, Any]] = {
    "three weights": {"kdim": 6, "vdim": 10},
    "appended keys": {"add_bias_kv": True, "bias": False},
}


def state_dicts(group: dist.ProcessGroup) -> dict[str, bool]:
    """Whether full state dicts go into parallel models and come out as they were."""
    found = {}
    for name, sizes in {**MESHES, **_ALL_THREE}.items():
        whole = language_model()
        names = [key for key, _ in whole.named_parameters()]
        model = distributed.parallelize(copy.deepcopy(whole), mesh_of(sizes))
        with torch.no_grad():
            for parameter in whole.parameters():
                parameter.add_(torch.arange(parameter.numel()).view(parameter.shape) / 100)
        set_model_state_dict(model, whole.state_dict(), options=FULL)
        found[name] = _equal(get_model_state_dict(model, options=FULL), whole.state_dict())
        found[f"{name}, names"] = names == [key for key, _ in model.named_parameters()]
    for name, words in _MODULES.items():
        module = fastattn.MultiheadAttention(8, 4, **words)
        expected = fastattn.MultiheadAttention(8, 4, **words).state_dict()
        distributed.parallelize(module, mesh_of({"data": 2, "tensor": 2}))
        set_model_state_dict(module, dict(expected), options=FULL)
        found[name] = _equal(get_model_state_dict(module, options=FULL), expected)
    return found


def _same_folder() -> str:
    """A new folder, on all ranks."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, src=0)
    return folder[0]


def states_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint holds."""
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))


def checkpoints(group: dist.ProcessGroup) -> dict[str, Any]:
    """What becomes of a checkpoint of four ranks on two of them, with the optimizer's state, and on one."""
    torch.manual_seed(6)
    batches = [(torch.randint(11, (4, 17)),) for _ in range(4)]
    mesh, of_two = mesh_of({"data": 2, "tensor": 2}), DeviceMesh("cpu", [0, 1], mesh_dim_names=("tensor",))
    whole = language_model()
    model = distributed.parallelize(copy.deepcopy(whole), mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    of_whole = torch.optim.SGD(whole.parameters(), lr=0.1, momentum=0.9)
    losses_of(whole, of_whole, batches[:2])
    losses_of(model, optimizer, of_this_rank(batches[:2], mesh))
    folder, found = _same_folder(), {}
    dcp.save(states_of(model, optimizer), checkpoint_id=folder)
    if group.rank() == 0:
        alone = language_model()
        dcp.load({"model": alone.state_dict()}, checkpoint_id=folder, no_dist=True)
        pairs = zip(alone.state_dict().values(), whole.state_dict().values())
        found["one"] = max((a - b).abs().max().item() for a, b in pairs)
    if group.rank() in (0, 1):
        smaller = distributed.parallelize(language_model(), of_two)
        other = torch.optim.SGD(smaller.parameters(), lr=0.1, momentum=0.9)
        states = states_of(smaller, other)
        dcp.load(states, checkpoint_id=folder, process_group=of_two.get_group())
        set_state_dict(smaller, other, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
        found["two"] = losses_of(smaller, other, batches[2:])
    dist.barrier()
    if group.rank() == 0:
        shutil.rmtree(folder)
    return found | {"expected": losses_of(whole, of_whole, batches[2:])}


# ------------------------------------------------------------------------------------------------------- refusals


def said(function: Callable[[], Any]) -> str:
    try:
        function()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class _Odd(nn.Linear):
    """A module that ``parallelize`` does not know."""


def _tied() -> nn.Module:
    first, second = (fastattn.TransformerEncoderLayer(8, 4, 16) for _ in range(2))
    second.linear1.weight = first.linear1.weight
    return nn.Sequential(first, second)


def refusals(group: dist.ProcessGroup) -> dict[str, str]:
    """What is said of models and meshes that do not go together; nothing of a model may have changed then."""
    mesh = mesh_of({"data": 2, "tensor": 2})
    of_all = mesh_of({"tensor": 4})
    context = mesh_of({"context": 2, "tensor": 2})

    def layer(width: int = 8, heads: int = 4, hidden: int = 16) -> nn.Module:
        return fastattn.TransformerEncoderLayer(width, heads, hidden)

    found = {}
    odd = layer()
    odd.linear1 = _Odd(8, 16)
    cases: list[tuple[str, Any, Any, dict[str, Any]]] = [
        ("mesh's type", layer(), group, {}),
        ("mesh's names", layer(), mesh_of({"dp": 2, "tp": 2}), {}),
        ("mesh's order", layer(), mesh_of({"tensor": 2, "data": 2}), {}),
        ("model's type", "model", mesh, {}),
        ("heads", layer(12, 6, 24), of_all, {}),
        ("hidden units", layer(8, 4, 18), of_all, {}),
        ("width", layer(6, 2, 16), mesh, {}),
        ("torch's layer", nn.TransformerEncoderLayer(8, 4, 16), mesh, {}),
        ("torch's attention", nn.MultiheadAttention(8, 4), mesh, {}),
        ("unknown", nn.Sequential(layer(), _Odd(8, 8)), mesh, {}),
        ("unknown, with a context", nn.Sequential(layer(), nn.Conv1d(8, 8, 1)), context, {}),
        ("tied", _tied(), mesh, {}),
        ("appended keys", fastattn.MultiheadAttention(8, 4, add_bias_kv=True), context, {}),
        ("method", layer(), mesh, {"method": "2d"}),
        ("balance", layer(), mesh, {"balance": "even"}),
        ("words of FSDP2", layer(), mesh, {"fsdp": {"mesh": mesh}}),
        ("another linear layer", odd, mesh, {}),
        ("twice", distributed.parallelize(layer(), mesh), mesh, {}),
    ]
    for name, model, on, words in cases:
        before = [*map(type, model.modules())] if isinstance(model, nn.Module) else []
        found[name] = said(lambda: distributed.parallelize(model, on, **words))  # noqa: B023
        if before and before != [*map(type, model.modules())]:
            found[name] = "changed the model"
    model = distributed.parallelize(language_model(), context)
    tokens = torch.zeros(2, 9, dtype=torch.int64)
    attention: Any = model.trunk.layers[0].get_submodule("self_attn")
    x = torch.zeros(2, 4, 16)
    found["odd length"] = said(lambda: model(tokens))
    found["weights"] = said(lambda: attention(x, x, x))
    found["floating padding"] = said(lambda: attention(x, x, x, torch.zeros(2, 4), need_weights=False))
    return found
