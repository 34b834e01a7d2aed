"""A small GPT that learns English from Python's own manual, letter by letter.

The text is the language reference that comes with Python (``pydoc_data.topics``), so nothing is fetched. A causal
transformer (``fastattn.models.TransformerLanguageModel``) reads passages of it and learns to say the next letter. It is
asked on the last tenth of the text, which it never reads. Expect the loss to fall from 4.6 nats a letter (a guess among
about 100) to about 1.4 in the full form, where words and most of their endings are right; a model that knows only how
frequent each letter is gets 3.2. The sample at the end is made with a cache of keys and values.

    python examples/gpt.py --quick                        # five seconds, no words yet
    python examples/gpt.py --out gpt.png                  # a minute and a half
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn.models import TransformerConfig, TransformerLanguageModel


def letters_and_text() -> tuple[list[str], Tensor]:
    """All letters that occur, and the text as numbers ``[N]``."""
    text = "\n".join(topics[name] for name in sorted(topics))
    letters = sorted(set(text))
    number = {letter: i for i, letter in enumerate(letters)}
    return letters, torch.tensor([number[letter] for letter in text])


def passages(text: Tensor, length: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` passages ``[count, length]`` from anywhere in ``text``."""
    starts = torch.randint(len(text) - length + 1, (count, 1), generator=generator)
    return text[starts + torch.arange(length)]


def frequency_loss(text: Tensor, asked: Tensor) -> float:
    """Nats a letter of ``asked``, if each letter is as likely as it is frequent in ``text``."""
    counts = torch.bincount(text, minlength=int(asked.max()) + 1).double() + 1
    return -(counts / counts.sum()).log()[asked].mean().item()


@torch.no_grad()
def weights_of(model: TransformerLanguageModel, tokens: Tensor) -> list[Tensor]:
    """The attention weights ``[H, L, L]`` of each layer while it reads ``tokens`` ``[1, L]``."""
    hidden = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    x, found = model.trunk.positions(model.trunk.tokens(tokens)), []
    layers: Any = model.trunk.layers
    for layer in layers:
        normed = layer.norm1(x)
        attended = layer.self_attn(normed, normed, normed, attn_mask=hidden, average_attn_weights=False)
        found.append(attended[1][0])
        x = layer(x, hidden, is_causal=True)
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, sample and draw; returns the losses in nats a letter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer steps")
    parser.add_argument("--out", metavar="FILE", help="write the picture of the weights there")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    letters, text = letters_and_text()
    train, asked = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    steps, width, layers, context = (100, 64, 2, 64) if options.quick else (1000, 96, 3, 96)
    config = TransformerConfig(width, 4, layers, max_length=256, norm_first=True, activation="gelu")
    model = TransformerLanguageModel(len(letters), config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(text):,} letters, {len(letters)} of them different; {parameters:,} parameters")

    unseen = passages(asked, context, 64, generator)
    found = {"frequencies": frequency_loss(train, asked)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps + 1):
        if step % (steps // 5) == 0:
            with torch.no_grad():
                found["last"] = model.loss(unseen).item()
            found.setdefault("first", found["last"])
            print(f"step {step}: {found['last']:.3f} nats a letter that it has not seen")
        if step < steps:
            optimizer.zero_grad()
            model.loss(passages(train, context, 16, generator)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    print(f"letter frequencies alone: {found['frequencies']:.3f}")

    prompt = torch.tensor([[letters.index(letter) for letter in "The "]])
    said = model.generate(prompt, context - len(prompt[0]), temperature=0.6, seed=1)  # it knows no later positions
    written = "".join(letters[i] for i in said[0].tolist())
    print(f"\nIt says:\n{written}\n")
    if options.out:
        shown = said[:, :24]
        title = "Who looks at whom: no letter looks ahead"
        figure = fastattn.plot_attention(weights_of(model, shown)[-1], tokens=list(written[:24]), title=title)
        figure.savefig(options.out)
        print(f"written: {options.out}")
    return found


if __name__ == "__main__":
    main()
