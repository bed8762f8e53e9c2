"""Blocks of the traced transformer. With timestep and condition fixed, a DiT is a pre-norm transformer.

Every block maps the float32 residual [B, N, C] to the float32 residual.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from ditf.export.checkpoint import Weights
from ditf.export.graph.layers import Linear, ModulatedNorm, attention, constant, read_linear
from ditf.export.graph.precision import Precision


@dataclass(frozen=True)
class Modulation:
    """AdaLN-zero modulation of one block at a fixed timestep and condition; each [C], float32."""

    shift_attention: torch.Tensor
    scale_attention: torch.Tensor
    gate_attention: torch.Tensor
    shift_feed_forward: torch.Tensor
    scale_feed_forward: torch.Tensor
    gate_feed_forward: torch.Tensor

    @classmethod
    def unpack(cls, packed: torch.Tensor) -> Modulation:
        """From [6 * C] or [6, C], in diffusers' order (shift, scale, gate; attention first)."""
        return cls(*packed.reshape(6, -1))


class SelfAttention(nn.Module):
    """Gated self-attention branch of a diffusers `Attention` (to_q, to_k, to_v, to_out.0)."""

    def __init__(
        self, weights: Weights, name: str, heads: int, gate: torch.Tensor, precision: Precision
    ) -> None:
        super().__init__()
        weight, bias = read_linear(weights, *(f"{name}.to_{part}" for part in "qkv"))
        scale = torch.ones(len(weight), 1)
        scale[: len(weight) // 3] = (len(weight) // 3 // heads) ** -0.5  # the query's share
        self.qkv = Linear(weight * scale, None if bias is None else bias * scale[:, 0], precision.compute)
        self.out = Linear(*read_linear(weights, f"{name}.to_out.0"), precision.compute)
        self.gate = constant(gate)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return self.out(attention(query, key, value, self.heads)).to(torch.float32) * self.gate


class CrossAttention(nn.Module):
    """Ungated cross-attention to fixed text tokens: keys and values are constants.

    The query reads the residual un-normalised (PixArt applies no norm there), so its GEMM is float32.

    Args:
        text: [L, C] float32, the tokens attended to; masked ones already dropped, which is exact.
    """

    def __init__(
        self, weights: Weights, name: str, heads: int, text: torch.Tensor, precision: Precision
    ) -> None:
        super().__init__()
        dtype = precision.compute
        weight, bias = read_linear(weights, f"{name}.to_q")
        scale = (len(weight) // heads) ** -0.5
        self.query = Linear(weight * scale, None if bias is None else bias * scale, torch.float32)
        self.key, self.value = (
            constant(functional.linear(text, *read_linear(weights, f"{name}.to_{part}"))[None].to(dtype))
            for part in "kv"
        )
        self.out = Linear(*read_linear(weights, f"{name}.to_out.0"), precision.compute)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.query(x).to(self.key.dtype)
        return self.out(attention(query, self.key, self.value, self.heads)).to(torch.float32)


class FeedForward(nn.Module):
    """Gated feed-forward branch of a diffusers `FeedForward` with gelu-approximate."""

    def __init__(self, weights: Weights, name: str, gate: torch.Tensor, precision: Precision) -> None:
        super().__init__()
        self.up = Linear(*read_linear(weights, f"{name}.net.0.proj"), precision.compute)
        self.down = Linear(*read_linear(weights, f"{name}.net.2"), precision.compute)
        self.gate = constant(gate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = functional.gelu(self.up(x), approximate="tanh")
        return self.down(hidden).to(torch.float32) * self.gate


class Block(nn.Module):
    """A diffusers `BasicTransformerBlock` with AdaLN-zero, its modulation fixed.

    Args:
        weights, name: where its tensors are.
        heads: attention heads.
        modulation: at the export's timestep and condition.
        eps: (first norm, last norm).
        text: [L, C] for a block with cross-attention, else None.
        precision: of the graph.
    """

    def __init__(
        self,
        weights: Weights,
        name: str,
        heads: int,
        modulation: Modulation,
        eps: tuple[float, float],
        text: torch.Tensor | None,
        precision: Precision,
    ) -> None:
        super().__init__()
        m = modulation
        self.norm_attention = ModulatedNorm(m.scale_attention, m.shift_attention, eps[0])
        self.attention = SelfAttention(weights, f"{name}.attn1", heads, m.gate_attention, precision)
        self.cross_attention = (
            None if text is None else CrossAttention(weights, f"{name}.attn2", heads, text, precision)
        )
        self.norm_feed_forward = ModulatedNorm(m.scale_feed_forward, m.shift_feed_forward, eps[1])
        self.feed_forward = FeedForward(weights, f"{name}.ff", m.gate_feed_forward, precision)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_attention(x))
        if self.cross_attention is not None:
            x = x + self.cross_attention(x)
        return x + self.feed_forward(self.norm_feed_forward(x))
