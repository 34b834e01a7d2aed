"""Vision transformers of torchvision, narrow and of few layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.clients.cases import Client, Inputs, image, resolve


def _images(generator: torch.Generator) -> Inputs:
    return {"x": image(generator)}


def _vit() -> nn.Module:
    return resolve("torchvision.models:VisionTransformer")(
        image_size=64, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=7
    )


def _swin(**arguments: Any) -> nn.Module:
    make = resolve("torchvision.models:SwinTransformer")
    return make([4, 4], 24, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=7, **arguments)


def _swin_v2() -> nn.Module:
    block, merging = (
        resolve(f"torchvision.models.swin_transformer:{name}") for name in ("SwinTransformerBlockV2", "PatchMergingV2")
    )
    return _swin(block=block, downsample_layer=merging)


def _maxvit() -> nn.Module:
    return resolve("torchvision.models:MaxVit")(
        input_size=(64, 64), stem_channels=16, block_channels=[16, 32], block_layers=[1, 1], head_dim=8,
        stochastic_depth_prob=0.0, partition_size=4, num_classes=7,
    )  # fmt: skip


CLIENTS = (
    Client("torchvision", "ViT", _vit, _images),
    Client("torchvision", "Swin", _swin, _images, attends=False),
    Client("torchvision", "Swin v2", _swin_v2, _images, attends=False),
    Client("torchvision", "MaxViT", _maxvit, _images, attends=False),
)
