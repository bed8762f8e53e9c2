"""One stream of image tokens: DiT's and PixArt's blocks, and the trunk they make.

Every block maps the float32 residual [B, N, C] to the float32 residual.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ditf.export.checkpoints.weights import Weights
from ditf.export.graph.blocks.adaln import GatedLinear, ModulatedNorm, read_gated
from ditf.export.graph.blocks.layers import (
    AttentionNames,
    FeedForward,
    HeadProjection,
    Linear,
    attention,
    constant,
    read_linear,
    split_heads,
)
from ditf.export.graph.blocks.smoothing import Columns, Smoothing
from ditf.export.graph.blocks.trunk import Given, PatchEmbedder, Trunk
from ditf.export.graph.precision import Precision
from ditf.export.graph.range_probes import Where, tap

ROWS = 6  # shift, scale, gate of the attention, then of the feed-forward


class SelfAttention(nn.Module):
    """Gated self-attention of a diffusers `Attention` (to_q, to_k, to_v, to_out.0)."""

    def __init__(
        self,
        weights: Weights,
        name: str,
        heads: int,
        gate: torch.Tensor | None,
        precision: Precision,
        norms: tuple[str, str] | None = None,
    ) -> None:
        super().__init__()
        names = AttentionNames((f"{name}.to_q", f"{name}.to_k", f"{name}.to_v"), norms)
        self.project = HeadProjection(weights, names, heads, precision)
        self.where = Where(name)
        self.out = read_gated(weights, f"{name}.to_out.0", gate, precision)

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        query, key, value = self.project(x)
        return self.out(attention(query, key, value, self.where), gate)

    def smoothings(self) -> Iterator[Smoothing]:
        made = [self.project.values("project")]
        yield Smoothing(self.project.channels, [Columns("out.linear")], makers=made)


class CrossAttention(nn.Module):
    """Ungated cross-attention to text, whose keys and values [L, C] come with the condition.

    The query reads the residual un-normalised (PixArt applies no norm there), so its GEMM is float32.

    Args:
        text: keys and values, each [L, C] float32; None when they are given.
    """

    def __init__(
        self,
        weights: Weights,
        name: str,
        heads: int,
        text: tuple[torch.Tensor, torch.Tensor] | None,
        precision: Precision,
    ) -> None:
        super().__init__()
        weight, bias = read_linear(weights, f"{name}.to_q")
        scale = (len(weight) // heads) ** -0.5
        self.query = Linear(weight * scale, None if bias is None else bias * scale, torch.float32)
        self.where = Where(name)
        self.dtype = precision.of(name)
        self.key = None if text is None else constant(text[0].to(self.dtype))
        self.value = None if text is None else constant(text[1].to(self.dtype))
        self.out = read_gated(weights, f"{name}.to_out.0", None, precision)
        self.heads = heads

    def forward(
        self, x: torch.Tensor, text: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None
    ) -> torch.Tensor:
        """`text`: keys and values [L, C], and what is added to their logits [L]."""
        if text is None:
            assert self.key is not None
            assert self.value is not None
            text = (self.key, self.value, None)
        key, value, bias = text
        query = split_heads(tap(self.where, "query", self.query(x).to(self.dtype)), self.heads)
        key, value = (
            split_heads(tap(self.where, "key", t.to(self.dtype)[None]), self.heads) for t in (key, value)
        )
        attended: torch.Tensor = self.out(attention(query, key, value, self.where, bias))
        return attended


class FoldedCrossAttention(nn.Module):
    """Cross-attention to constant text, its query folded into the keys and its output into the values.

    Per head, (x Wq) K^T = x (Wq K^T) and (P V) Wo = P (V Wo): exact, and less work for short texts (`pays`).
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
        weight, bias = read_linear(weights, f"{name}.to_q")
        query = weight.unflatten(0, (heads, -1)) * key.shape[-1] ** -0.5  # [H, D, C]
        folded_bias = None
        if bias is not None:
            folded_bias = (key @ (bias.reshape(heads, -1, 1) * key.shape[-1] ** -0.5)).flatten()
        self.key = Linear((key @ query).flatten(0, 1), folded_bias, torch.float32)  # reads the residual
        last = f"{name}.to_out.0"
        weight, bias = read_linear(weights, last)
        out = weight.unflatten(1, (heads, -1)).permute(1, 2, 0)  # [H, D, C]
        self.value = GatedLinear((value @ out).flatten(0, 1).T, bias, last, None, precision)
        self.heads = heads

    @staticmethod
    def pays(tokens: int, heads: int, channels: int) -> bool:
        """Whether 2 N C (H L) operations twice are fewer than two of N C C and two of N L C."""
        return tokens * (heads - 1) < channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Softmax in float32: logits of an un-normalised residual may be large, and there are few of them.
        logits = self.key(x).unflatten(-1, (self.heads, -1))
        attended: torch.Tensor = self.value(torch.softmax(logits, dim=-1).flatten(2))
        return attended


