"""The patch embedder of DiT, PixArt and SD3: diffusers `PatchEmbed` with sine-cosine positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.embeddings import get_2d_sincos_pos_embed

from ditf.export.checkpoints.weights import Weights
from ditf.export.graph.blocks.trunk import PatchEmbedder
from ditf.export.graph.precision import Precision


def sincos_embedder(
    weights: Weights,
    config: Mapping[str, Any],
    grid: tuple[int, int],
    interpolation_scale: float,
    precision: Precision,
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
    return PatchEmbedder(weight, weights.tensor("pos_embed.proj.bias"), position.float(), precision)


def cropped_embedder(weights: Weights, grid: tuple[int, int], precision: Precision) -> PatchEmbedder:
    """The embedder of a model that stores a square table [1, S * S, C] and crops its middle (SD3)."""
    table = weights.tensor("pos_embed.pos_embed")
    side = round(table.shape[1] ** 0.5)
    top, left = ((side - length) // 2 for length in grid)
    square = table.reshape(side, side, -1)[top : top + grid[0], left : left + grid[1]]
    weight = weights.tensor("pos_embed.proj.weight")
    return PatchEmbedder(weight, weights.tensor("pos_embed.proj.bias"), square.flatten(0, 1), precision)
