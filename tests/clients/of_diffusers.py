"""Denoisers and an autoencoder of diffusers, of one or two narrow blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.clients.cases import Client, Inputs, image, normal, prefix_mask, resolve

_FP32_LAYER_NORM = {"diffusers.models.normalization:FP32LayerNorm": nn.LayerNorm}
_RMS_NORM = {"diffusers.models.normalization:RMSNorm": nn.RMSNorm}


def _make(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: resolve(f"diffusers:{name}")(**arguments)


def _prompted(generator: torch.Generator) -> Inputs:
    """Latents ``[2, 4, 16, 16]``, times, and prompts of 7 and 4 tokens of 32 numbers."""
    return {
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": normal(generator, 2, 7, 32),
        "return_dict": False,
    }


def _unet_inputs(generator: torch.Generator) -> Inputs:
    padding = {"encoder_attention_mask": prefix_mask(7, 4)}
    return {"sample": normal(generator, 2, 4, 16, 16), **_prompted(generator), **padding}


def _pixart_inputs(generator: torch.Generator) -> Inputs:
    return {
        "hidden_states": normal(generator, 2, 4, 16, 16),
        **_prompted(generator),
        "encoder_attention_mask": prefix_mask(7, 4),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _dit_inputs(generator: torch.Generator) -> Inputs:
    return {
        "hidden_states": normal(generator, 2, 4, 16, 16),
        "timestep": torch.tensor([3, 700]),
        "class_labels": torch.tensor([1, 3]),
        "return_dict": False,
    }


def _sd3_inputs(generator: torch.Generator) -> Inputs:
    latents = normal(generator, 2, 4, 16, 16)
    return {"hidden_states": latents, "pooled_projections": normal(generator, 2, 24), **_prompted(generator)}


def _flux_inputs(generator: torch.Generator) -> Inputs:
    return {
        "hidden_states": normal(generator, 2, 16, 4),
        "pooled_projections": normal(generator, 2, 24),
        **_prompted(generator),
        "timestep": torch.tensor([0.1, 0.6]),
        "img_ids": torch.cat([torch.zeros(16, 1), torch.cartesian_prod(torch.arange(4), torch.arange(4))], dim=1),
        "txt_ids": torch.zeros(7, 3),
    }


def _wan_inputs(generator: torch.Generator) -> Inputs:
    return {"hidden_states": normal(generator, 2, 4, 2, 8, 8), **_prompted(generator)}


def _vae_inputs(generator: torch.Generator) -> Inputs:
    return {"sample": image(generator, size=32), "return_dict": False}


CLIENTS = (
    Client(
        "diffusers", "UNet2DConditionModel",
        _make("UNet2DConditionModel", sample_size=16, block_out_channels=(16, 32), layers_per_block=1,
              norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
              up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32, attention_head_dim=2),
        _unet_inputs,
    ),
    Client(
        "diffusers", "PixArtTransformer2DModel",
        _make("PixArtTransformer2DModel", num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8,
              num_layers=2, sample_size=16, cross_attention_dim=32, caption_channels=32, num_embeds_ada_norm=10),
        _pixart_inputs,
    ),
    Client(
        "diffusers", "DiTTransformer2DModel",
        _make("DiTTransformer2DModel", num_attention_heads=3, attention_head_dim=16, in_channels=4, num_layers=2,
              sample_size=16, patch_size=2, num_embeds_ada_norm=10),
        _dit_inputs,
    ),
    Client(
        "diffusers", "SD3Transformer2DModel",
        _make("SD3Transformer2DModel", sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
              attention_head_dim=16, num_attention_heads=3, joint_attention_dim=32, caption_projection_dim=48,
              pooled_projection_dim=24, dual_attention_layers=(0,), qk_norm="rms_norm"),
        _sd3_inputs, _RMS_NORM,
    ),
    Client(
        "diffusers", "FluxTransformer2DModel",
        _make("FluxTransformer2DModel", patch_size=1, in_channels=4, num_layers=1, num_single_layers=1,
              attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=24,
              axes_dims_rope=(4, 4, 8)),
        _flux_inputs, registry=True,
    ),
    Client(
        "diffusers", "WanTransformer3DModel",
        _make("WanTransformer3DModel", patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16,
              in_channels=4, out_channels=4, text_dim=32, freq_dim=16, ffn_dim=64, num_layers=2),
        _wan_inputs, _FP32_LAYER_NORM, registry=True,
    ),
    Client(
        "diffusers", "AutoencoderKL",
        _make("AutoencoderKL", block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
              up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8, latent_channels=4),
        _vae_inputs,
    ),
)  # fmt: skip
