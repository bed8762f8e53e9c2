"""The definition of the feature, and the features graph: uint8 image in, DiTF features out.

ditf defines the feature here only (docs/design.md, "The feature"): the traced graph, the measurement of
ranges and the estimates all use `FeaturesGraph`. The reference (`ditf.export.measure.reference_model`) does
not: there the unmodified model computes the feature, in code that is not ditf's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from ditf.export.graph.blocks.condition_tensors import ConditionTensors
from ditf.export.graph.blocks.layers import constant
from ditf.export.graph.blocks.trunk import Trunk
from ditf.export.graph.condition import ConditionSource
from ditf.export.graph.roles import Role, Roles

NOISE = "noise"


@dataclass(frozen=True)
class FeatureTap:
    """The value of block k that is the feature.

    Attributes:
        name: the feature's name in calibration.json.
        read: computes it, float32 [B, N, C], from the trunk, the averaged hidden states [B, N, C] that enter
            block k, and the condition.
    """

    name: str
    read: Callable[[Trunk, torch.Tensor, ConditionTensors], torch.Tensor]


MODULATED = FeatureTap("features", lambda trunk, z, given: trunk.modulate(z, given))
"""The hidden states after block k's own first norm and modulation: what its attention reads."""

HIDDEN_STATES = FeatureTap("hidden states", lambda trunk, z, given: z)
"""The hidden states themselves (`--no-adaln`)."""


@dataclass(frozen=True)
class FeatureSettings:
    """The definition of the feature, once its channels are known.

    Attributes:
        channels: discarded channels, ascending.
        stage: whether they are discarded "before" or "after" the norm.
        adaln: False for plain hidden states.
    """

    channels: Sequence[int] = ()
    stage: str = "before"
    adaln: bool = True

    @property
    def tap(self) -> FeatureTap:
        return MODULATED if self.adaln else HIDDEN_STATES

    @property
    def name(self) -> str:
        """The feature's name in calibration.json; features whose ranges differ have different names."""
        after = self.adaln and self.stage == "after"
        return f"{self.tap.name} discarded after the norm" if after else self.tap.name


class FeatureProjection(nn.Module):
    """Projects features to P F in float32 (--pca).

    It is a 1x1 convolution, because TensorRT-RTX has no float32 matrix product for Turing.

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
    """Normalises and encodes an image, adds noise, runs the blocks, and makes the feature of what they give.

    Args:
        encoder: pixels in [-1, 1], float32 [B, 3, H, W] -> x_0 [B, c, h', w'].
        condition: one of the modules of `graph/condition.py`.
        trunk: x_t -> hidden states that enter block k.
        noise: eps [E, c, h', w'].
        bake_noise: False makes eps an input of the graph.
        settings: the feature's definition.
        grid: (h, w) in tokens.
        output: dtype of the features.
        projection: P of --pca, float32 [N, C], or None.

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
        self.settings = settings
        self.grid = grid
        self.output = output
        self.projection = nn.Identity() if projection is None else FeatureProjection(projection)
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
        z, given = self.hidden_states(image, *feeds)
        features = self.features(z, given).transpose(1, 2).unflatten(2, self.grid)
        projected: torch.Tensor = self.projection(features)
        return projected.to(self.output)

    def hidden_states(
        self, image: torch.Tensor, *feeds: torch.Tensor
    ) -> tuple[torch.Tensor, ConditionTensors]:
        """What enters block k, averaged over the ensemble: z [B, N, C]; and the condition that it met.

        Args:
            image, feeds: as for `forward`.
        """
        named = dict(zip(self.inputs, feeds, strict=True))
        given, signal, noise_scale = self.condition(named)
        pixels = image.to(torch.float32).permute(0, 3, 1, 2) * (1 / 127.5) - 1.0
        noise = named[NOISE] if self.noise is None else self.noise
        x_t = self._add_noise(self.encoder(pixels) * signal, noise * noise_scale)
        return self._average(self.trunk(x_t, given)), given

    def features(self, z: torch.Tensor, given: ConditionTensors) -> torch.Tensor:
        """The feature of averaged hidden states [B, N, C], before it is projected and cast: [B, N, C]."""
        settings = self.settings
        if settings.stage == "before":
            z = self._discard(z)
        z = settings.tap.read(self.trunk, z, given)
        if settings.stage == "after":
            z = self._discard(z)
        return z

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
