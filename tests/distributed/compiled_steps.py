"""Under torchrun: how far compiled steps and calls, without graph breaks, are from eager ones in one process.

It prints a line for each, from the first rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fastattn import distributed
from tests.distributed import cases
from tests.distributed.parallel_tasks import apart, language_model, mean_over_data, mesh_of, of_this_rank, train

# Compiled by themselves: masks of every kind, by methods that keep all inputs for the backward and by others.
CALLS = (
    ("everything", "ring", "zigzag"),
    ("documents-pair", "ulysses", "zigzag"),
    ("bias-by-columns", "ulysses", "none"),
    ("bias-of-keys-by-columns", "ring", "stripe"),
    ("dropout-by-seed", "allgather", "none"),
    ("dropout-by-seed", "ulysses", "none"),
)


def main() -> None:
    """Train on the ranks that torchrun has started."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {f"steps on {sizes}": far for sizes, far in steps()}
    found |= {f"call {' '.join(call)}": far for call, far in calls()}
    found |= {"without gradients": without_gradients(), "shares": shares(), "disagreement": disagreement()}
    if dist.get_rank() == 0:
        print("\n".join(f"{far:.3g} {what}" for what, far in found.items()))
    dist.destroy_process_group()


def steps() -> Any:
    """For each mesh how far the losses are."""
    torch.manual_seed(7)
    batches = [(torch.randint(11, (4, 17)),) for _ in range(2)]
    expected = train(language_model(1), batches)
    for sizes in ({"tensor": 2}, {"data": 2, "tensor": 1}, {"context": 2}):
        mesh, model = mesh_of(sizes), language_model(1)
        if "tensor" not in sizes or "data" in sizes:  # FSDP2's hooks are not compiled: what is between them is
            for layer in model.trunk.layers:
                layer.compile(backend="aot_eager", fullgraph=True)
        distributed.parallelize(model, mesh)
        if sizes == {"tensor": 2}:
            model.compile(backend="aot_eager", fullgraph=True)
        ours = mean_over_data(train(model, of_this_rank(batches, mesh)), mesh)
        yield sizes, apart(ours, expected)


def calls() -> Any:
    """For each call how far results and gradients are."""
    group = dist.group.WORLD
    assert group is not None
    for call in CALLS:
        compiled = torch.compile(cases.attend_on_shards, backend="aot_eager", fullgraph=True)
        yield call, cases.distance(*cases.both(*call, group, attend=compiled))[0]


def without_gradients() -> float:
    """How far a call is from which nothing is kept for a backward."""
    torch.manual_seed(3)
    whole = [torch.randn(1, 2, 8, 4) for _ in range(3)]
    group = dist.group.WORLD
    assert group is not None
    own = [distributed.shard(t, 2, group) for t in whole]
    words: Any = {"method": "ulysses", "is_causal": True, "backend": "torch"}
    eager = cases.attend_on_shards(*own, group, **words)
    compiled = torch.compile(cases.attend_on_shards, backend="aot_eager", fullgraph=True)(*own, group, **words)
    return (compiled - eager).abs().max().item()


def shares() -> float:
    """How far a sequence is that was shared out and put together again in a graph, and its gradient."""
    mesh = mesh_of({"context": 2})

    def there_and_back(whole: torch.Tensor) -> torch.Tensor:
        own = distributed.shard(whole, 1, mesh, balance="zigzag")
        own = own * distributed.position_ids(whole.shape[1], mesh, balance="zigzag")[:, None]
        return distributed.unshard(own, 1, mesh, balance="zigzag")

    whole = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    output = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)(whole)
    (gradient,) = torch.autograd.grad(output.sum(), whole)
    dist.all_reduce(gradient)
    positions = torch.arange(8.0)[:, None].expand(2, 8, 3)
    return max((output - whole * positions).abs().max().item(), (gradient - 2 * positions).abs().max().item())


def disagreement() -> float:
    """0 where both ranks are told by a compiled call that they differ."""
    query = torch.randn(1, 2, 4, 8)
    scale = 0.5 + dist.get_rank()

    def attend() -> Any:
        return cases.attend_on_shards(query, query, query, dist.group.WORLD, scale=scale, backend="torch")

    try:
        torch.compile(attend, backend="aot_eager", fullgraph=True)()
    except distributed.RanksDisagreeError as error:
        return 0.0 if "scale: rank 1 has 1.5" in str(error) else 1.0
    return 2.0


if __name__ == "__main__":
    main()
