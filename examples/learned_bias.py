"""A bias for every distance is learned through ``attn_mask``, and attention finds out where to look by it alone.

Each position has to say the letter that stands three places before it. The layer knows no positions: queries and keys
are made of letters alone, so that only a bias on the scores can tell places apart. It is a table ``[H, distances]``,
laid out as ``[H, L, L]`` and handed to ``fastattn.attention`` as ``attn_mask``, whose gradient the fused backward
returns in the mask's own shape, summed over the batch (relative biases: arXiv:1910.10683). Expect the loss to fall to
almost nothing, and the largest entry of the table at distance 3.

    python examples/learned_bias.py --out bias.png        # some seconds
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn

LETTERS, LENGTH, BACK = 8, 24, 3


class Copier(nn.Module):
    """Letters ``[B, L]`` to logits ``[B, L, LETTERS]``, by one causal attention with a bias for each distance."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.letters = nn.Embedding(LETTERS, width)
        self.project = nn.Linear(width, 3 * width)
        self.by_distance = nn.Parameter(torch.zeros(heads, LENGTH))
        self.head = nn.Linear(width, LETTERS)

    def bias(self) -> Tensor:
        """``[H, L, L]``: of query ``i`` and key ``j`` the entry for the distance ``i - j``."""
        places = torch.arange(LENGTH)
        return self.by_distance[:, (places[:, None] - places).clamp_min(0)]

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The logits, and the weights ``[B, H, L, L]``."""
        projected = self.project(self.letters(tokens))
        query, key, value = projected.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        output, weights = fastattn.attention(
            query, key, value, attn_mask=self.bias(), is_causal=True, need_weights=True, average_attn_weights=False
        )
        return self.head(output.transpose(1, 2).flatten(2)), weights


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, look at the table and draw; returns the losses and the distance that is weighted most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--out", metavar="FILE", help="write the picture of the weights there")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    model = Copier(width=32, heads=2)
    steps = 200 if options.quick else 600
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    losses = []
    for step in range(1, steps + 1):
        tokens = torch.randint(LETTERS, (32, LENGTH))
        logits = model(tokens)[0][:, BACK:]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, :-BACK].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 1 or step % (steps // 5) == 0:
            print(f"step {step}: {losses[-1]:.4f} nats a letter")

    table = model.by_distance.detach()
    for head, row in enumerate(table):
        print(f"head {head}: bias by distance", " ".join(f"{entry:.1f}" for entry in row[:8].tolist()), "...")
    strongest = int((table - table.mean(1, keepdim=True)).amax(0).argmax())
    print(f"the largest bias is that of distance {strongest}")
    if options.out:
        tokens = torch.randint(LETTERS, (1, LENGTH))
        names = ["abcdefgh"[i] for i in tokens[0].tolist()]
        title = f"Weights of both heads: each query looks {BACK} places back"
        with torch.no_grad():
            figure = fastattn.plot_attention(model(tokens)[1], tokens=names, title=title)
        figure.savefig(options.out)
        print(f"written: {options.out}")
    return {"first": losses[0], "last": losses[-1], "distance": strongest}


if __name__ == "__main__":
    main()
