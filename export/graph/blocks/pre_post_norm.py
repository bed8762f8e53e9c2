"""Blocks with a norm before and after each branch: Lumina2's and Z-Image's, and the trunk that they make.

The norms are RMSNorms with weights. The modulation scales the first and never shifts it, and its gate
multiplies what the second makes. The first blocks refine the image alone; those after them read text and
image as one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ditf.export.checkpoints.weights import Weights
from ditf.export.graph.blocks.adaln import ModulatedRMSNorm, Modulation
from ditf.export.graph.blocks.condition_tensors import PADDING_ROTARY, TEXT, TEXT_BIAS, ConditionTensors
from ditf.export.graph.blocks.gated_linear import read_gated
from ditf.export.graph.blocks.layers import (
    AttentionNames,
    GatedFeedForward,
    HeadProjection,
    Rotary,
    attention,
    constant,
)
from ditf.export.graph.blocks.smoothing import Channels, Smoothing
from ditf.export.graph.blocks.trunk import PatchEmbedder, ResidualOutput, Trunk
from ditf.export.graph.precision import Precision
from ditf.export.graph.range_probes import Stream, Where
from ditf.export.graph.roles import Role, Roles

SCALE_GATE_ROWS = 4
"""Modulation rows of a block: scale and gate of the attention, then of the feed-forward."""


def modulation_rows(layer: int) -> list[int]:
    """Modulation rows of blocks 0..k-1, and of block k's norm, which is scaled alone."""
    return [SCALE_GATE_ROWS] * layer + [1]


@dataclass(frozen=True)
class PrePostNormSpec:
    """What the blocks of a model are like, and where a block has its modules, from its own name on.

    Attributes:
        heads: of the queries.
        attention: module of the attention.
        norms: modules before and after the attention, before and after the feed-forward.
        feed_forward: gate, hidden and output linears.
        eps: of the norms; qk_eps: of those of query and key.
    """

    heads: int
    attention: str
    norms: tuple[str, str, str, str]
    feed_forward: tuple[str, str, str]
    eps: float
    qk_eps: float


