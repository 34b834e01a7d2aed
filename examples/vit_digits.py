"""A vision transformer on handwritten digits, and what it looks at.

Scikit-learn's digits are images of 8 x 8 pixels. Each is cut into patches of 2 x 2, a patch becomes a vector, and a
learned vector for the class stands in front of them (arXiv:2010.11929). Three encoder layers of this package mix them,
and the class vector that comes out names the digit. Expect about 97 % of the digits held out to be named rightly (a
guess has 10 %), and a picture of the class vector's weights over the image: some heads follow the strokes, others the
empty ground beside them.

    python examples/vit_digits.py --quick
    python examples/vit_digits.py --out digits.png        # half a minute
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastattn

SIDE, PATCH = 8, 2
GRID = SIDE // PATCH


class VisionTransformer(nn.Module):
    """Images ``[B, 1, 8, 8]`` to the logits ``[B, 10]`` of their classes."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, PATCH, stride=PATCH)
        self.of_class = nn.Parameter(torch.randn(width) * 0.02)
        self.positions = fastattn.LearnedPositionalEncoding(1 + GRID * GRID, width)
        self.layers = nn.ModuleList(
            fastattn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = fastattn.AddLayerNorm(width)
        self.head = nn.Linear(width, 10)

    def embed(self, images: Tensor) -> Tensor:
        """Vectors ``[B, 1 + patches, width]``, that of the class first."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        return self.positions(torch.cat((self.of_class.expand(len(images), 1, -1), patches), dim=1))

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        x = self.embed(images)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, 0]))

    @torch.no_grad()
    def weights(self, images: Tensor) -> list[Tensor]:
        """For each layer ``[B, H, 1, patches]``: how the class vector weights the patches."""
        x, found = self.embed(images), []
        layers: Any = self.layers
        for layer in layers:
            normed = layer.norm1(x)
            weights = layer.self_attn(normed, normed, normed, average_attn_weights=False)[1]
            found.append(weights[:, :, :1, 1:])
            x = layer(x)
        return found


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, ask and draw; returns the accuracy and the losses of the first and last steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--out", metavar="FILE", help="write the picture of the weights there")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    pixels, classes = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, SIDE, SIDE) / 16
    labels = torch.from_numpy(classes)
    held_out = torch.arange(len(labels)) % 4 == 0
    train, asked = (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])

    steps = 200 if options.quick else 1500
    model = VisionTransformer(width=48, heads=4, layers=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    losses = []
    for step in range(1, steps + 1):
        chosen = torch.randint(len(train[1]), (64,))
        loss = F.cross_entropy(model(train[0][chosen]), train[1][chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % (steps // 5) == 0:
            print(f"step {step}: loss {sum(losses[-20:]) / 20:.3f}")

    model.eval()
    with torch.no_grad():
        accuracy = (model(asked[0]).argmax(1) == asked[1]).double().mean().item()
    print(f"{accuracy:.1%} of {len(asked[1])} digits that it has not seen are named rightly")
    if options.out:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 6.5), layout="constrained")
        figure.suptitle("How the class vector weights the patches: four heads of the last layer", x=0.01, ha="left")
        shown = [int((asked[1] == digit).nonzero()[0]) for digit in range(10)]
        weights = model.weights(asked[0][shown])[-1]
        parts: Any = figure.subfigures(5, 2)
        for part, one, i in zip(parts.flat, weights, shown):
            image = 1 - asked[0][i]  # ink is black
            fastattn.plot_attention(one, image=image, grid=(GRID, GRID), figure=part)
        figure.savefig(options.out)
        print(f"written: {options.out}")
    return {"accuracy": accuracy, "first": losses[0], "last": sum(losses[-20:]) / 20}


if __name__ == "__main__":
    main()
