"""Blocks whose branches are normed before and after: Lumina2's and Z-Image's, and the trunk they make.

RMSNorms with weights: the first is scaled and never shifted, the second is what the gate multiplies. The
first blocks refine the image alone, those after them read text and image as one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ditf.export.checkpoints.weights import Weights
from ditf.export.graph.blocks.adaln import ModulatedRMSNorm, read_gated
from ditf.export.graph.blocks.layers import (
    AttentionNames,
    GatedFeedForward,
    HeadProjection,
    Rotary,
    attention,
    constant,
)
from ditf.export.graph.blocks.smoothing import Columns, Smoothing
from ditf.export.graph.blocks.trunk import Given, PatchEmbedder, Trunk
from ditf.export.graph.blocks.two_stream import Rows
from ditf.export.graph.precision import Precision
from ditf.export.graph.range_probes import Stream, Where

ROWS = 4  # scale and gate of the attention, then of the feed-forward
PADDING_ROTARY = "padding_rotary"


@dataclass(frozen=True)
class SandwichNames:
    """Where a block has its modules, from its own name on.

    Attributes:
        norms: before and after the attention, before and after the feed-forward.
        feed_forward: gate, hidden and output linears.
    """

    attention: str
    norms: tuple[str, str, str, str]
    feed_forward: tuple[str, str, str]


class SandwichBlock(nn.Module):
    """x + gate * norm(attention(scale * norm(x))), and likewise its feed-forward.

    Args:
        weights, name, names: where its tensors are.
        heads: of the queries.
        rows: modulation [4, C]; None when given, or when the block has none.
        eps: of its norms, and of those of query and key.
        last: no block reads text and padding after this one: they are only key and value.
        stream: whose tokens it has, where they are not the image's.
    """

    def __init__(
        self,
        weights: Weights,
        name: str,
        names: SandwichNames,
        heads: int,
        precision: Precision,
        *,
        rows: Rows,
        eps: tuple[float, float],
        last: bool = False,
        stream: Stream = "image",
    ) -> None:
        super().__init__()
        before, after, before_ff, after_ff = (weights.tensor(f"{name}.{norm}.weight") for norm in names.norms)
        attn = f"{name}.{names.attention}"
        gate, hidden, out = (f"{name}.{part}" for part in names.feed_forward)
        heads_of = AttentionNames(
            (f"{attn}.to_q", f"{attn}.to_k", f"{attn}.to_v"),
            (f"{attn}.norm_q", f"{attn}.norm_k"),
            stream=stream,
            rotary=True,
            eps=eps[1],
        )
        fixed = (None,) * ROWS if rows is None else rows
        first, second = (None, None) if rows is None else (rows[0:1], rows[2:3])
        self.last = last
        self.attended = Where(attn, stream)
        self.norm_attention = ModulatedRMSNorm(before, first, eps[0], self.attended)
        self.project = HeadProjection(weights, heads_of, heads, precision)
        self.out = read_gated(weights, f"{attn}.to_out.0", fixed[1], precision, stream, (after, eps[0]))
        self.norm_feed_forward = ModulatedRMSNorm(before_ff, second, eps[0], Where(out, stream))
        self.feed_forward = GatedFeedForward(weights, (gate, hidden), precision, stream)
        self.feed_forward_out = read_gated(weights, out, fixed[3], precision, stream, (after_ff, eps[0]))

    def forward(
        self,
        x: torch.Tensor,
        tokens: int,
        rotary: Rotary,
        rows: Rows = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, M, C] -> the same, or [B, N, C] in the last block.

        Args:
            tokens: N, of the image, which come last.
            rotary: of all tokens.
            bias: [M], added to the logits.
        """
        given = (None,) * ROWS if rows is None else rows
        first, second = (None, None) if rows is None else (rows[0:1], rows[2:3])
        query, key, value = self.project(self.norm_attention(x, first), rotary)
        if self.last:
            x, query = x[:, -tokens:], query[:, :, -tokens:]
        x = x + self.out(attention(query, key, value, self.attended, bias), given[1])
        hidden = self.feed_forward(self.norm_feed_forward(x, second))
        updated: torch.Tensor = x + self.feed_forward_out(hidden, given[3])
        return updated

    def smoothings(self) -> Iterator[Smoothing]:
        channels = self.project.channels
        yield Smoothing(channels, [Columns("project.linear")], norm="norm_attention")
        yield Smoothing(channels, [Columns("feed_forward.up")], norm="norm_feed_forward")
        if self.project.kv_heads == self.project.heads:  # else several inputs read one value
            made = [self.project.values("project")]
            yield Smoothing(channels, [Columns("out.linear")], makers=made)
        hidden = int(self.feed_forward_out.linear.weight.shape[0])  # linear in the second half of `up`
        made = [Columns("feed_forward.up", hidden)]
        yield Smoothing(hidden, [Columns("feed_forward_out.linear")], makers=made)


