"""The patch embedder DiT and PixArt share: diffusers `PatchEmbed` with a sine-cosine position embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.embeddings import get_2d_sincos_pos_embed

from ditf.export.checkpoint import Weights
from ditf.export.graph.trunk import PatchEmbedder


def sincos_embedder(
    weights: Weights, config: Mapping[str, Any], grid: tuple[int, int], interpolation_scale: float
) -> PatchEmbedder:
    """The embedder at a grid of (h, w) tokens, as `PatchEmbed.forward` computes it."""
    weight = weights.tensor("pos_embed.proj.weight")
    position = get_2d_sincos_pos_embed(
        embed_dim=len(weight),
        grid_size=grid,
        base_size=config["sample_size"] // config["patch_size"],
        interpolation_scale=interpolation_scale,
        output_type="pt",
    )
    return PatchEmbedder(weight, weights.tensor("pos_embed.proj.bias"), position.float())
