"""The truncated transformer: latents -> hidden states that enter block k, and block k's modulation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from ditf.export.graph.layers import ModulatedNorm, constant


class PatchEmbedder(nn.Module):
    """Patch convolution and position embedding, float32: they write the residual.

    Args:
        weight: [C, c, p, p]; bias: [C].
        position: [N, C], the position embedding at the export's grid.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, position: torch.Tensor) -> None:
        super().__init__()
        self.weight = constant(weight)
        self.bias = constant(bias)
        self.position = constant(position)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        patches = functional.conv2d(latents, self.weight, self.bias, stride=self.weight.shape[-1])
        return patches.flatten(2).transpose(1, 2) + self.position


class Trunk(nn.Module):
    """Blocks 0..k-1 of a transformer at a fixed timestep and condition.

    Args:
        embedder: latents [B, c, h', w'] -> tokens [B, N, C].
        blocks: k blocks, each residual -> residual.
        output_norm: block k's own first norm with its modulation; applied by the feature tail.
    """

    def __init__(self, embedder: nn.Module, blocks: Sequence[nn.Module], output_norm: ModulatedNorm) -> None:
        super().__init__()
        self.embedder = embedder
        self.blocks = nn.ModuleList(blocks)
        self.output_norm = output_norm

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, N, C], float32, that enter block k."""
        x: torch.Tensor = self.embedder(latents)
        for block in self.blocks:
            x = block(x)
        return x
