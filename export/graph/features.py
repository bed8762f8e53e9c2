"""The features graph: uint8 image in, DiTF features out (design, section 2)."""

from __future__ import annotations

import torch
from torch import nn

from ditf.export.graph.layers import constant
from ditf.export.graph.trunk import Trunk
from ditf.export.noise import NoiseLevel
from ditf.export.reference import FeatureSettings


class FeaturesGraph(nn.Module):
    """Normalise, encode, add noise, run the blocks, average, discard, norm and modulate.

    Args:
        encoder: pixels in [-1, 1], float32 [B, 3, H, W] -> x_0 [B, c, h', w'].
        trunk: x_t -> hidden states.
        level: of the noise.
        noise: eps [E, c, h', w'].
        bake_noise: False makes eps a second input of `forward`.
        settings: the feature's definition.
        grid: (h, w) in tokens.
        output: dtype of the features.
    """

    def __init__(
        self,
        encoder: nn.Module,
        trunk: Trunk,
        level: NoiseLevel,
        noise: torch.Tensor,
        bake_noise: bool,
        settings: FeatureSettings,
        grid: tuple[int, int],
        output: torch.dtype,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.trunk = trunk
        self.level = level
        self.ensemble = len(noise)
        self.noise = constant(level.noise * noise) if bake_noise else None
        self.adaln = settings.adaln
        self.stage = settings.stage
        self.grid = grid
        self.output = output
        self.keep: nn.Parameter | None = None
        if settings.channels:
            keep = torch.ones(len(trunk.output_norm.weight))
            keep[list(settings.channels)] = 0.0
            self.keep = constant(keep)

    def forward(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Features [B, C, h, w].

        Args:
            image: uint8 [B, H, W, 3], RGB.
            noise: eps, float32 [E, c, h', w'], when it is not baked.
        """
        pixels = image.to(torch.float32).permute(0, 3, 1, 2) * (1 / 127.5) - 1.0
        z = self._average(self.trunk(self._add_noise(self.encoder(pixels), noise)))
        if self.stage == "before":
            z = self._discard(z)
        if self.adaln:
            z = self.trunk.output_norm(z)
        if self.stage == "after":
            z = self._discard(z)
        return z.transpose(1, 2).unflatten(2, self.grid).to(self.output)

    def _add_noise(self, x_0: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """x_t [B * E, c, h', w']."""
        if self.noise is not None:
            scaled: torch.Tensor = self.noise
        else:
            assert noise is not None
            scaled = self.level.noise * noise
        if self.ensemble == 1:
            return self.level.signal * x_0 + scaled
        return (self.level.signal * x_0.unsqueeze(1) + scaled).flatten(0, 1)

    def _average(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean over the ensemble [B, N, C]."""
        if self.ensemble == 1:
            return tokens
        return tokens.unflatten(0, (-1, self.ensemble)).mean(dim=1)

    def _discard(self, z: torch.Tensor) -> torch.Tensor:
        return z if self.keep is None else z * self.keep
