"""Blocks over image tokens alone: DiT's and PixArt's, and the trunk that they make.

Every block maps the residual [B, N, C] to the residual, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ditf.export.checkpoints.weights import Weights
from ditf.export.graph.blocks.adaln import UNGATED, ModulatedNorm, Modulation, Row
from ditf.export.graph.blocks.condition_tensors import KEYS, TEXT_BIAS, VALUES, ConditionTensors
from ditf.export.graph.blocks.gated_linear import GatedLinear, read_gated
from ditf.export.graph.blocks.layers import (
    AttentionNames,
    FeedForward,
    HeadProjection,
    Linear,
    attention,
    constant,
    read_linear,
    shared_value_bias,
    split_heads,
)
from ditf.export.graph.blocks.smoothing import Channels, Smoothing
from ditf.export.graph.blocks.trunk import PatchEmbedder, ResidualOutput, Trunk
from ditf.export.graph.precision import CROSS_ATTENTION_QUERY, Precision
from ditf.export.graph.range_probes import Where, probe
from ditf.export.graph.roles import Role, Roles

BLOCK_ROWS = 6
"""Modulation rows of a block: shift, scale and gate of the attention, then of the feed-forward."""


class SelfAttention(nn.Module):
    """Gated self-attention of a diffusers `Attention` (to_q, to_k, to_v, to_out.0).

    Args:
        name: of the attention in the checkpoint.
        gate: the row of the modulation that multiplies its output.
        norms: modules of the query's and the key's RMSNorm, if there are any.
    """

    def __init__(
        self,
        weights: Weights,
        name: str,
        heads: int,
        gate: Row,
        precision: Precision,
        norms: tuple[str, str] | None = None,
    ) -> None:
        super().__init__()
        names = AttentionNames((f"{name}.to_q", f"{name}.to_k", f"{name}.to_v"), norms)
        self.project = HeadProjection(weights, names, heads, precision, shared=names)
        self.where = Where(name)
        value_bias = shared_value_bias(weights, names)
        self.out = read_gated(weights, f"{name}.to_out.0", gate, precision, value_bias=value_bias)

    def forward(self, x: torch.Tensor, given: ConditionTensors) -> torch.Tensor:
        """Normed tokens [B, N, C] -> what is added to the residual [B, N, C]."""
        query, key, value = self.project(x)
        return self.out(attention(query, key, value, self.where), given)

    def smoothings(self) -> Iterator[Smoothing]:
        made = [self.project.values("project")]
        yield Smoothing(self.project.channels, [Channels("out.linear")], makers=made)


class CrossAttention(nn.Module):
    """Ungated cross-attention to text, whose keys and values [L, C] come with the condition.

    The query reads the residual without a norm (PixArt applies none there), so its GEMM is float32.

    Args:
        index: of the block, whose keys and values are read where they are given at run time.
        text: constant keys and values, each [L, C] float32; None when they are given.
    """

    def __init__(
        self,
        weights: Weights,
        name: str,
        heads: int,
        index: int,
        text: tuple[torch.Tensor, torch.Tensor] | None,
        precision: Precision,
    ) -> None:
        super().__init__()
        query = f"{name}.to_q"
        weight, bias = read_linear(weights, query)
        scale = (len(weight) // heads) ** -0.5
        dtype = precision.of(query, kept=CROSS_ATTENTION_QUERY)
        self.query = Linear(weight * scale, None, dtype)
        # Added after the split into heads, as in `HeadProjection`.
        self.query_bias = (
            None if bias is None else constant((bias * scale).reshape(1, heads, 1, -1).to(dtype))
        )
        self.where = Where(name)
        self.dtype = precision.of(name)
        self.index = index
        self.key = None if text is None else constant(text[0].to(self.dtype))
        self.value = None if text is None else constant(text[1].to(self.dtype))
        self.out = read_gated(weights, f"{name}.to_out.0", UNGATED, precision)
        self.heads = heads

    def forward(self, x: torch.Tensor, given: ConditionTensors) -> torch.Tensor:
        """The residual [B, N, C] -> what is added to it."""
        key, value, bias = self._text(given)
        query = split_heads(self.query(x), self.heads)
        if self.query_bias is not None:
            query = query + self.query_bias
        query = probe(self.where, "query", query.to(self.dtype))
        key, value = (
            split_heads(probe(self.where, "key", t.to(self.dtype)[None]), self.heads) for t in (key, value)
        )
        attended: torch.Tensor = self.out(attention(query, key, value, self.where, bias), given)
        return attended

    def _text(self, given: ConditionTensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values [L, C], and what is added to their logits, [L]."""
        if self.key is not None and self.value is not None:
            return self.key, self.value, None
        return given[KEYS][self.index], given[VALUES][self.index], given[TEXT_BIAS]


