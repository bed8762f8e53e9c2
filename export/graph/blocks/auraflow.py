"""AuraFlow's blocks: gated feed-forwards, LayerNorm of query and key, no bias, and a residual of their own.

The attention's output does not join the residual. Norm and feed-forward read the sum of the two, and the
feed-forward's output is added to what entered the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ditf.export.checkpoints.weights import Weights
from ditf.export.graph.blocks.adaln import Modulation
from ditf.export.graph.blocks.condition_tensors import ConditionTensors
from ditf.export.graph.blocks.gated_linear import read_gated
from ditf.export.graph.blocks.layers import (
    AttentionNames,
    GatedFeedForward,
    HeadProjection,
    Heads,
    Rotary,
    attention,
)
from ditf.export.graph.blocks.smoothing import Channels, Smoothing
from ditf.export.graph.blocks.trunk import ResidualOutput
from ditf.export.graph.blocks.two_stream import IMAGE_ROWS, ConstantText
from ditf.export.graph.precision import Precision
from ditf.export.graph.range_probes import Stream, Where
from ditf.export.graph.roles import Role, Roles

_EPS = 1e-5  # FP32LayerNorm's default
_QK_EPS = 1e-5  # diffusers Attention's default


class AuraFlowStream(nn.Module):
    """One stream of a block: norm and heads before the attention, feed-forward after it.

    Args:
        modulation: six rows, or those of the norm alone where the stream is only attended to.
        stream: the text's side of a joint block has modules of other names.
        attended_only: the stream is only key and value.
    """

    def __init__(
        self,
        weights: Weights,
        name: str,
        heads: int,
        modulation: Modulation,
        precision: Precision,
        stream: Stream = "image",
        attended_only: bool = False,
    ) -> None:
        super().__init__()
        text = stream == "text"
        self.roles: Roles = {}
        if not text:
            self.roles = {
                "project": Role.SELF_ATTENTION,
                "out": Role.SELF_ATTENTION,
                "feed_forward": Role.FEED_FORWARD,
                "feed_forward_out": Role.FEED_FORWARD,
            }
        self.attended_only = attended_only
        attn, feed_forward = f"{name}.attn", f"{name}.ff_context" if text else f"{name}.ff"
        projections = ("add_q_proj", "add_k_proj", "add_v_proj") if text else ("to_q", "to_k", "to_v")
        norms = ("norm_added_q", "norm_added_k") if text else ("norm_q", "norm_k")
        names = AttentionNames(
            tuple(f"{attn}.{part}" for part in projections),  # type: ignore[arg-type]
            (f"{attn}.{norms[0]}", f"{attn}.{norms[1]}"),
            stream=stream,
            centred=True,
            eps=_QK_EPS,
        )
        self.attended = Where(attn, stream)
        self.norm_attention = modulation.norm(0, _EPS, self.attended)
        self.project = HeadProjection(weights, names, heads, precision, query=not attended_only)
        if attended_only:
            return
        out, down = f"{attn}.to_add_out" if text else f"{attn}.to_out.0", f"{feed_forward}.out_projection"
        self.out = read_gated(weights, out, modulation.row(2), precision, stream)
        self.norm_feed_forward = modulation.norm(3, _EPS, Where(down, stream))
        up = (f"{feed_forward}.linear_1", f"{feed_forward}.linear_2")
        self.feed_forward = GatedFeedForward(weights, up, precision, stream)
        self.feed_forward_out = read_gated(weights, down, modulation.row(5), precision, stream)

    def heads_of(self, x: torch.Tensor, given: ConditionTensors) -> Heads:
        """Query (None where the stream is only attended to), key and value, [B, H, N, D]."""
        heads: Heads = self.project(self.norm_attention(x, given))
        return heads

    def branch(self, x: torch.Tensor, attended: torch.Tensor, given: ConditionTensors) -> torch.Tensor:
        """What is added to the stream's residual [B, N, C]."""
        hidden = self.feed_forward(self.norm_feed_forward(x + self.out(attended, given), given))
        branch: torch.Tensor = self.feed_forward_out(hidden, given)
        return branch

    def smoothings(self) -> Iterator[Smoothing]:
        yield Smoothing(self.project.channels, [Channels("project.linear")], norm="norm_attention")
        if self.attended_only:
            return
        yield Smoothing(self.project.channels, [Channels("feed_forward.up")], norm="norm_feed_forward")
        hidden = int(self.feed_forward_out.linear.weight.shape[0])  # linear in the second half of `up`
        made = [Channels("feed_forward.up", hidden)]
        yield Smoothing(hidden, [Channels("feed_forward_out.linear")], makers=made)


