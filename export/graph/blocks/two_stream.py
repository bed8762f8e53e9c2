"""Two-stream blocks: image and text each have a residual, and meet in one attention (SD3, FLUX).

In the last block that runs, whatever does not reach the image tokens is left out: the text's query, its
output and its feed-forward. Where the text that enters the first block is constant, so are its keys and
values there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ditf.export.checkpoints.weights import Weights
from ditf.export.graph.blocks.adaln import Modulation
from ditf.export.graph.blocks.condition_tensors import IMAGE_TEXT_BIAS, ConditionTensors
from ditf.export.graph.blocks.dit import SelfAttention
from ditf.export.graph.blocks.gated_linear import read_gated
from ditf.export.graph.blocks.layers import (
    AttentionNames,
    FeedForward,
    GatedFeedForward,
    HeadProjection,
    Heads,
    Rotary,
    attention,
    constant,
    shared_value_bias,
)
from ditf.export.graph.blocks.smoothing import Channels, Smoothing
from ditf.export.graph.blocks.trunk import ResidualOutput
from ditf.export.graph.precision import Precision
from ditf.export.graph.range_probes import Stream, Where
from ditf.export.graph.roles import Role, Roles

IMAGE_ROWS, DUAL_ROWS, TEXT_ROWS = 6, 9, 6
"""Modulation rows: shift, scale and gate of the attention, of the feed-forward, and of a second attention."""


@dataclass(frozen=True, eq=False)
class ConstantText:
    """Text that enters the first block, where it is constant.

    Attributes:
        tokens: [1, L, C] float32.
        rotary: of the text, where it is rotated.
    """

    tokens: torch.Tensor
    rotary: Rotary | None


class ConstantProjection(nn.Module):
    """Query, key and value of constant tokens, computed at export.

    Args:
        tokens: normed, [1, L, C].
    """

    def __init__(self, project: HeadProjection, tokens: torch.Tensor, rotary: Rotary | None) -> None:
        super().__init__()
        if rotary is not None:
            rotary = (rotary[0].to(tokens.device), rotary[1].to(tokens.device))
        query, key, value = project(tokens, rotary)
        self.query = None if query is None else constant(query)
        self.key = constant(key)
        self.value = constant(value)

    def forward(self) -> Heads:
        return self.query, self.key, self.value


class TextStream(nn.Module):
    """The text's side of a two-stream block.

    Args:
        image: names of the stream that it is attended together with.
        modulation: `TEXT_ROWS` rows, or those of the norm alone in the last block.
        last: no block reads the text after this one.
    """

    def __init__(
        self,
        weights: Weights,
        name: str,
        spec: TwoStreamSpec,
        image: AttentionNames,
        modulation: Modulation,
        precision: Precision,
        last: bool,
        constant_text: ConstantText | None,
    ) -> None:
        super().__init__()
        self.last = last
        attn, feed_forward = f"{name}.attn", f"{name}.ff_context"
        names = AttentionNames(
            (f"{attn}.add_q_proj", f"{attn}.add_k_proj", f"{attn}.add_v_proj"),
            (f"{attn}.norm_added_q", f"{attn}.norm_added_k") if spec.qk_norm else None,
            stream="text",
            rotary=spec.rotary,
        )
        norm = modulation.norm(0, spec.eps, Where(attn, "text"))
        project = HeadProjection(weights, names, spec.heads, precision, query=not last, shared=image)
        self.constant: ConstantProjection | None = None
        if constant_text is None:
            self.norm, self.project = norm, project
        else:
            normed = norm(constant_text.tokens, {})
            self.constant = ConstantProjection(project, normed, constant_text.rotary)
        if last:
            return
        value_bias = shared_value_bias(weights, image)
        out = f"{attn}.to_add_out"
        self.out = read_gated(weights, out, modulation.row(2), precision, "text", value_bias=value_bias)
        self.norm_feed_forward = modulation.norm(3, spec.eps, Where(feed_forward, "text"))
        self.feed_forward, down = _feed_forward(weights, feed_forward, spec.gated, precision, "text")
        self.feed_forward_out = read_gated(weights, down, modulation.row(5), precision, "text")

    def heads_of(self, text: torch.Tensor, given: ConditionTensors, rotary: Rotary | None) -> Heads:
        """Query (None in the last block), key and value, [1 or B, H, L, D]."""
        if self.constant is not None:
            return self.constant()
        heads: Heads = self.project(self.norm(text, given), rotary)
        return heads

    def update(self, text: torch.Tensor, attended: torch.Tensor, given: ConditionTensors) -> torch.Tensor:
        """The text [B, L, C] that leaves the block."""
        text = text + self.out(attended, given)
        hidden = self.feed_forward(self.norm_feed_forward(text, given))
        updated: torch.Tensor = text + self.feed_forward_out(hidden, given)
        return updated

    def smoothings(self) -> Iterator[Smoothing]:
        if self.constant is None:
            yield Smoothing(self.project.channels, [Channels("project.linear")], norm="norm")
        if not self.last:
            channels = int(self.feed_forward.up.weight.shape[0])
            yield Smoothing(channels, [Channels("feed_forward.up")], norm="norm_feed_forward")


class TwoStreamBlock(nn.Module):
    """A two-stream block.

    Args:
        weights, name: where its tensors are.
        image: `spec.image_rows` rows; text: as for `TextStream`.
        last: no block reads the text after this one.
        constant_text: the text that enters, where it is constant.
    """

    roles: ClassVar[Roles] = {
        "project": Role.SELF_ATTENTION,
        "out": Role.SELF_ATTENTION,
        "dual": Role.SELF_ATTENTION,
        "feed_forward": Role.FEED_FORWARD,
        "feed_forward_out": Role.FEED_FORWARD,
        "text": Role.TEXT_STREAM,
    }

    def __init__(
        self,
        weights: Weights,
        name: str,
        spec: TwoStreamSpec,
        image: Modulation,
        text: Modulation,
        precision: Precision,
        last: bool,
        constant_text: ConstantText | None,
    ) -> None:
        super().__init__()
        attn, feed_forward = f"{name}.attn", f"{name}.ff"
        names = AttentionNames(
            (f"{attn}.to_q", f"{attn}.to_k", f"{attn}.to_v"),
            (f"{attn}.norm_q", f"{attn}.norm_k") if spec.qk_norm else None,
            rotary=spec.rotary,
        )
        self.last = last
        self.attended = Where(attn, "both")
        self.norm_attention = image.norm(0, spec.eps, Where(attn))
        self.project = HeadProjection(weights, names, spec.heads, precision, shared=names)
        value_bias = shared_value_bias(weights, names)
        self.out = read_gated(weights, f"{attn}.to_out.0", image.row(2), precision, value_bias=value_bias)
        self.has_dual = spec.dual
        if spec.dual:
            second = f"{name}.attn2"
            norms = (f"{second}.norm_q", f"{second}.norm_k") if spec.qk_norm else None
            self.norm_dual = image.norm(6, spec.eps, Where(second))
            self.dual = SelfAttention(weights, second, spec.heads, image.row(8), precision, norms)
        self.norm_feed_forward = image.norm(3, spec.eps, Where(feed_forward))
        self.feed_forward, down = _feed_forward(weights, feed_forward, spec.gated, precision)
        self.feed_forward_out = read_gated(weights, down, image.row(5), precision)
        self.text = TextStream(weights, name, spec, names, text, precision, last, constant_text)
        self.residual_output = ResidualOutput()

    @property
    def reads_text(self) -> bool:
        """Whether it needs more of the text that enters than it has as constants."""
        return self.text.constant is None or not self.last

    def forward(
        self,
        x: torch.Tensor,
        text: torch.Tensor,
        given: ConditionTensors,
        rotary: Rotary | None,
        text_rotary: Rotary | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residuals of image [B, N, C] and text [B, L, C]; the text is as it came in the last block.

        Args:
            rotary: of the image tokens; text_rotary: of the text. None where they are not rotated.
        """
        tokens = x.shape[1]
        query, key, value = self.project(self.norm_attention(x, given), rotary)
        text_query, text_key, text_value = self.text.heads_of(text, given, text_rotary)
        joined = [query] if text_query is None else [query, _like(text_query, query)]
        bias = given.get(IMAGE_TEXT_BIAS)
        if bias is not None and bias.ndim == 2 and text_query is None:
            bias = bias[:tokens]
        attended = attention(
            torch.cat(joined, dim=2),
            torch.cat([key, _like(text_key, key)], dim=2),
            torch.cat([value, _like(text_value, value)], dim=2),
            self.attended,
            bias,
        )
        dual = self.dual(self.norm_dual(x, given), given) if self.has_dual else None
        x = x + self.out(attended[:, :tokens], given)
        if dual is not None:
            x = x + dual
        if not self.last:
            text = self.text.update(text, attended[:, tokens:], given)
        hidden = self.feed_forward(self.norm_feed_forward(x, given))
        return self.residual_output(x, self.feed_forward_out(hidden, given)), text

    def smoothings(self) -> Iterator[Smoothing]:
        channels = self.project.channels
        yield Smoothing(channels, [Channels("project.linear")], norm="norm_attention")
        yield Smoothing(channels, [Channels("feed_forward.up")], norm="norm_feed_forward")
        if self.has_dual:
            yield Smoothing(channels, [Channels("dual.project.linear")], norm="norm_dual")
        readers, makers = [Channels("out.linear")], [self.project.values("project")]
        if not self.last:
            readers.append(Channels("text.out.linear"))
        constants: tuple[str, ...] = ("text.constant.value",)
        if self.text.constant is None:
            makers.append(self.text.project.values("text.project"))
            constants = self.text.project.value_biases("text.project")
        yield Smoothing(channels, readers, makers=makers, constants=constants)