class FoldedCrossAttention(nn.Module):
    """Cross-attention to constant text, its query folded into the keys and its output into the values.

    Per head, (x Wq) K^T = x (Wq K^T) and (P V) Wo = P (V Wo): exact, and less work for short texts (`pays`).

    Args:
        text: keys and values, each [L, C] float32.
    """

    def __init__(
        self,
        weights: Weights,
        name: str,
        heads: int,
        text: tuple[torch.Tensor, torch.Tensor],
        precision: Precision,
    ) -> None:
        super().__init__()
        key, value = (t.unflatten(1, (heads, -1)).transpose(0, 1) for t in text)  # [H, L, D]
        source = f"{name}.to_q"
        weight, bias = read_linear(weights, source)
        query = weight.unflatten(0, (heads, -1)) * key.shape[-1] ** -0.5  # [H, D, C]
        folded_bias = None
        if bias is not None:
            folded_bias = (key @ (bias.reshape(heads, -1, 1) * key.shape[-1] ** -0.5)).flatten()
        dtype = precision.of(source, kept=CROSS_ATTENTION_QUERY)
        self.key = Linear((key @ query).flatten(0, 1), folded_bias, dtype)
        last = f"{name}.to_out.0"
        weight, bias = read_linear(weights, last)
        out = weight.unflatten(1, (heads, -1)).permute(1, 2, 0)  # [H, D, C]
        self.value = GatedLinear((value @ out).flatten(0, 1).T, bias, last, UNGATED, precision)
        self.heads = heads

    @staticmethod
    def pays(tokens: int, heads: int, channels: int) -> bool:
        """Whether 2 N C (H L) operations twice are fewer than two of N C C and two of N L C."""
        return tokens * (heads - 1) < channels

    def forward(self, x: torch.Tensor, given: ConditionTensors) -> torch.Tensor:
        """The residual [B, N, C] -> what is added to it."""
        # Softmax in float32: logits of an un-normalised residual may be large, and there are few of them.
        logits = self.key(x).unflatten(-1, (self.heads, -1))
        attended: torch.Tensor = self.value(torch.softmax(logits, dim=-1).flatten(2), given)
        return attended


@dataclass(frozen=True)
class DiTSpec:
    """What the blocks of a model are like.

    Attributes:
        heads: of the attentions.
        eps: epsilon of the norm before the attention, and of that before the feed-forward.
    """

    heads: int
    eps: tuple[float, float]


class DiTBlock(nn.Module):
    """A diffusers `BasicTransformerBlock` with AdaLN-zero.

    Args:
        weights, name: where its tensors are.
        modulation: `BLOCK_ROWS` rows.
        cross_attention: to the text, in a block that has one.
    """

    roles: ClassVar[Roles] = {
        "attention": Role.SELF_ATTENTION,
        "cross_attention": Role.CROSS_ATTENTION,
        "feed_forward": Role.FEED_FORWARD,
        "feed_forward_out": Role.FEED_FORWARD,
    }

    def __init__(
        self,
        weights: Weights,
        name: str,
        spec: DiTSpec,
        modulation: Modulation,
        precision: Precision,
        cross_attention: CrossAttention | FoldedCrossAttention | None = None,
    ) -> None:
        super().__init__()
        attn, feed_forward = f"{name}.attn1", f"{name}.ff"
        self.norm_attention = modulation.norm(0, spec.eps[0], Where(attn))
        self.attention = SelfAttention(weights, attn, spec.heads, modulation.row(2), precision)
        self.cross_attention = cross_attention
        self.norm_feed_forward = modulation.norm(3, spec.eps[1], Where(feed_forward))
        self.feed_forward = FeedForward(weights, f"{feed_forward}.net.0.proj", precision)
        self.feed_forward_out = read_gated(weights, f"{feed_forward}.net.2", modulation.row(5), precision)
        self.residual_output = ResidualOutput()

    def forward(self, x: torch.Tensor, given: ConditionTensors) -> torch.Tensor:
        x = x + self.attention(self.norm_attention(x, given), given)
        if self.cross_attention is not None:
            x = x + self.cross_attention(x, given)
        hidden = self.feed_forward(self.norm_feed_forward(x, given))
        updated: torch.Tensor = self.residual_output(x, self.feed_forward_out(hidden, given))
        return updated

    def smoothings(self) -> Iterator[Smoothing]:
        channels = self.attention.project.channels
        yield Smoothing(channels, [Channels("attention.project.linear")], norm="norm_attention")
        yield Smoothing(channels, [Channels("feed_forward.up")], norm="norm_feed_forward")


class DiTTrunk(Trunk):
    """Embedder and blocks over image tokens alone.

    Given at run time: the modulation [6 k + 2, C], and with text the keys and values [k, L, C] of its
    cross-attentions and the text's bias [L].
    """

    def __init__(
        self, embedder: PatchEmbedder, blocks: Sequence[DiTBlock], output_norm: ModulatedNorm
    ) -> None:
        super().__init__(embedder, output_norm)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, latents: torch.Tensor, given: ConditionTensors) -> torch.Tensor:
        x: torch.Tensor = self.embedder(latents)
        for block in self.blocks:
            x = block(x, given)
        return x
