"""Pairs of an image and a text encoder of open_clip, narrow and of two layers each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.clients.cases import Client, Inputs, image, resolve

_VISION: dict[str, Any] = {"image_size": 64, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}
_TEXT: dict[str, Any] = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
_NORM = {"open_clip.transformer:LayerNorm": nn.LayerNorm}
_NORM_FP32 = {"open_clip.transformer:LayerNormFp32": nn.LayerNorm}


def _pairs(generator: torch.Generator) -> Inputs:
    """Images and texts of 12 tokens; the end of a text has the highest number."""
    text = torch.randint(1, 63, (2, 12), generator=generator)
    text[0, 8:], text[1, 11] = 0, 63
    text[0, 7] = 63
    return {"image": image(generator), "text": text}


def _clip(vision: dict[str, Any], text: dict[str, Any], **arguments: Any) -> nn.Module:
    return resolve("open_clip:CLIP")(32, _VISION | vision, _TEXT | text, **arguments)


def _for_16_bits() -> nn.Module:
    """Its norms compute in float32, with weights in float32."""
    return _clip({}, {}, cast_dtype=torch.bfloat16)


def _cast_but_for_norms(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As open_clip does for ``precision="bf16"``."""
    resolve("open_clip:convert_weights_to_lp")(model, dtype)
    return model


def _custom() -> nn.Module:
    return _clip({"block_type": "custom", "qk_norm": True}, {"block_type": "custom"})


def _pooled() -> nn.Module:
    return _clip({"attentional_pool": True, "attn_pooler_queries": 8, "attn_pooler_heads": 2}, {})


def _coca() -> nn.Module:
    """Its decoder attends to the image through ``nn.MultiheadAttention``, too."""
    text, layer = _TEXT | {"embed_cls": True, "output_tokens": True}, {"layers": 1}
    pool = {"attentional_pool": True, "attn_pooler_queries": 8, "attn_pooler_heads": 2, "output_tokens": True}
    return resolve("open_clip:CoCa")(32, _TEXT | layer, text | layer, _VISION | pool | layer)


CLIENTS = (
    Client("open_clip_torch", "CLIP", lambda: _clip({}, {}), _pairs, _NORM),
    Client("open_clip_torch", "CLIP with LayerNormFp32", _for_16_bits, _pairs, _NORM_FP32, cast=_cast_but_for_norms),
    Client("open_clip_torch", "CLIP, attentional pooling", _pooled, _pairs, _NORM),
    Client("open_clip_torch", "CLIP, custom blocks", _custom, _pairs, _NORM),
    Client("open_clip_torch", "CoCa", _coca, _pairs, _NORM),
)
