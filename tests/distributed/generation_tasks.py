"""What the ranks of the tests of ``generate`` do: each compares what its part of a model says with a whole one."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method

from fastattn import distributed
from fastattn.models import TransformerConfig, TransformerEncoderDecoder
from tests.distributed.parallel_tasks import language_model, mesh_of, of_this_rank, said

# Sizes of a mesh, and how tokens are shared out.
_MESHES: dict[str, tuple[dict[str, int], Any]] = {
    "tensor": ({"tensor": 4}, "none"),
    "data": ({"data": 4}, "none"),
    "tensor x context": ({"context": 2, "tensor": 2}, "stripe"),
    "context x data": ({"data": 2, "context": 2}, "zigzag"),
    "all three": ({"data": 2, "context": 1, "tensor": 2}, "zigzag"),
}
_LONGER = 6  # tokens behind the prompt
_WORDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "until the end": {"end": 3},
    "beam": {"beam": 3, "end": 3},
    "pages": {"beam": 2, "page_size": 4},
    "drawn": {"temperature": 1.0},
}


def _sharpened(model: Any) -> Any:
    """With larger weights, so that logits are far apart, and rounding says no other token."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def _share(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    return of_this_rank([(tensor,)], mesh)[0][0]


def generation(group: dist.ProcessGroup) -> dict[str, bool]:
    """Whether the ranks of each mesh say what one process says, for its prompts, and train behind it."""
    torch.manual_seed(7)
    prompt = torch.randint(11, (4, 7))  # on no mesh can 7 tokens be shared out evenly
    source, padding = torch.randint(9, (4, 8)), torch.arange(8) >= torch.tensor([[8], [5], [3], [8]])
    whole = _sharpened(language_model())
    config = TransformerConfig(width=16, heads=4, layers=1, feed_forward=32, max_length=16, norm_first=True)
    readers = _sharpened(TransformerEncoderDecoder(9, 7, config))
    found = {}
    for name, (sizes, balance) in _MESHES.items():
        mesh = mesh_of(sizes)
        model = distributed.parallelize(copy.deepcopy(whole), mesh, balance=balance)
        for kind, words in _WORDS.items():
            if (kind == "pages" and "context" in sizes) or (kind == "drawn" and "data" in sizes):
                continue
            torch.manual_seed(8)  # also of the draws
            expected = whole.generate(prompt, _LONGER, **words)
            torch.manual_seed(8 + group.rank())  # the ranks take what the first of them draws
            ours = model.generate(_share(prompt, mesh), _LONGER, **words)
            found[f"{name}, {kind}"] = torch.equal(ours, _share(expected, mesh))
        reader = distributed.parallelize(copy.deepcopy(readers), mesh, balance=balance)
        expected = readers.generate(source, 6, start=0, source_padding=padding, beam=2)
        ours = reader.generate(_share(source, mesh), 6, start=0, source_padding=_share(padding, mesh), beam=2)
        found[f"{name}, reads a source"] = torch.equal(ours, _share(expected, mesh))
        model.loss(_share(torch.cat((prompt, prompt, prompt[:, :3]), dim=1), mesh)).backward()
        found[f"{name}, trains"] = all(p.grad is not None for p in model.parameters())
    return found


class _Wrapped(nn.Module):
    """A model around one of ours, which then is not what ``parallelize`` is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _sharpened(language_model())

    def say(self, prompt: torch.Tensor) -> torch.Tensor:
        return self.inner.generate(prompt, 4)


def generation_further(group: dist.ProcessGroup) -> dict[str, Any]:
    """What caches hold, other dtypes, models around a model, and what is said of calls that do not go together."""
    mesh = mesh_of({"data": 1, "context": 2, "tensor": 2})
    prompt = torch.arange(12).view(2, 6) % 11
    expected, alone = _Wrapped().say(prompt), _sharpened(language_model())
    model = distributed.parallelize(copy.deepcopy(alone), mesh)
    found: dict[str, Any] = {}

    made: list[Any] = []
    new_cache = model.trunk.new_cache
    model.trunk.__dict__["new_cache"] = lambda *a, **w: made.append(new_cache(*a, **w)) or made[-1]
    found["tokens"] = torch.equal(model.generate(prompt, 4), expected)
    del model.trunk.__dict__["new_cache"]
    # [layers, batch, heads, slots, head_dim]: 9 positions, of which each of two ranks has about a half
    found["cache"] = [*made[0].kv.key_cache.shape], made[0].length, made[0].kv.lengths_on_host
    found["pages"] = said(lambda: model.generate(prompt, 4, page_size=4))
    found["another prompt"] = said(lambda: model.generate(prompt + mesh.get_local_rank("tensor"), 4))

    expected_trunk = language_model().trunk  # its results are about 1
    trunk = distributed.parallelize(copy.deepcopy(expected_trunk), mesh, balance="zigzag")
    cache = trunk.new_cache(2, max_length=9)
    tokens = torch.cat((prompt, prompt[:, :3]), dim=1)
    parts = [trunk.step(tokens[:, first:last], cache) for first, last in ((0, 5), (5, 8), (8, 8), (8, 9))]
    found["steps"] = (torch.cat(parts, dim=1) - expected_trunk(tokens)).abs().max().item()
    found["full"] = said(lambda: trunk.step(tokens[:, :1], cache))

    bfloat16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    of_all = mesh_of({"data": 4})
    mixed = distributed.parallelize(copy.deepcopy(alone), of_all, fsdp={"mp_policy": bfloat16})
    rows = prompt.repeat(2, 1)[group.rank() :][:1]
    found["bfloat16"] = torch.equal(mixed.generate(rows, 4), copy.deepcopy(alone).bfloat16().generate(rows, 4))
    found["another length"] = said(lambda: mixed.generate(rows, 4 + group.rank()))

    wrapped: Any = distributed.parallelize(_Wrapped(), of_all, fsdp={"reshard_after_forward": False})
    found["not gathered"] = said(lambda: wrapped.say(rows))
    register_fsdp_forward_method(wrapped, "say")
    found["wrapped"] = torch.equal(wrapped.say(rows), alone.generate(rows, 4))
    return found
