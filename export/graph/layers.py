"""Layers of the traced transformer: float32 in, float32 out, what is between in the graph's precision.

Weights are kept [in, out], so that the graph has no Transpose in front of a MatMul.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from ditf.export.checkpoint import Weights


def constant(tensor: torch.Tensor) -> nn.Parameter:
    """A frozen parameter: named in the graph, counted in the manifest."""
    return nn.Parameter(tensor.detach().clone().contiguous(), requires_grad=False)


class Linear(nn.Module):
    """x W + b in the type of W.

    Args:
        weight: [out, in], as torch.nn.Linear keeps it, float32.
        bias: [out] float32, or None.
        dtype: type of the product.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = constant(weight.T.to(dtype))
        self.bias = None if bias is None else constant(bias.to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.to(self.weight.dtype) @ self.weight
        return y if self.bias is None else y + self.bias


def read_linear(weights: Weights, *names: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [out, in] and bias of one linear layer, or of several stacked along out."""
    weight = torch.cat([weights.tensor(f"{name}.weight") for name in names])
    if f"{names[0]}.bias" not in weights:
        return weight, None
    return weight, torch.cat([weights.tensor(f"{name}.bias") for name in names])


class ModulatedNorm(nn.Module):
    """(1 + scale) * LayerNorm(x) + shift, float32, as one LayerNormalization node.

    With scale and shift fixed they are the norm's own affine parameters: the modulation costs no node
    and no rounding, and TensorRT computes the whole in float32.

    Args:
        scale, shift: [C] float32.
        eps: of the model's own norm.
    """

    def __init__(self, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight = constant(1.0 + scale)
        self.bias = constant(shift)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """Multi-head attention [B, N, C] x [B, M, C] -> [B, N, C].

    The query is expected to be scaled by head_dim**-0.5 already: folded into its weights, that is
    free and keeps the logits small in float16. Written out rather than left to torch's exporter,
    which scales query and key separately.
    """
    query, key, value = (_split(x, heads) for x in (query, key, value))
    weights = torch.softmax(query @ key.transpose(-1, -2), dim=-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def _split(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
