"""The features graph: uint8 image in, DiTF features out (design, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from ditf.export.graph.blocks.layers import constant
from ditf.export.graph.blocks.trunk import Trunk
from ditf.export.graph.condition import ConditionSource
from ditf.export.graph.roles import Role, Roles

NOISE = "noise"


@dataclass(frozen=True)
class FeatureSettings:
    """The definition of the feature, once the channels are known.

    Attributes:
        channels: discarded channels, ascending.
        stage: "before" the norm, or "after" it.
        adaln: False for plain hidden states.
    """

    channels: Sequence[int] = ()
    stage: str = "before"
    adaln: bool = True


class Projection(nn.Module):
    """P F in float32, as a 1x1 convolution: TensorRT-RTX has no float32 matrix product for Turing.

    Args:
        matrix: P, float32 [N, C].
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.weight = constant(matrix[:, :, None, None])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] -> [B, N, h, w]."""
        return functional.conv2d(features, self.weight)


class FeaturesGraph(nn.Module):
    """Normalise, encode, add noise, run the blocks, average, discard, norm and modulate, project.

    Args:
        encoder: pixels in [-1, 1], float32 [B, 3, H, W] -> x_0 [B, c, h', w'].
        condition: one of the modules of `graph/condition.py`.
        trunk: x_t -> hidden states.
        noise: eps [E, c, h', w'].
        bake_noise: False makes eps an input of the graph.
        settings: the feature's definition.
        grid: (h, w) in tokens.
        output: dtype of the features.
        projection: P, float32 [N, C], of --pca.

    Attributes:
        inputs: names of what `forward` takes beside the image.
    """

    roles: ClassVar[Roles] = {
        "encoder": Role.VAE_ENCODER,
        "condition": Role.CONDITIONING,
        "noise": Role.NOISE,
        "keep": Role.DISCARD_MASK,
        "projection": Role.PROJECTION,
    }

    def __init__(
        self,
        encoder: nn.Module,
        condition: ConditionSource,
        trunk: Trunk,
        noise: torch.Tensor,
        bake_noise: bool,
        settings: FeatureSettings,
        grid: tuple[int, int],
        output: torch.dtype,
        projection: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.condition = condition
        self.trunk = trunk
        self.ensemble = len(noise)
        self.noise = constant(noise) if bake_noise else None
        self.inputs = (*(() if bake_noise else (NOISE,)), *condition.inputs)
        self.adaln = settings.adaln
        self.stage = settings.stage
        self.grid = grid
        self.output = output
        self.projection = nn.Identity() if projection is None else Projection(projection)
        self.keep: nn.Parameter | None = None
        if settings.channels:
            keep = torch.ones(trunk.channels)
            keep[list(settings.channels)] = 0.0
            self.keep = constant(keep)

    def forward(self, image: torch.Tensor, *feeds: torch.Tensor) -> torch.Tensor:
        """Features [B, C, h, w], or [B, N, h, w] projected.

        Args:
            image: uint8 [B, H, W, 3], RGB.
            feeds: one tensor for each of `inputs`; eps is float32 [E, c, h', w'].
        """
        named = dict(zip(self.inputs, feeds, strict=True))
        given, signal, noise_scale = self.condition(named)
        pixels = image.to(torch.float32).permute(0, 3, 1, 2) * (1 / 127.5) - 1.0
        noise = named[NOISE] if self.noise is None else self.noise
        x_t = self._add_noise(self.encoder(pixels) * signal, noise * noise_scale)
        z = self._average(self.trunk(x_t, given))
        if self.stage == "before":
            z = self._discard(z)
        if self.adaln:
            z = self.trunk.modulate(z, given)
        if self.stage == "after":
            z = self._discard(z)
        features: torch.Tensor = self.projection(z.transpose(1, 2).unflatten(2, self.grid))
        return features.to(self.output)

    def _add_noise(self, x_0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_t [B * E, c, h', w']."""
        if self.ensemble == 1:
            return x_0 + noise
        return (x_0.unsqueeze(1) + noise).flatten(0, 1)

    def _average(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean over the ensemble [B, N, C]."""
        if self.ensemble == 1:
            return tokens
        return tokens.unflatten(0, (-1, self.ensemble)).mean(dim=1)

    def _discard(self, z: torch.Tensor) -> torch.Tensor:
        return z if self.keep is None else z * self.keep