@dataclass(frozen=True)
class TwoStreamSpec:
    """What a two-stream block is like.

    SD3's `JointTransformerBlock`, FLUX.1's and Chroma's `FluxTransformerBlock`, `Flux2TransformerBlock`.

    Attributes:
        heads: of the attention.
        qk_norm: query and key have an RMSNorm.
        rotary: image queries and keys are rotated.
        text_rotary: the text's are rotated too; at the origin, as FLUX.1's text is, that does nothing.
        dual: the image has a second attention over itself alone (SD3.5 medium).
        gated: the activations of the feed-forwards are gated.
        eps: of the LayerNorms.
    """

    heads: int
    qk_norm: bool = True
    rotary: bool = False
    text_rotary: bool = False
    dual: bool = False
    gated: bool = False
    eps: float = 1e-6

    block: ClassVar[type[nn.Module]] = TwoStreamBlock
    norms: ClassVar = ("norm1", "norm1_context")
    """Modules in the checkpoint whose linears make the rows of the image and of the text."""

    @property
    def image_rows(self) -> int:
        """Modulation rows of the image; the text has `TEXT_ROWS`."""
        return DUAL_ROWS if self.dual else IMAGE_ROWS


def _like(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Constant text heads [1, H, L, D] for every image of the batch."""
    return text.expand(image.shape[0], -1, -1, -1)


def _feed_forward(
    weights: Weights, name: str, gated: bool, precision: Precision, stream: Stream = "image"
) -> tuple[FeedForward | GatedFeedForward, str]:
    """The first half of a feed-forward, and the name of its last linear."""
    if gated:
        hidden = GatedFeedForward(weights, (f"{name}.linear_in",), precision, stream)
        return hidden, f"{name}.linear_out"
    return FeedForward(weights, f"{name}.net.0.proj", precision, stream), f"{name}.net.2"
