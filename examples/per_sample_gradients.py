"""The gradient of every sample of a batch at once, as differential privacy and data selection need it.

``torch.func.vmap`` of ``torch.func.grad`` goes through a whole transformer of this package, attention, norms and all.
The gradients are those of a loop that takes one sample after the other; their norms tell which samples a model has yet
to learn, and clipped one by one and summed they are a step of DP-SGD (arXiv:1607.00133). Expect differences at the
level of rounding, and wrong labels where the norms are largest, once the model has learned from right ones.

    python examples/per_sample_gradients.py               # some seconds
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

from fastattn.models import TransformerClassifier, TransformerConfig, TransformerTrunk

LETTERS, LENGTH = 12, 10


def sentences(count: int) -> tuple[Tensor, Tensor]:
    """Sequences ``[N, L]`` of letters, and whether letter 0 occurs before letter 1, ``[N]``; both occur once."""
    tokens = torch.randint(2, LETTERS, (count, LENGTH))
    places = torch.rand(count, LENGTH).argsort(1)[:, :2]
    tokens.scatter_(1, places, torch.tensor([0, 1]).expand(count, 2))
    return tokens, (places[:, 0] < places[:, 1]).long()


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, mislabel, look at the norms; returns the difference to a loop and what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    config = TransformerConfig(width=32, heads=4, layers=2, max_length=LENGTH, norm_first=True, activation="gelu")
    model = TransformerClassifier(TransformerTrunk(LETTERS, config), classes=2)
    steps = 120 if options.quick else 600
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        tokens, labels = sentences(64)
        loss = F.cross_entropy(model(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (steps // 4) == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    tokens, labels = sentences(64)
    wrong = torch.zeros(64, dtype=torch.bool)
    wrong[torch.randperm(64)[:6]] = True
    labels = torch.where(wrong, 1 - labels, labels)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss_of_one(parameters: dict[str, Tensor], tokens: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (tokens[None],)), label[None])

    at_once = vmap(grad(loss_of_one), in_dims=(None, 0, 0))(parameters, tokens, labels)
    one_by_one = [grad(loss_of_one)(parameters, *sample) for sample in zip(tokens, labels)]
    largest = max(gradient.abs().max().item() for gradient in at_once.values())
    difference = max(
        (at_once[name][i] - gradient).abs().max().item() / largest
        for i, of_one in enumerate(one_by_one)
        for name, gradient in of_one.items()
    )
    print(f"vmap and a loop differ by {difference:.1e} of the largest gradient")

    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in at_once.values()]).norm(dim=0)
    suspected = norms.topk(6).indices
    found = wrong[suspected].double().mean().item()
    print(f"median norm of a gradient: {norms.median():.3g}; of those with a wrong label: {norms[wrong].median():.3g}")
    print(f"{found:.0%} of the 6 samples with the largest gradients are those whose labels are wrong")

    clip = norms.median()
    factors = (clip / norms).clamp_max(1.0)
    clipped = {name: torch.einsum("n,n...->...", factors, gradient) for name, gradient in at_once.items()}
    total = torch.stack([gradient.norm() for gradient in clipped.values()]).norm().item()
    print(f"clipped to {clip:.3g} each and summed: norm {total:.3g}, at most {clip * 64:.3g}; now add noise, and step")
    return {"difference": difference, "found": found, "clipped": total / (64 * clip.item())}


if __name__ == "__main__":
    main()
