"""Single-stream blocks: one sequence of text and image, attention and feed-forward side by side (FLUX)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ditf.export.checkpoints.weights import Weights
from ditf.export.graph.blocks.adaln import Modulation
from ditf.export.graph.blocks.condition_tensors import TEXT_IMAGE_BIAS, ConditionTensors
from ditf.export.graph.blocks.gated_linear import read_gated
from ditf.export.graph.blocks.layers import (
    AttentionNames,
    FeedForward,
    GatedFeedForward,
    HeadProjection,
    Rotary,
    attention,
    shared_value_bias,
)
from ditf.export.graph.blocks.smoothing import Channels, Smoothing
from ditf.export.graph.blocks.trunk import ResidualOutput
from ditf.export.graph.precision import Precision
from ditf.export.graph.range_probes import Where
from ditf.export.graph.roles import Role, Roles

SINGLE_ROWS = 3
"""Modulation rows of a block: shift, scale and gate."""


class SingleStreamBlock(nn.Module):
    """A single-stream block.

    Args:
        weights, name: where its tensors are.
        modulation: `SINGLE_ROWS` rows.
        last: no block reads the text after this one: it is only key and value.
    """

    roles: ClassVar[Roles] = {
        "project": Role.SELF_ATTENTION,
        "feed_forward": Role.FEED_FORWARD,
        "out": Role.ATTENTION_AND_FEED_FORWARD,
    }

    def __init__(
        self,
        weights: Weights,
        name: str,
        spec: SingleStreamSpec,
        modulation: Modulation,
        precision: Precision,
        last: bool,
    ) -> None:
        super().__init__()
        attn = f"{name}.attn"
        names = AttentionNames(
            (f"{attn}.to_q", f"{attn}.to_k", f"{attn}.to_v"),
            (f"{attn}.norm_q", f"{attn}.norm_k"),
            rotary=True,
        )
        self.last = last
        self.attended = Where(attn)
        self.norm = modulation.norm(0, spec.eps, self.attended)
        self.project = HeadProjection(weights, names, spec.heads, precision, shared=names)
        up = f"{name}.{spec.feed_forward}"
        self.feed_forward: FeedForward | GatedFeedForward
        if spec.gated:
            self.feed_forward = GatedFeedForward(weights, (up,), precision)
        else:
            self.feed_forward = FeedForward(weights, up, precision)
        value_bias, out = shared_value_bias(weights, names), f"{name}.{spec.out}"
        self.out = read_gated(weights, out, modulation.row(2), precision, value_bias=value_bias)
        self.residual_output = ResidualOutput()

    def forward(
        self, x: torch.Tensor, tokens: int, given: ConditionTensors, rotary: Rotary | None
    ) -> torch.Tensor:
        """Text then image [B, L + N, C] -> the same, or the image alone [B, N, C] in the last block.

        Args:
            tokens: N.
            rotary: of text and image tokens.
        """
        bias = given.get(TEXT_IMAGE_BIAS)
        normed = self.norm(x, given)
        query, key, value = self.project(normed, rotary)
        if self.last:
            x, normed, query = x[:, -tokens:], normed[:, -tokens:], query[:, :, -tokens:]
            if bias is not None and bias.ndim == 2:
                bias = bias[-tokens:]
        attended, hidden = attention(query, key, value, self.attended, bias), self.feed_forward(normed)
        wider = torch.promote_types(attended.dtype, hidden.dtype)  # the recipe may hold them apart
        hidden = torch.cat([attended.to(wider), hidden.to(wider)], dim=2)
        updated: torch.Tensor = self.residual_output(x, self.out(hidden, given))
        return updated

    def smoothings(self) -> Iterator[Smoothing]:
        channels = self.project.channels
        yield Smoothing(channels, [Channels("project.linear"), Channels("feed_forward.up")], norm="norm")
        # Of what the output reads, the values come first, the feed-forward's activations second.
        yield Smoothing(channels, [Channels("out.linear")], makers=[self.project.values("project")])


@dataclass(frozen=True)
class SingleStreamSpec:
    """What a single-stream block is like.

    FLUX.1's and Chroma's `FluxSingleTransformerBlock`, `Flux2SingleTransformerBlock`.

    Attributes:
        heads: of the attention.
        feed_forward: name of the feed-forward's first linear, from the block's own name on.
        out: name of the linear that reads attention and feed-forward together.
        gated: the first linear has the gate of the activations, then the activations.
        eps: of the LayerNorm.
    """

    heads: int
    feed_forward: str = "proj_mlp"
    out: str = "proj_out"
    gated: bool = False
    eps: float = 1e-6

    block: ClassVar[type[nn.Module]] = SingleStreamBlock
    rows: ClassVar = SINGLE_ROWS
    norms: ClassVar = ("norm",)
    """The module in the checkpoint whose linear makes the rows."""
