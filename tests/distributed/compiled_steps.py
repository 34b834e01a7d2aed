"""Under torchrun: how far the losses of compiled steps, without graph breaks, are from eager ones in one process.

It prints a line for each mesh, from the first rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from fastattn import distributed
from tests.distributed.parallel_tasks import apart, language_model, mean_over_data, mesh_of, of_this_rank, train


def main() -> None:
    """Train on the ranks that torchrun has started."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(7)
    batches = [(torch.randint(11, (4, 17)),) for _ in range(2)]
    expected = train(language_model(1), batches)
    for sizes in ({"tensor": 2}, {"data": 2, "tensor": 1}):
        mesh, model = mesh_of(sizes), language_model(1)
        if "data" in sizes:  # FSDP2's hooks are not compiled: what is between them is, layer by layer
            for layer in model.trunk.layers:
                layer.compile(backend="aot_eager", fullgraph=True)
        distributed.parallelize(model, mesh)
        if "data" not in sizes:
            model.compile(backend="aot_eager", fullgraph=True)
        ours = mean_over_data(train(model, of_this_rank(batches, mesh)), mesh)
        if dist.get_rank() == 0:
            print(f"{apart(ours, expected):.3g} {sizes}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