class SandwichTrunk(Trunk):
    """Embedder, blocks over the image alone, then blocks over text and image.

    Given at run time: `modulation` [4 k + 1, C], `text` [L, C], and `text_bias` [L] of texts that are
    shorter, which stand at the end of L; `padding_rotary` [2, 1, D / 2], cosines and sines of the padding.

    Args:
        embedder: latents -> tokens.
        refiners: how many blocks have the image alone.
        output_norm: block k's.
        text: [1, L, C] float32, where it is constant.
        rotary: of text, padding and image tokens, [L + P + N, D / 2].
        padding: [P, C] float32, tokens beside the image's, which every block reads.
    """

    def __init__(
        self,
        embedder: PatchEmbedder,
        blocks: Sequence[SandwichBlock],
        refiners: int,
        output_norm: ModulatedRMSNorm,
        text: torch.Tensor | None,
        rotary: Rotary,
        padding: torch.Tensor | None = None,
    ) -> None:
        super().__init__(embedder, output_norm, embedder.weight.shape[0])
        self.blocks = nn.ModuleList(blocks)
        self.refiners = refiners
        self.text = None if text is None else constant(text)
        self.padding = None if padding is None or not blocks else constant(padding)
        if blocks:
            self.cosine, self.sine = constant(rotary[0]), constant(rotary[1])

    def forward(self, latents: torch.Tensor, given: Given) -> torch.Tensor:
        x: torch.Tensor = self.embedder(latents)
        if not self.blocks:
            return x
        tokens = x.shape[1]
        cosine, sine = self._rotary(given, tokens)
        rows: Sequence[Rows] = (None,) * len(self.blocks)
        if "modulation" in given:
            rows = given["modulation"].split([ROWS] * len(self.blocks) + [1])[:-1]
        if self.padding is not None:
            x = torch.cat([self.padding.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        beside, bias = x.shape[1], None
        for index, block in enumerate(self.blocks):
            if index == self.refiners:
                text = given["text"][None] if "text" in given else self.text
                assert text is not None
                x = torch.cat([text.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
                if "text_bias" in given:
                    bias = nn.functional.pad(given["text_bias"], (0, beside))
            rotary = (cosine[-x.shape[1] :], sine[-x.shape[1] :])
            x = block(x, tokens, rotary, rows[index], bias)
        return x

    def _rotary(self, given: Given, tokens: int) -> Rotary:
        """Of all tokens; the padding's own where the condition decides on it."""
        if self.padding is None or PADDING_ROTARY not in given:
            return self.cosine, self.sine
        text = len(self.cosine) - len(self.padding) - tokens
        cosine, sine = (
            torch.cat([table[:text], own.expand(len(self.padding), -1), table[-tokens:]])
            for table, own in zip((self.cosine, self.sine), given[PADDING_ROTARY], strict=True)
        )
        return cosine, sine
