"""Vision transformers of timm, by their own names, with fewer and narrower layers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from tests.clients.cases import Client, Inputs, image, normal, resolve

_LAYER_NORM = {"timm.layers:LayerNorm": nn.LayerNorm}
_SMALL: dict[str, Any] = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}


def _make(name: str, **arguments: Any) -> nn.Module:
    return resolve("timm:create_model")(name, num_classes=7, **arguments)


def _swin() -> nn.Module:
    """Its windows call SDPA where timm is told that its experimental uses may."""
    switch = resolve("timm.layers:set_fused_attn")
    switch(True, experimental=True)
    try:
        return _make(
            "swin_tiny_patch4_window7_224",
            img_size=32, embed_dim=32, depths=(2,), num_heads=(2,), window_size=4, drop_path_rate=0.0,
        )  # fmt: skip
    finally:
        switch(True, experimental=False)


def _small_images(generator: torch.Generator) -> Inputs:
    return {"x": image(generator, size=32)}


def _images(generator: torch.Generator) -> Inputs:
    return {"x": image(generator)}


def _patches(generator: torch.Generator) -> Inputs:
    """Two images of 4 x 5 and 3 x 4 patches, padded to as many."""
    coordinates = [
        torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) for rows, columns in ((4, 5), (3, 4))
    ]
    return {
        "x": {
            "patches": normal(generator, 2, 20, 16 * 16 * 3),
            "patch_coord": nn.utils.rnn.pad_sequence(coordinates, batch_first=True),
            "patch_valid": torch.arange(20) < torch.tensor([[20], [12]]),
        }
    }


def _client(name: str, model: str, *, inputs: Any = _images, also: Any = _LAYER_NORM, **arguments: Any) -> Client:
    return Client("timm", name, functools.partial(_make, model, **arguments), inputs, also)


_PYRAMID: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 2, 4)}
_RMS_NORM = {"timm.layers:RmsNorm": nn.RMSNorm}
_LAYER_NORM_2D = {"timm.layers:LayerNorm2d": nn.LayerNorm}  # over the channels of feature maps

CLIENTS = (
    _client("ViT", "vit_tiny_patch16_224", **_SMALL),
    _client("ViT, SigLIP's attention pooling", "vit_base_patch16_siglip_224", **_SMALL),
    _client("ViT with rotary embedding", "vit_base_patch16_rope_mixed_224", **_SMALL),
    _client("ViT with relative positions", "vit_relpos_small_patch16_224", **_SMALL),
    _client(
        "NaFlexViT, padded patches", "naflexvit_base_patch16_gap", inputs=_patches, embed_dim=32, depth=2, num_heads=2
    ),
    _client("ViT with RmsNorm", "test_vit4", also=_RMS_NORM, **_SMALL),
    _client("DeiT, distilled", "deit_tiny_distilled_patch16_224", **_SMALL),
    _client("BEiT", "beit_base_patch16_224", **_SMALL),
    _client("EVA-02", "eva02_tiny_patch14_224", patch_size=16, **_SMALL),
    _client("CaiT", "cait_xxs24_224", **_SMALL),
    _client("Hiera", "hiera_tiny_224", img_size=64, embed_dim=24, num_heads=1, stages=(1, 1), q_pool=1),
    Client("timm", "Swin", _swin, _small_images),
    _client("PVT v2", "pvt_v2_b0", **_PYRAMID),
    _client("Twins-SVT", "twins_svt_small", inputs=_small_images, img_size=32, **_PYRAMID),
    _client("ConvNeXt", "convnext_tiny", depths=(1, 1, 1, 1), dims=(16, 16, 32, 32))._replace(
        unlike=_LAYER_NORM_2D, attends=False
    ),
)