class AuraFlowJointBlock(nn.Module):
    """`AuraFlowJointTransformerBlock`; made and called as `TwoStreamBlock`, and always reads the text."""

    roles: ClassVar[Roles] = {"text": Role.TEXT_STREAM}
    reads_text = True

    def __init__(
        self,
        weights: Weights,
        name: str,
        spec: AuraFlowJointSpec,
        image: Modulation,
        text: Modulation,
        precision: Precision,
        last: bool,
        constant_text: ConstantText | None,
    ) -> None:
        super().__init__()
        self.image = AuraFlowStream(weights, name, spec.heads, image, precision)
        self.text = AuraFlowStream(weights, name, spec.heads, text, precision, "text", last)
        self.last = last
        self.attended = Where(self.image.attended.name, "both")
        self.residual_output = ResidualOutput()

    def forward(
        self,
        x: torch.Tensor,
        text: torch.Tensor,
        given: ConditionTensors,
        rotary: Rotary | None,
        text_rotary: Rotary | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value = self.image.heads_of(x, given)
        text_query, text_key, text_value = self.text.heads_of(text, given)
        queries = [tensor for tensor in (query, text_query) if tensor is not None]
        attended = attention(
            torch.cat(queries, dim=2),
            torch.cat([key, text_key], dim=2),
            torch.cat([value, text_value], dim=2),
            self.attended,
        )
        tokens = x.shape[1]
        if not self.last:
            text = text + self.text.branch(text, attended[:, tokens:], given)
        return self.residual_output(x, self.image.branch(x, attended[:, :tokens], given)), text

    def smoothings(self) -> Iterator[Smoothing]:
        readers = [Channels("image.out.linear"), *([] if self.last else [Channels("text.out.linear")])]
        makers = [self.image.project.values("image.project"), self.text.project.values("text.project")]
        yield Smoothing(self.image.project.channels, readers, makers=makers)


class AuraFlowSingleBlock(nn.Module):
    """`AuraFlowSingleTransformerBlock`; made and called as `SingleStreamBlock`."""

    def __init__(
        self,
        weights: Weights,
        name: str,
        spec: AuraFlowSingleSpec,
        modulation: Modulation,
        precision: Precision,
        last: bool,
    ) -> None:
        super().__init__()
        self.stream = AuraFlowStream(weights, name, spec.heads, modulation, precision)
        self.last = last
        self.residual_output = ResidualOutput()

    def forward(
        self, x: torch.Tensor, tokens: int, given: ConditionTensors, rotary: Rotary | None
    ) -> torch.Tensor:
        query, key, value = self.stream.heads_of(x, given)
        assert query is not None
        if self.last:
            x, query = x[:, -tokens:], query[:, :, -tokens:]
        attended = attention(query, key, value, self.stream.attended)
        updated: torch.Tensor = self.residual_output(x, self.stream.branch(x, attended, given))
        return updated

    def smoothings(self) -> Iterator[Smoothing]:
        made = [self.stream.project.values("stream.project")]
        yield Smoothing(self.stream.project.channels, [Channels("stream.out.linear")], makers=made)


@dataclass(frozen=True)
class AuraFlowJointSpec:
    """What a block with two streams is like; attributes as of `TwoStreamSpec`."""

    heads: int

    block: ClassVar[type[nn.Module]] = AuraFlowJointBlock
    image_rows: ClassVar = IMAGE_ROWS
    norms: ClassVar = ("norm1", "norm1_context")
    text_rotary: ClassVar = False
    eps: ClassVar = _EPS


@dataclass(frozen=True)
class AuraFlowSingleSpec:
    """What a block over one sequence is like; attributes as of `SingleStreamSpec`."""

    heads: int

    block: ClassVar[type[nn.Module]] = AuraFlowSingleBlock
    rows: ClassVar = IMAGE_ROWS
    norms: ClassVar = ("norm1",)
    eps: ClassVar = _EPS
