"""The truncated transformer: latents -> hidden states that enter block k, and block k's modulation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from ditf.export.graph.blocks.adaln import ModulatedNorm, ModulatedRMSNorm
from ditf.export.graph.blocks.layers import constant

Given = Mapping[str, torch.Tensor]
"""What a condition turns into before it meets the image: `modulation` [R, C], text, ... Empty for a trunk
that has it as constants. The last rows of the modulation are block k's shift and scale, or its
scale alone."""


class PatchEmbedder(nn.Module):
    """Patch convolution and position embedding, float32: they write the residual.

    Args:
        weight: [C, c, p, p]; bias: [C].
        position: [N, C], the position embedding at the export's grid, if the model adds one.

    Attributes:
        residual: type of the tokens.
    """

    residual = torch.float32

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, position: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.weight = constant(weight)
        self.bias = None if bias is None else constant(bias)
        self.position = None if position is None else constant(position)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        patches = functional.conv2d(latents, self.weight, self.bias, stride=self.weight.shape[-1])
        tokens = patches.flatten(2).transpose(1, 2)
        return (tokens if self.position is None else tokens + self.position).to(self.residual)


class Trunk(nn.Module, ABC):
    """Blocks 0..k-1 of a transformer.

    Args:
        embedder: latents [B, c, h', w'] -> tokens [B, N, C].
        output_norm: block k's own first norm with its modulation; applied by the feature tail.
        channels: C.
    """

    def __init__(
        self, embedder: nn.Module, output_norm: ModulatedNorm | ModulatedRMSNorm, channels: int
    ) -> None:
        super().__init__()
        self.channels = channels
        self.embedder = embedder
        self.output_norm = output_norm

    @abstractmethod
    def forward(self, latents: torch.Tensor, given: Given) -> torch.Tensor:
        """Hidden states [B, N, C], float32, that enter block k; image tokens only."""

    def modulate(self, z: torch.Tensor, given: Given) -> torch.Tensor:
        """Block k's own first norm and modulation of [B, N, C]."""
        rows = given["modulation"][-self.output_norm.rows :] if "modulation" in given else None
        modulated: torch.Tensor = self.output_norm(z, rows)
        return modulated
