"""Configs of published transformers, to count and time what an export of them would be without a download."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ditf.export.families import FAMILIES
from ditf.export.families.base import Condition, Family
from ditf.export.pretrained import full_config

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "DiT-XL/2 512": {"_class_name": "DiTTransformer2DModel", "sample_size": 64, "out_channels": 8},
    "PixArt-XL/2 512": {
        "_class_name": "PixArtTransformer2DModel",
        "sample_size": 64,
        "caption_channels": 4096,
        "cross_attention_dim": 1152,
    },
    "SD3 medium": {
        "_class_name": "SD3Transformer2DModel",
        "num_layers": 24,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    },
    "SD3.5 medium": {
        "_class_name": "SD3Transformer2DModel",
        "num_layers": 24,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
        "dual_attention_layers": tuple(range(13)),
    },
    "SD3.5 large": {
        "_class_name": "SD3Transformer2DModel",
        "num_layers": 38,
        "num_attention_heads": 38,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 2432,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
    "FLUX.1-dev": {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
    "FLUX.1-schnell": {"_class_name": "FluxTransformer2DModel"},
    "FLUX.2 [klein] 4B": {
        "_class_name": "Flux2Transformer2DModel",
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "guidance_embeds": False,
    },
    "Lumina-Image 2.0": {"_class_name": "Lumina2Transformer2DModel", "cap_feat_dim": 2304},
}
"""By name; what a config leaves out is the class's own default."""

_TEXT = {"pixart": 120, "sd3": 77 + 256, "flux": 512, "flux2": 512, "lumina2": 256}
_WIDTH = {"flux2": 7680, "lumina2": 2304}  # T5's is 4096
_POOLED = {"sd3": 2048, "flux": 768}


def published_family(name: str) -> Family:
    """The family of a published config."""
    config = CONFIGS[name]
    family = next(f for f in FAMILIES if f.transformer_class == config["_class_name"])
    return family(full_config(family.transformer_class, config))


def example_condition(family: Family, text_tokens: int | None = None) -> Condition:
    """Tensors of the shapes that a published model's text encoders give, filled with zeros.

    Args:
        text_tokens: unmasked text tokens; all by default.
    """
    if not family.takes_prompt:
        return {"class_labels": torch.zeros(1, dtype=torch.int64)}
    tokens = text_tokens or _TEXT[family.name]
    condition = {"prompt_embeds": torch.zeros(1, tokens, _WIDTH.get(family.name, 4096))}
    if family.name in _POOLED:
        condition["pooled_prompt_embeds"] = torch.zeros(1, _POOLED[family.name])
    elif family.name != "flux2":
        condition["prompt_attention_mask"] = torch.ones(1, tokens, dtype=torch.int64)
    if family.takes_guidance:
        condition["guidance"] = torch.zeros(1)
    return condition
