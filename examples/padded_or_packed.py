"""The same encoder on the same sentences, once padded and once packed: same results, without the work on padding.

Sentences differ in length. A padded batch computes every position of the longest one for all of them; a packed one
(``fastattn.pack``: a jagged nested tensor) holds no padding, and the layers of this package take it as it is, in
training too. Expect outputs and gradients that differ by rounding alone, and, where two thirds are padding, half the
time; a batch as small as that of ``--quick`` gains nothing, since packing has a cost of its own.

    python examples/padded_or_packed.py                   # half a minute
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import fastattn


class Encoder(nn.Module):
    """Layers of this package one behind the other; takes padded batches and packed ones."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            fastattn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True)
            for _ in range(layers)
        )

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """``[N, L, E]`` with its padding, or jagged ``[N, j, E]``; a tensor like ``x``."""
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return x


def milliseconds(step: Callable[[], object], repeats: int) -> float:
    """The median time of a call, after one that is not counted."""
    step()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Compare and time; returns the differences, the share of padding and the two times in ms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller encoder")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    batch, longest, width, layers = (8, 48, 64, 2) if options.quick else (32, 256, 256, 2)
    lengths = (longest * torch.rand(batch) ** 2).long().clamp_min(1)  # many short ones, some long ones
    lengths[0] = longest
    padding = torch.arange(longest) >= lengths[:, None]  # True = padding
    x, target = torch.randn(2, batch, longest, width)
    encoder = Encoder(width, 4, layers)
    share = padding.double().mean().item()
    print(f"{batch} sentences of {int(lengths.min())} to {longest} tokens: {share:.0%} of the padded batch is padding")

    def padded() -> Tensor:
        return encoder(x, padding).masked_fill(padding[..., None], 0.0)

    def packed() -> Tensor:
        return fastattn.unpack(encoder(fastattn.pack(x, padding)), padding)

    def step(forward: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """A step of training as far as its gradients."""
        output = forward()
        return output, list(torch.autograd.grad((output * target).mean(), list(encoder.parameters())))

    (one, of_one), (other, of_other) = step(padded), step(packed)
    outputs = (one - other).abs().max().item()
    gradients = max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(of_one, of_other))
    print(f"outputs differ by {outputs:.1e}, gradients by {gradients:.1e} of the largest: rounding")

    repeats = 5
    found = {"outputs": outputs, "gradients": gradients, "padding": share}
    for name, forward in (("padded", padded), ("packed", packed)):
        found[name] = milliseconds(lambda forward=forward: step(forward), repeats)
        print(f"a step of training {name}: {found[name]:.1f} ms")
    return found


if __name__ == "__main__":
    main()