class PrePostNormBlock(nn.Module):
    """x + gate * norm(attention(scale * norm(x))), and likewise its feed-forward.

    Args:
        weights, name: where its tensors are.
        modulation: `SCALE_GATE_ROWS` rows, or `UNMODULATED`.
        last: no block reads text and padding after this one: they are only key and value.
        stream: whose tokens it has.
    """

    roles: ClassVar[Roles] = {
        "project": Role.SELF_ATTENTION,
        "out": Role.SELF_ATTENTION,
        "feed_forward": Role.FEED_FORWARD,
        "feed_forward_out": Role.FEED_FORWARD,
    }

    def __init__(
        self,
        weights: Weights,
        name: str,
        spec: PrePostNormSpec,
        modulation: Modulation,
        precision: Precision,
        *,
        last: bool = False,
        stream: Stream = "image",
    ) -> None:
        super().__init__()
        before, after, before_ff, after_ff = (weights.tensor(f"{name}.{norm}.weight") for norm in spec.norms)
        attn, eps = f"{name}.{spec.attention}", spec.eps
        gate, hidden, out = (f"{name}.{part}" for part in spec.feed_forward)
        names = AttentionNames(
            (f"{attn}.to_q", f"{attn}.to_k", f"{attn}.to_v"),
            (f"{attn}.norm_q", f"{attn}.norm_k"),
            stream=stream,
            rotary=True,
            eps=spec.qk_eps,
        )
        self.last = last
        self.attended = Where(attn, stream)
        self.norm_attention = modulation.rms_norm(0, before, eps, self.attended)
        self.project = HeadProjection(weights, names, spec.heads, precision)
        self.out = read_gated(weights, f"{attn}.to_out.0", modulation.row(1), precision, stream, (after, eps))
        self.norm_feed_forward = modulation.rms_norm(2, before_ff, eps, Where(out, stream))
        self.feed_forward = GatedFeedForward(weights, (gate, hidden), precision, stream)
        self.feed_forward_out = read_gated(
            weights, out, modulation.row(3), precision, stream, (after_ff, eps)
        )
        self.residual_output = ResidualOutput()

    def forward(
        self,
        x: torch.Tensor,
        tokens: int,
        given: ConditionTensors,
        rotary: Rotary,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, M, C] -> the same, or the image alone [B, N, C] in the last block.

        Args:
            tokens: N, of the image, which come last.
            rotary: of all tokens.
            bias: [M], added to the logits.
        """
        query, key, value = self.project(self.norm_attention(x, given), rotary)
        if self.last:
            x, query = x[:, -tokens:], query[:, :, -tokens:]
        x = x + self.out(attention(query, key, value, self.attended, bias), given)
        hidden = self.feed_forward(self.norm_feed_forward(x, given))
        updated: torch.Tensor = self.residual_output(x, self.feed_forward_out(hidden, given))
        return updated

    def smoothings(self) -> Iterator[Smoothing]:
        channels = self.project.channels
        yield Smoothing(channels, [Channels("project.linear")], norm="norm_attention")
        yield Smoothing(channels, [Channels("feed_forward.up")], norm="norm_feed_forward")
        if self.project.kv_heads == self.project.heads:  # else several inputs read one value
            made = [self.project.values("project")]
            yield Smoothing(channels, [Channels("out.linear")], makers=made)
        hidden = int(self.feed_forward_out.linear.weight.shape[0])  # linear in the second half of `up`
        made = [Channels("feed_forward.up", hidden)]
        yield Smoothing(hidden, [Channels("feed_forward_out.linear")], makers=made)


class PrePostNormTrunk(Trunk):
    """Embedder, blocks over the image alone, then blocks over text and image.

    Given at run time: the modulation [4 k + 1, C]; the text [L, C], and its bias [L], since shorter texts
    stand at the end of L; the rotary embedding of the image's padding.

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
        blocks: Sequence[PrePostNormBlock],
        refiners: int,
        output_norm: ModulatedRMSNorm,
        text: torch.Tensor | None,
        rotary: Rotary,
        padding: torch.Tensor | None = None,
    ) -> None:
        super().__init__(embedder, output_norm)
        self.blocks = nn.ModuleList(blocks)
        self.refiners = refiners
        self.text = None if text is None else constant(text)
        self.padding = None if padding is None or not blocks else constant(padding)
        if blocks:
            self.cosine, self.sine = constant(rotary[0]), constant(rotary[1])

    def forward(self, latents: torch.Tensor, given: ConditionTensors) -> torch.Tensor:
        x: torch.Tensor = self.embedder(latents)
        if not self.blocks:
            return x
        tokens = x.shape[1]
        cosine, sine = self._rotary(given, tokens)
        if self.padding is not None:
            x = torch.cat([self.padding.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        beside, bias = x.shape[1], None
        for index, block in enumerate(self.blocks):
            if index == self.refiners:
                text = given[TEXT][None] if TEXT in given else self.text
                assert text is not None
                x = torch.cat([text.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
                if TEXT_BIAS in given:
                    bias = nn.functional.pad(given[TEXT_BIAS], (0, beside))
            x = block(x, tokens, given, (cosine[-x.shape[1] :], sine[-x.shape[1] :]), bias)
        return x

    def _rotary(self, given: ConditionTensors, tokens: int) -> Rotary:
        """Of all tokens; the padding's is given where the condition decides on it."""
        if self.padding is None or PADDING_ROTARY not in given:
            return self.cosine, self.sine
        text = len(self.cosine) - len(self.padding) - tokens
        cosine, sine = (
            torch.cat([table[:text], own.expand(len(self.padding), -1), table[-tokens:]])
            for table, own in zip((self.cosine, self.sine), given[PADDING_ROTARY], strict=True)
        )
        return cosine, sine
