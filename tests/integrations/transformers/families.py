"""Families of models of transformers, each as a tiny one with random weights: nothing is fetched from anywhere.

Weights are drawn larger than transformers draws them, so that attention is far from uniform and a key, a bias or a
sink that is lost shows in the results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import Tensor

BATCH, LENGTH, VOCABULARY = 2, 9, 61
END = VOCABULARY - 1  # the token that ends a text beside an image
Kind = Literal["decoder", "encoder", "encoder-decoder", "vision", "vision and text", "audio"]
Padding = Literal["none", "right", "left"]
Inputs = dict[str, Tensor]


class Family(NamedTuple):
    """One family of models.

    Attributes:
        name: as it is called.
        model: the class, of transformers.
        config: the class of its configuration.
        sizes: the arguments of the configuration.
        kind: what it reads and writes.
        inputs: makes the arguments of a call, for a kind of padding and a seed.
        calls: so many times one forward computes attention.
        softmaxes: so many a forward has that are no attention, as routers of experts have.
        norms: the classes of norms that :func:`fastattn.fuse` is told to be torch's RMS norm.
        norms_left: so many modules of norms stay theirs, because they compute something else.
        carries: what attention gets beside query, key and value, in a batch with padding.
        spread: the standard deviation of what is added to each weight; less where scores are not scaled down.
        remark: for the table.
        peer: transformers' own attention to compare with.
        since: the first transformers in which it asks for attention by a name.
    """

    name: str
    model: str
    config: str
    sizes: dict[str, Any]
    kind: Kind
    inputs: Callable[[Padding, int], Inputs]
    calls: int
    softmaxes: int = 0
    norms: tuple[str, ...] = ()
    norms_left: int = 0
    carries: tuple[str, ...] = ()
    spread: float = 0.2
    remark: str = ""
    peer: str = "eager"
    since: tuple[int, int] = (5, 4)

    @property
    def pads(self) -> tuple[Padding, ...]:
        """The kinds of padding that the model knows."""
        if self.inputs in (image, spectrum):
            return ("none",)
        return ("none", "right", "left") if self.kind == "decoder" else ("none", "right")

    @property
    def generates(self) -> bool:
        """Does it have ``generate``?"""
        return self.kind in ("decoder", "encoder-decoder")


def build(family: Family, *, seed: int = 0, **changes: Any) -> Any:
    """The model in evaluation mode, float32 and ``"eager"``; ``changes`` replace sizes."""
    config = getattr(transformers, family.config)(**{**family.sizes, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, family.model)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(family.spread * torch.randn_like(parameter))
    return model


# ------------------------------------------------------------------------------------------------------------- inputs


def kept(padding: Padding, length: int = LENGTH) -> Tensor:
    """``[B, length]``, 1 = no padding: the first row loses three positions, the second none."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    if padding == "right":
        mask[0, -3:] = 0
    elif padding == "left":
        mask[0, :3] = 0
    return mask


