"""What the ranks of the tests of state dicts do that go into one process and back, or come from one rank."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fastattn import distributed
from tests.distributed.parallel_tasks import FULL, language_model, losses_of, mesh_of, of_this_rank, said

_SIZES = {"data": 2, "tensor": 2}
_OF_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def _adam(model: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-4)


def _far(ours: Any, expected: Any) -> float:
    """The largest difference in what two optimizers keep."""
    assert ours["state"].keys() == expected["state"].keys()
    pairs = [(ours["state"][name], kept) for name, kept in expected["state"].items()]
    assert all(a[key].shape == b[key].shape for a, b in pairs for key in b), "shapes"
    return max((a[key] - b[key]).abs().max().item() for a, b in pairs for key in b)


def optimizer_states(group: dist.ProcessGroup) -> dict[str, Any]:
    """An optimizer's state from several ranks to one, and from the first rank to all: how far from one process."""
    torch.manual_seed(9)
    batches = [(torch.randint(11, (4, 17)),) for _ in range(4)]
    whole = language_model()
    of_whole: Any = _adam(whole)
    losses_of(whole, of_whole, batches[:2])
    state, trained = copy.deepcopy(get_optimizer_state_dict(whole, of_whole, options=FULL)), copy.deepcopy(whole)
    after = losses_of(whole, of_whole, batches[2:])

    mesh = mesh_of(_SIZES)
    model = distributed.parallelize(language_model(), mesh)
    optimizer = _adam(model)
    distributed.keep_torch_shapes(model, optimizer)
    losses_of(model, optimizer, of_this_rank(batches[:2], mesh))
    ours = get_optimizer_state_dict(model, optimizer, options=FULL)
    alone = language_model()
    of_alone = _adam(alone)
    set_model_state_dict(alone, get_model_state_dict(model, options=FULL))
    set_optimizer_state_dict(alone, of_alone, copy.deepcopy(ours))
    found: dict[str, Any] = {
        "trained": _far(ours, state),
        "in one process": max(abs(a - b) for a, b in zip(losses_of(alone, of_alone, batches[2:]), after)),
    }
    other: Any = distributed.parallelize(trained, mesh)
    for how, options, is_given in (("each", FULL, True), ("first", _OF_FIRST, group.rank() == 0)):
        optimizer = _adam(other)
        distributed.keep_torch_shapes(other, optimizer)
        set_optimizer_state_dict(other, optimizer, copy.deepcopy(state) if is_given else {}, options=options)
        found[f"from {how}"] = _far(get_optimizer_state_dict(other, optimizer, options=FULL), state)
    found["no model"] = said(lambda: distributed.keep_torch_shapes(of_whole, of_whole))
    found["no optimizer"] = said(lambda: distributed.keep_torch_shapes(other, other))
    return found


def broadcast(group: dist.ProcessGroup) -> dict[str, Any]:
    """Where one rank alone has the state dict torch asks no hook for the shape of a parameter: that rank has to."""
    expected = language_model().state_dict()
    model = distributed.parallelize(language_model(), mesh_of(_SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()

    def give(state: dict[str, Any]) -> None:
        set_model_state_dict(model, state if group.rank() == 0 else {}, options=_OF_FIRST)

    found: dict[str, Any] = {"as torch has it": said(lambda: give(dict(expected)))}
    give({k: v.unflatten(0, (3, -1)) if k.endswith("in_proj_weight") else v for k, v in expected.items()})
    ours: dict[str, Any] = get_model_state_dict(model, options=FULL)
    return found | {"as three": all(torch.equal(ours[name], value) for name, value in expected.items())}
