"""The truncated transformer: latents -> hidden states that enter block k, and block k's modulation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from ditf.export.graph.blocks.adaln import ModulatedNorm, ModulatedRMSNorm
from ditf.export.graph.blocks.condition_tensors import ConditionTensors
from ditf.export.graph.blocks.layers import constant
from ditf.export.graph.precision import Precision
from ditf.export.graph.roles import Role, Roles


class PatchEmbedder(nn.Module):
    """Patch convolution and position embedding, in float32: they write the residual.

    Args:
        weight: [C, c, p, p]; bias: [C], or None.
        position: the position embedding [N, C] at the export's grid, if the model adds one.
        precision: of the graph, which says the residual's type.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        position: torch.Tensor | None,
        precision: Precision,
    ) -> None:
        super().__init__()
        self.residual = precision.residual
        self.weight = constant(weight)
        self.bias = None if bias is None else constant(bias)
        self.position = None if position is None else constant(position)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, c, h', w'] -> tokens [B, N, C]."""
        patches = functional.conv2d(latents, self.weight, self.bias, stride=self.weight.shape[-1])
        tokens = patches.flatten(2).transpose(1, 2)
        return (tokens if self.position is None else tokens + self.position).to(self.residual)


class ResidualOutput(nn.Module):
    """The last addition of a block: its result is the image's residual that leaves the block.

    A block names this module `residual_output`. The scope of that name is how
    `ditf.export.onnx_writing.value_names` finds the hidden states in the traced graph.
    """

    def forward(self, residual: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        return residual + branch


class Trunk(nn.Module, ABC):
    """Blocks 0..k-1 of a transformer, and the feature tap behind them.

    The tap is in two steps, because the feature's definition may average and discard in between: `forward`
    returns the hidden states that enter block k, and `modulate` applies block k's own first norm to them.

    Args:
        embedder: latents [B, c, h', w'] -> tokens [B, N, C].
        output_norm: block k's own first norm with its modulation.
    """

    roles: ClassVar[Roles] = {
        "embedder": Role.EMBEDDERS,
        "text": Role.TEXT_STREAM,
        "text_bias": Role.TEXT_STREAM,
        "text_bias_rows": Role.TEXT_STREAM,
        "padding": Role.EMBEDDERS,
        "cosine": Role.EMBEDDERS,
        "sine": Role.EMBEDDERS,
    }

    def __init__(self, embedder: PatchEmbedder, output_norm: ModulatedNorm | ModulatedRMSNorm) -> None:
        super().__init__()
        self.channels = int(embedder.weight.shape[0])
        self.embedder = embedder
        self.output_norm = output_norm

    @abstractmethod
    def forward(self, latents: torch.Tensor, given: ConditionTensors) -> torch.Tensor:
        """Hidden states [B, N, C], float32, that enter block k; image tokens only."""

    def modulate(self, z: torch.Tensor, given: ConditionTensors) -> torch.Tensor:
        """Block k's own first norm and modulation of hidden states [B, N, C], float32."""
        modulated: torch.Tensor = self.output_norm(z, given)
        return modulated
