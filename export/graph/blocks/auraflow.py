"""AuraFlow's blocks: gated feed-forwards, LayerNorm of query and key, no bias, and a residual of their own.

The attention's output does not join the residual: norm and feed-forward read their sum, and what the
feed-forward says is added to what entered the block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ditf.export.checkpoints.weights import Weights
from ditf.export.graph.blocks.adaln import ModulatedNorm, read_gated
from ditf.export.graph.blocks.layers import (
    AttentionNames,
    GatedFeedForward,
    HeadProjection,
    Rotary,
    attention,
)
from ditf.export.graph.blocks.smoothing import Columns, Smoothing
from ditf.export.graph.blocks.two_stream import Rows
from ditf.export.graph.precision import Precision
from ditf.export.graph.range_probes import Stream as Tokens
from ditf.export.graph.range_probes import Where

NORM_EPS = 1e-5  # FP32LayerNorm's default
_QK_EPS = 1e-5  # diffusers Attention's default


class Stream(nn.Module):
    """One stream of a block: norm and heads before the attention, feed-forward after it.

    Args:
        text: whether it is the text's side of a joint block, whose modules have other names.
        rows: modulation [6, C], or [2, C] where `last`; None when given.
        last: the stream is only key and value.
    """

    def __init__(
        self,
        weights: Weights,
        name: str,
        heads: int,
        precision: Precision,
        *,
        text: bool = False,
        rows: Rows,
        last: bool = False,
    ) -> None:
        super().__init__()
        self.last = last
        attn = f"{name}.attn"
        projections = ("add_q_proj", "add_k_proj", "add_v_proj") if text else ("to_q", "to_k", "to_v")
        norms = ("norm_added_q", "norm_added_k") if text else ("norm_q", "norm_k")
        names = AttentionNames(
            tuple(f"{attn}.{part}" for part in projections),  # type: ignore[arg-type]
            (f"{attn}.{norms[0]}", f"{attn}.{norms[1]}"),
            stream="text" if text else "image",
            centred=True,
            eps=_QK_EPS,
        )
        tokens: Tokens = "text" if text else "image"
        self.attended = Where(attn, tokens)
        self.norm_attention = ModulatedNorm(None if rows is None else rows[:2], NORM_EPS, self.attended)
        self.project = HeadProjection(weights, names, heads, precision, query=not last)
        if last:
            return
        fixed = (None,) * 6 if rows is None else rows
        suffix = "_context" if text else ""
        out = f"{attn}.to_add_out" if text else f"{attn}.to_out.0"
        projection = f"{name}.ff{suffix}.out_projection"
        self.out = read_gated(weights, out, fixed[2], precision, tokens)
        self.norm_feed_forward = ModulatedNorm(
            None if rows is None else rows[3:5], NORM_EPS, Where(projection, tokens)
        )
        names_up = (f"{name}.ff{suffix}.linear_1", f"{name}.ff{suffix}.linear_2")
        self.feed_forward = GatedFeedForward(weights, names_up, precision, tokens)
        self.feed_forward_out = read_gated(weights, projection, fixed[5], precision, tokens)

    def heads_of(self, x: torch.Tensor, rows: Rows) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        heads: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor] = self.project(
            self.norm_attention(x, None if rows is None else rows[:2])
        )
        return heads

    def update(self, x: torch.Tensor, attended: torch.Tensor, rows: Rows) -> torch.Tensor:
        given = (None,) * 6 if rows is None else rows
        both = x + self.out(attended, given[2])
        hidden = self.feed_forward(self.norm_feed_forward(both, None if rows is None else rows[3:5]))
        updated: torch.Tensor = x + self.feed_forward_out(hidden, given[5])
        return updated

    def smoothings(self) -> Iterator[Smoothing]:
        yield Smoothing(self.project.channels, [Columns("project.linear")], norm="norm_attention")
        if self.last:
            return
        yield Smoothing(self.project.channels, [Columns("feed_forward.up")], norm="norm_feed_forward")
        hidden = int(self.feed_forward_out.linear.weight.shape[0])  # linear in the second half of `up`
        made = [Columns("feed_forward.up", hidden)]
        yield Smoothing(hidden, [Columns("feed_forward_out.linear")], makers=made)


class AuraFlowJointBlock(nn.Module):
    """`AuraFlowJointTransformerBlock`; called as `graph.joint.JointBlock`."""

    reads_text = True

    def __init__(self, image: Stream, text: Stream, last: bool) -> None:
        super().__init__()
        self.image = image
        self.text = text
        self.last = last
        self.attended = Where(image.attended.name, "both")

    def forward(
        self,
        x: torch.Tensor,
        text: torch.Tensor,
        rotary: Rotary | None,
        image_rows: Rows = None,
        text_rows: Rows = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value = self.image.heads_of(x, image_rows)
        text_query, text_key, text_value = self.text.heads_of(text, text_rows)
        queries = [tensor for tensor in (query, text_query) if tensor is not None]
        attended = attention(
            torch.cat(queries, dim=2),
            torch.cat([key, text_key], dim=2),
            torch.cat([value, text_value], dim=2),
            self.attended,
        )
        tokens = x.shape[1]
        # The text first: the image's residual is the last that the block adds up (`export.naming`).
        if not self.last:
            text = self.text.update(text, attended[:, tokens:], text_rows)
        return self.image.update(x, attended[:, :tokens], image_rows), text

    def smoothings(self) -> Iterator[Smoothing]:
        readers = [Columns("image.out.linear"), *([] if self.last else [Columns("text.out.linear")])]
        makers = [self.image.project.values("image.project"), self.text.project.values("text.project")]
        yield Smoothing(self.image.project.channels, readers, makers=makers)


class AuraFlowSingleBlock(nn.Module):
    """`AuraFlowSingleTransformerBlock`; called as `graph.joint.SingleBlock`."""

    def __init__(self, stream: Stream, last: bool) -> None:
        super().__init__()
        self.stream = stream
        self.last = last

    def forward(self, x: torch.Tensor, tokens: int, rotary: Rotary | None, rows: Rows = None) -> torch.Tensor:
        query, key, value = self.stream.heads_of(x, rows)
        assert query is not None
        if self.last:
            x, query = x[:, -tokens:], query[:, :, -tokens:]
        return self.stream.update(x, attention(query, key, value, self.stream.attended), rows)

    def smoothings(self) -> Iterator[Smoothing]:
        made = [self.stream.project.values("stream.project")]
        yield Smoothing(self.stream.project.channels, [Columns("stream.out.linear")], makers=made)