def tokens(seed: int, length: int = LENGTH) -> Tensor:
    """``[B, length]`` random token numbers, without those that models give a meaning."""
    return torch.randint(5, END, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(padding: Padding, seed: int) -> Inputs:
    """Tokens, and as labels the same where neither they nor the tokens before them, which predict them, are padding."""
    mask, ids = kept(padding), tokens(seed)
    inputs = {"input_ids": ids, "labels": ids.masked_fill((mask == 0) | (mask.roll(1, dims=1) == 0), -100)}
    if padding != "none":
        inputs["attention_mask"] = mask
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return inputs


def masked_text(padding: Padding, seed: int) -> Inputs:
    """For encoders, which count positions themselves."""
    inputs = text(padding, seed)
    inputs.pop("position_ids", None)
    return inputs


def source_and_target(padding: Padding, seed: int) -> Inputs:
    """Tokens to read and tokens to write."""
    inputs = {"input_ids": tokens(seed), "labels": tokens(seed + 1, length=7)}
    if padding != "none":
        inputs["attention_mask"] = kept(padding)
    return inputs


def image(padding: Padding, seed: int) -> Inputs:
    """Two images of 16 x 16."""
    return {"pixel_values": normal(BATCH, 3, 16, 16, seed=seed)}


def image_and_text(padding: Padding, seed: int) -> Inputs:
    """Two images, two texts, and whether they belong together as the loss."""
    mask = kept(padding)
    ids = tokens(seed).scatter(1, mask.sum(dim=1, keepdim=True) - 1, END)
    inputs = {"pixel_values": normal(BATCH, 3, 16, 16, seed=seed), "input_ids": ids, "return_loss": torch.tensor(True)}
    return inputs if padding == "none" else inputs | {"attention_mask": mask}


def patches(padding: Padding, seed: int) -> Inputs:
    """Flattened patches, each behind the numbers of its row and column, and tokens to write."""
    places = torch.stack([torch.arange(LENGTH) // 3 + 1, torch.arange(LENGTH) % 3 + 1], dim=-1).float()
    pixels = torch.cat([places.expand(BATCH, -1, -1), normal(BATCH, LENGTH, 12, seed=seed)], dim=-1)
    mask = kept(padding)
    return {
        "flattened_patches": pixels * mask[..., None],
        "attention_mask": mask,
        "labels": tokens(seed + 1, length=7),
    }


def image_for_text(padding: Padding, seed: int) -> Inputs:
    """A text, and an image of two tiles of which it sees one or both."""
    tiles = torch.tensor([[[1, 0]], [[1, 1]]])
    seen = tiles[:, None].expand(BATCH, LENGTH, 1, 2).clone()
    return text(padding, seed) | {
        "pixel_values": normal(BATCH, 1, 2, 3, 16, 16, seed=seed),
        "aspect_ratio_ids": torch.tensor([[1], [2]]),
        "aspect_ratio_mask": tiles,
        "cross_attention_mask": seen,
    }


def boxes_and_text(padding: Padding, seed: int) -> Inputs:
    """Tokens at places of a page, and the page."""
    inputs = masked_text(padding, seed)
    corners = torch.randint(0, 50, (BATCH, LENGTH, 2), generator=torch.Generator().manual_seed(seed))
    inputs["bbox"] = torch.cat([corners, corners + 20], dim=-1)
    inputs["pixel_values"] = normal(BATCH, 3, 16, 16, seed=seed)
    inputs["labels"] = inputs["labels"].clamp(max=1)
    return inputs


def spectrum(padding: Padding, seed: int) -> Inputs:
    """A spectrum of 18 frames, of which the encoder makes 9, and tokens to write."""
    return {"input_features": normal(BATCH, 8, 18, seed=seed), "labels": tokens(seed + 1, length=7)}


def sound(padding: Padding, seed: int) -> Inputs:
    """A waveform, of which the encoder makes a few frames."""
    inputs = {"input_values": normal(BATCH, 200, seed=seed), "labels": tokens(seed, length=3)}
    if padding != "none":
        inputs["attention_mask"] = torch.ones(BATCH, 200, dtype=torch.long)
        inputs["attention_mask"][0, 120:] = 0
    return inputs


# ----------------------------------------------------------------------------------------------------------- families

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
_SOUND = {key: value for key, value in _ENCODER.items() if key != "max_position_embeddings"} | {
    "conv_dim": (16, 16),
    "conv_kernel": (8, 4),
    "conv_stride": (6, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
    "feat_extract_norm": "layer",
    "ctc_zero_infinity": True,
    "layerdrop": 0.0,
}
_TEXT_OF_TWO = {key: value for key, value in _ENCODER.items() if "token_id" not in key} | {
    "eos_token_id": END,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_ALIBI = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_FALCON = _ALIBI | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _layers(*kinds: str) -> list[str]:
    return [f"{kind}_attention" for kind in kinds]


FAMILIES = (
    Family("Llama", "LlamaForCausalLM", "LlamaConfig", _DECODER, "decoder", text, 2, norms=("LlamaRMSNorm",)),
    Family(
        "Mistral", "MistralForCausalLM", "MistralConfig", _DECODER | {"sliding_window": 4}, "decoder", text, 2,
        norms=("MistralRMSNorm",), carries=("window",),
    ),
    Family("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", _DECODER, "decoder", text, 2, norms=("Qwen3RMSNorm",)),
    Family("Phi-3", "Phi3ForCausalLM", "Phi3Config", _DECODER, "decoder", text, 2, norms=("Phi3RMSNorm",)),
    Family(
        "Gemma 2", "Gemma2ForCausalLM", "Gemma2Config",
        _DECODER | {"sliding_window": 4, "layer_types": _layers("sliding", "full"), "query_pre_attn_scalar": 8,
                    "attn_logit_softcapping": 2.0},
        "decoder", text, 2, norms_left=9, carries=("window", "softcap"),
        remark="its norms multiply by 1 + weight",
    ),
    Family(
        "Gemma 3", "Gemma3ForCausalLM", "Gemma3TextConfig",
        _DECODER | {"sliding_window": 4, "layer_types": _layers("sliding", "full"), "query_pre_attn_scalar": 8},
        "decoder", text, 2, norms_left=13, carries=("window",),
        remark="its norms multiply by 1 + weight",
    ),
    Family(
        "Llama 4", "Llama4ForCausalLM", "Llama4TextConfig",
        _DECODER | {"intermediate_size_mlp": 48, "attention_chunk_size": 4, "layer_types": _layers("chunked", "full"),
                    "num_local_experts": 2, "num_experts_per_tok": 2, "rope_parameters": _ROPE,
                    "experts_implementation": "eager"},
        "decoder", text, 2, norms=("Llama4TextRMSNorm",), carries=("documents",), remark="its chunks are documents",
    ),
    Family(
        "GPT-OSS", "GptOssForCausalLM", "GptOssConfig",
        _DECODER | {"sliding_window": 4, "layer_types": _layers("sliding", "full"), "num_local_experts": 4,
                    "num_experts_per_tok": 4, "rope_parameters": _ROPE, "experts_implementation": "eager"},
        "decoder", text, 2, softmaxes=2, norms=("GptOssRMSNorm",), carries=("window", "sinks"),
    ),
    Family(
        "DeepSeek-V3", "DeepseekV3ForCausalLM", "DeepseekV3Config",
        _DECODER | {"num_key_value_heads": 4, "head_dim": 4, "kv_lora_rank": 16, "q_lora_rank": 16,
                    "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
                    "n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1,
                    "moe_intermediate_size": 16, "first_k_dense_replace": 1, "experts_implementation": "eager"},
        "decoder", text, 2, norms=("DeepseekV3RMSNorm",), remark="values of another size than keys",
    ),
    Family(
        "GPT-2", "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2},
        "decoder", text, 2,
    ),
    Family("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig", _DECODER, "decoder", text, 2),
    Family("Falcon", "FalconForCausalLM", "FalconConfig", _FALCON | {"multi_query": True}, "decoder", masked_text, 2),
    Family(
        "Falcon (grouped)", "FalconForCausalLM", "FalconConfig",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, "decoder", masked_text, 2,
        remark="its cache holds the keys of a group once",
    ),
    Family(
        "Falcon (ALiBi)", "FalconForCausalLM", "FalconConfig",
        _FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False}, "decoder", masked_text, 2,
        carries=("bias",), peer="sdpa", remark='beside `"sdpa"`: transformers\' `"eager"` adds ALiBi twice',
    ),
    Family(
        "MPT", "MptForCausalLM", "MptConfig", _ALIBI | {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32},
        "decoder", masked_text, 2, carries=("bias",),
    ),
    Family(
        "BLOOM", "BloomForCausalLM", "BloomConfig", _ALIBI | {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        "decoder", masked_text, 2, carries=("bias",),
    ),
    Family(
        "Mllama", "MllamaForConditionalGeneration", "MllamaConfig",
        {
            "vision_config": {"hidden_size": 16, "attention_heads": 2, "intermediate_size": 24, "image_size": 16,
                              "patch_size": 8, "num_hidden_layers": 1, "num_global_layers": 1, "max_num_tiles": 2,
                              "vision_output_dim": 32, "intermediate_layers_indices": [0],
                              "supported_aspect_ratios": [[1, 1], [1, 2]]},
            "text_config": _DECODER | {"num_hidden_layers": 3, "cross_attention_layers": [1],
                                       "rope_parameters": _ROPE},
        },
        "decoder", image_for_text, 5, norms=("MllamaTextRMSNorm",), carries=("bias",),
        remark="it makes the masks of images itself, as numbers to add",
    ),
    Family("BERT", "BertForMaskedLM", "BertConfig", _ENCODER, "encoder", masked_text, 2),
    Family("RoBERTa", "RobertaForMaskedLM", "RobertaConfig", _ENCODER, "encoder", masked_text, 2),
    Family(
        "ModernBERT", "ModernBertForMaskedLM", "ModernBertConfig",
        _ENCODER | {"local_attention": 4, "layer_types": _layers("full", "sliding")},
        "encoder", masked_text, 2, carries=("window",),
    ),
    Family(
        "MPNet", "MPNetForMaskedLM", "MPNetConfig",
        {key: value for key, value in _ENCODER.items() if key not in ("cls_token_id", "sep_token_id")},
        "encoder", masked_text, 2, carries=("bias",),
    ),
    Family(
        "LayoutLMv3", "LayoutLMv3ForTokenClassification", "LayoutLMv3Config",
        _ENCODER | {"coordinate_size": 4, "shape_size": 8, "input_size": 16, "patch_size": 8,
                    "max_2d_position_embeddings": 80, "rel_pos_bins": 8, "max_rel_pos": 16,
                    "rel_2d_pos_bins": 8, "max_rel_2d_pos": 32},
        "encoder", boxes_and_text, 2, carries=("bias",), since=(5, 24),
    ),
    Family("T5", "T5ForConditionalGeneration", "T5Config", _T5 | {"feed_forward_proj": "gated-gelu"},
           "encoder-decoder", source_and_target, 6,
           norms=("T5LayerNorm",), carries=("bias",), spread=0.1),
    Family("mT5", "MT5ForConditionalGeneration", "MT5Config", _T5, "encoder-decoder", source_and_target, 6,
           norms=("MT5LayerNorm",), carries=("bias",), spread=0.1),
    Family("UMT5", "UMT5ForConditionalGeneration", "UMT5Config", _T5, "encoder-decoder", source_and_target, 6,
           norms=("UMT5LayerNorm",), carries=("bias",), spread=0.1),
    Family(
        "Pix2Struct", "Pix2StructForConditionalGeneration", "Pix2StructConfig",
        {
            "vision_config": {"hidden_size": 32, "patch_embed_hidden_size": 12, "d_ff": 48, "d_kv": 8,
                              "num_hidden_layers": 2, "num_attention_heads": 4, "seq_len": 16},
            "text_config": {"vocab_size": VOCABULARY, "hidden_size": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
                            "num_heads": 4, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1},
        },
        "encoder-decoder", patches, 6, norms=("Pix2StructLayerNorm",), carries=("bias",), spread=0.1,
    ),
    Family("ViT", "ViTForImageClassification", "ViTConfig", _VISION, "vision", image, 2),
    Family("DINOv2", "Dinov2Model", "Dinov2Config", _VISION, "vision", image, 2),
    Family("CLIP", "CLIPModel", "CLIPConfig",
           {"text_config": _TEXT_OF_TWO, "vision_config": _VISION, "projection_dim": 16},
           "vision and text", image_and_text, 4),
    Family("SigLIP", "SiglipModel", "SiglipConfig",
           {"text_config": _TEXT_OF_TWO | {"projection_size": 32}, "vision_config": _VISION},
           "vision and text", image_and_text, 4, softmaxes=1,
           remark="its pooling is an `nn.MultiheadAttention`, which `fuse` makes ours"),
    Family(
        "Whisper", "WhisperForConditionalGeneration", "WhisperConfig",
        {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
         "num_mel_bins": 8, "max_source_positions": 9, "max_target_positions": 32, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None,
         "begin_suppress_tokens": None},
        "encoder-decoder", spectrum, 6,
    ),
    Family("Wav2Vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", _SOUND, "audio", sound, 2),
    Family("WavLM", "WavLMForCTC", "WavLMConfig", _SOUND, "audio", sound, 2, carries=("bias",)),
)  # fmt: skip
BY_NAME = {family.name: family for family in FAMILIES}
# Families whose layers compute attention themselves, all of it or that of the encoder.
NOT_REACHED = (
    Family("Megatron-BERT", "MegatronBertForMaskedLM", "MegatronBertConfig", _ENCODER, "encoder", masked_text, 0,
           softmaxes=2, remark="raises"),
    Family("XGLM", "XGLMForCausalLM", "XGLMConfig",
           _ALIBI | {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}, "decoder", masked_text, 0,
           softmaxes=2, remark="raises"),
    Family("LongT5", "LongT5ForConditionalGeneration", "LongT5Config",
           _T5 | {"local_radius": 3, "encoder_attention_type": "local"}, "encoder-decoder", source_and_target, 4,
           softmaxes=2, remark="its decoder is ours, its encoder's local attention is not"),
)  # fmt: skip
BY_NAME |= {family.name: family for family in NOT_REACHED}