class StreamBlock(nn.Module):
    """A diffusers `BasicTransformerBlock` with AdaLN-zero.

    Args:
        weights, name: where its tensors are.
        heads: attention heads.
        rows: modulation [6, C], or None when it is given.
        eps: (first norm, last norm).
        cross_attention: of a block that has one.
        precision: of the graph.
    """

    def __init__(
        self,
        weights: Weights,
        name: str,
        heads: int,
        rows: torch.Tensor | None,
        eps: tuple[float, float],
        cross_attention: nn.Module | None,
        precision: Precision,
    ) -> None:
        super().__init__()
        fixed = (None,) * ROWS if rows is None else rows
        self.norm_attention = ModulatedNorm(
            None if rows is None else rows[0:2], eps[0], Where(f"{name}.attn1")
        )
        self.attention = SelfAttention(weights, f"{name}.attn1", heads, fixed[2], precision)
        self.cross_attention = cross_attention
        self.norm_feed_forward = ModulatedNorm(
            None if rows is None else rows[3:5], eps[1], Where(f"{name}.ff")
        )
        self.feed_forward = FeedForward(weights, f"{name}.ff.net.0.proj", precision)
        self.feed_forward_out = read_gated(weights, f"{name}.ff.net.2", fixed[5], precision)

    def forward(
        self, x: torch.Tensor, rows: torch.Tensor | None = None, text: tuple[torch.Tensor, ...] | None = None
    ) -> torch.Tensor:
        given = (None,) * ROWS if rows is None else rows
        head, tail = (None, None) if rows is None else (rows[0:2], rows[3:5])
        x = x + self.attention(self.norm_attention(x, head), given[2])
        if self.cross_attention is not None:
            x = x + (self.cross_attention(x) if text is None else self.cross_attention(x, text))
        return x + self.feed_forward_out(self.feed_forward(self.norm_feed_forward(x, tail)), given[5])

    def smoothings(self) -> Iterator[Smoothing]:
        channels = self.attention.project.channels
        yield Smoothing(channels, [Columns("attention.project.linear")], norm="norm_attention")
        yield Smoothing(channels, [Columns("feed_forward.up")], norm="norm_feed_forward")


class StreamTrunk(Trunk):
    """Embedder and blocks over image tokens alone.

    Given at run time: `modulation` [6 k + 2, C], and with text `keys` and `values` [k, L, C] and
    `text_bias` [L].
    """

    def __init__(
        self, embedder: PatchEmbedder, blocks: Sequence[nn.Module], output_norm: ModulatedNorm
    ) -> None:
        super().__init__(embedder, output_norm, embedder.weight.shape[0])
        self.blocks = nn.ModuleList(blocks)

    def forward(self, latents: torch.Tensor, given: Given) -> torch.Tensor:
        x: torch.Tensor = self.embedder(latents)
        rows: Sequence[torch.Tensor | None] = (None,) * len(self.blocks)
        if "modulation" in given:
            rows = given["modulation"].split([ROWS] * len(self.blocks) + [2])[:-1]
        for index, block in enumerate(self.blocks):
            text = None
            if "keys" in given:
                text = (given["keys"][index], given["values"][index], given["text_bias"])
            x = block(x, rows[index], text)
        return x
