"""Two streams, image and text, that meet in one attention: the blocks of SD3 and FLUX, and their trunk.

In the last block that runs, whatever does not reach the image tokens is left out: the text's query, its
output, its feed-forward. Where the text that enters the first block is constant, so are its keys there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ditf.export.checkpoints.weights import Weights
from ditf.export.graph.blocks.adaln import ModulatedNorm, read_gated
from ditf.export.graph.blocks.dit import SelfAttention
from ditf.export.graph.blocks.layers import (
    AttentionNames,
    FeedForward,
    GatedFeedForward,
    HeadProjection,
    Rotary,
    attention,
    constant,
)
from ditf.export.graph.blocks.smoothing import Columns, Smoothing
from ditf.export.graph.blocks.trunk import Given, PatchEmbedder, Trunk
from ditf.export.graph.precision import Precision
from ditf.export.graph.range_probes import Stream, Where

Rows = torch.Tensor | None
"""Modulation [R, C] of a stream in a block, or None."""

IMAGE_ROWS, DUAL_ROWS, SINGLE_ROWS, NORM_ROWS = 6, 9, 3, 2
"""Rows of an image stream, of one with a second attention, of a single-stream block, of a norm alone."""

Pair = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]


class ConstantProjection(nn.Module):
    """Query, key and value of constant tokens, computed at export."""

    def __init__(self, project: HeadProjection, tokens: torch.Tensor, rotary: Rotary | None) -> None:
        super().__init__()
        if rotary is not None:
            rotary = (rotary[0].to(tokens.device), rotary[1].to(tokens.device))
        query, key, value = project(tokens, rotary)
        self.query = None if query is None else constant(query)
        self.key = constant(key)
        self.value = constant(value)

    def forward(self) -> Pair:
        return self.query, self.key, self.value


class TextStream(nn.Module):
    """The text's side of a two-stream block.

    Args:
        rows: modulation [6, C], or [2, C] in the last block; None when given.
        last: the text is only attended to here.
        tokens: [1, L, C], what enters, where it is constant.
        rotary: of constant text that is rotated.
        gated: whether the feed-forward's activations are gated.
    """

    def __init__(
        self,
        weights: Weights,
        name: str,
        attention_names: AttentionNames,
        heads: int,
        rows: Rows,
        last: bool,
        tokens: torch.Tensor | None,
        rotary: Rotary | None,
        eps: float,
        gated: bool,
        precision: Precision,
    ) -> None:
        super().__init__()
        self.last = last
        norm = ModulatedNorm(None if rows is None else rows[:2], eps, Where(f"{name}.attn", "text"))
        project = HeadProjection(weights, attention_names, heads, precision, query=not last)
        if tokens is None:
            self.norm, self.project = norm, project
            self.constant = None
        else:
            self.constant = ConstantProjection(project, norm(tokens), rotary)
        if not last:
            fixed = (None,) * IMAGE_ROWS if rows is None else rows
            context = f"{name}.ff_context"
            self.out = read_gated(weights, f"{name}.attn.to_add_out", fixed[2], precision, "text")
            self.norm_feed_forward = ModulatedNorm(
                None if rows is None else rows[3:5], eps, Where(context, "text")
            )
            self.feed_forward, last_linear = _feed_forward(weights, context, gated, precision, "text")
            self.feed_forward_out = read_gated(weights, last_linear, fixed[5], precision, "text")

    def heads_of(self, text: torch.Tensor, rows: Rows, rotary: Rotary | None) -> Pair:
        """Query (None in the last block), key and value, [1 or B, H, L, D]."""
        if self.constant is not None:
            return self.constant()
        pair: Pair = self.project(self.norm(text, None if rows is None else rows[:2]), rotary)
        return pair

    def update(self, text: torch.Tensor, attended: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The text that leaves the block."""
        given = (None,) * IMAGE_ROWS if rows is None else rows
        text = text + self.out(attended, given[2])
        hidden = self.norm_feed_forward(text, None if rows is None else rows[3:5])
        updated: torch.Tensor = text + self.feed_forward_out(self.feed_forward(hidden), given[5])
        return updated

    def smoothings(self) -> Iterator[Smoothing]:
        if self.constant is None:
            yield Smoothing(self.project.channels, [Columns("project.linear")], norm="norm")
        if not self.last:
            channels = int(self.feed_forward.up.weight.shape[0])
            yield Smoothing(channels, [Columns("feed_forward.up")], norm="norm_feed_forward")


class JointBlock(nn.Module):
    """Two-stream block.

    SD3's `JointTransformerBlock`, FLUX's `FluxTransformerBlock` and `Flux2TransformerBlock`.

    Args:
        weights, name: where its tensors are.
        heads: attention heads.
        dual: a second attention over the image alone (SD3.5 medium).
        qk_norm: RMSNorm of query and key.
        rotary: whether image queries and keys are rotated (FLUX.1's text is at the origin: it is not).
        text_rotary: of the text, where it is constant and rotated.
        gated: whether the feed-forwards' activations are gated.
        image_rows: modulation [6, or 9 if dual, C]; text_rows: [6, or 2 if last, C]; None when given.
        last: no block reads the text after this one.
        text: [1, L, C], the text that enters, where it is constant.
    """

    def __init__(
        self,
        weights: Weights,
        name: str,
        heads: int,
        precision: Precision,
        *,
        dual: bool,
        qk_norm: bool,
        rotary: bool,
        image_rows: Rows,
        text_rows: Rows,
        last: bool,
        text: torch.Tensor | None,
        text_rotary: Rotary | None = None,
        gated: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        attn = f"{name}.attn"
        image_names = AttentionNames(
            (f"{attn}.to_q", f"{attn}.to_k", f"{attn}.to_v"),
            (f"{attn}.norm_q", f"{attn}.norm_k") if qk_norm else None,
            rotary=rotary,
        )
        text_names = AttentionNames(
            (f"{attn}.add_q_proj", f"{attn}.add_k_proj", f"{attn}.add_v_proj"),
            (f"{attn}.norm_added_q", f"{attn}.norm_added_k") if qk_norm else None,
            stream="text",
            rotary=rotary,
        )
        fixed = (None,) * DUAL_ROWS if image_rows is None else image_rows
        self.reads_text = text is None or not last
        slices = [None if image_rows is None else image_rows[start : start + 2] for start in (0, 3, 6)]
        self.last = last
        self.attended = Where(attn, "both")
        self.norm_attention = ModulatedNorm(slices[0], eps, Where(attn))
        self.project = HeadProjection(weights, image_names, heads, precision)
        self.out = read_gated(weights, f"{attn}.to_out.0", fixed[2], precision)
        self.norm_dual: ModulatedNorm | None = None
        if dual:
            norms = (f"{name}.attn2.norm_q", f"{name}.attn2.norm_k") if qk_norm else None
            self.norm_dual = ModulatedNorm(slices[2], eps, Where(f"{name}.attn2"))
            self.dual = SelfAttention(weights, f"{name}.attn2", heads, fixed[8], precision, norms)
        self.norm_feed_forward = ModulatedNorm(slices[1], eps, Where(f"{name}.ff"))
        self.feed_forward, last_linear = _feed_forward(weights, f"{name}.ff", gated, precision)
        self.feed_forward_out = read_gated(weights, last_linear, fixed[5], precision)
        self.text = TextStream(
            weights, name, text_names, heads, text_rows, last, text, text_rotary, eps, gated, precision
        )

    def forward(
        self,
        x: torch.Tensor,
        text: torch.Tensor,
        rotary: Rotary | None,
        image_rows: Rows = None,
        text_rows: Rows = None,
        text_rotary: Rotary | None = None,
        text_bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residuals of image [B, N, C] and text [B, L, C]; the text is as it came in the last block.

        Args:
            rotary: of the image tokens; text_rotary: of the text, where it is rotated.
            text_bias: [L], added to the logits of the text's keys.
        """
        given = (None,) * DUAL_ROWS if image_rows is None else image_rows
        head, tail, second = (None if image_rows is None else image_rows[i : i + 2] for i in (0, 3, 6))
        query, key, value = self.project(self.norm_attention(x, head), rotary)
        text_query, text_key, text_value = self.text.heads_of(text, text_rows, text_rotary)
        joined = [query] if text_query is None else [query, _like(text_query, query)]
        attended = attention(
            torch.cat(joined, dim=2),
            torch.cat([key, _like(text_key, key)], dim=2),
            torch.cat([value, _like(text_value, value)], dim=2),
            self.attended,
            None if text_bias is None else functional.pad(text_bias, (x.shape[1], 0)),
        )
        tokens = x.shape[1]
        dual = None if self.norm_dual is None else self.dual(self.norm_dual(x, second), given[8])
        x = x + self.out(attended[:, :tokens], given[2])
        if dual is not None:
            x = x + dual
        # The text first: the image's residual is the last that the block adds up (`export.naming`).
        if not self.last:
            text = self.text.update(text, attended[:, tokens:], text_rows)
        x = x + self.feed_forward_out(self.feed_forward(self.norm_feed_forward(x, tail)), given[5])
        return x, text

    def smoothings(self) -> Iterator[Smoothing]:
        channels = self.project.channels
        yield Smoothing(channels, [Columns("project.linear")], norm="norm_attention")
        yield Smoothing(channels, [Columns("feed_forward.up")], norm="norm_feed_forward")
        if self.norm_dual is not None:
            yield Smoothing(channels, [Columns("dual.project.linear")], norm="norm_dual")
        readers, makers = [Columns("out.linear")], [self.project.values("project")]
        if not self.last:
            readers.append(Columns("text.out.linear"))
        if self.text.constant is None:
            makers.append(self.text.project.values("text.project"))
        constants = () if self.text.constant is None else ("text.constant.value",)
        yield Smoothing(channels, readers, makers=makers, constants=constants)


def _like(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Constant text heads [1, H, L, D] for every image of the batch."""
    return text.expand(image.shape[0], -1, -1, -1)


def _feed_forward(
    weights: Weights, name: str, gated: bool, precision: Precision, stream: Stream = "image"
) -> tuple[FeedForward | GatedFeedForward, str]:
    """A feed-forward's hidden activations, and the name of its last linear."""
    if gated:
        hidden = GatedFeedForward(weights, (f"{name}.linear_in",), precision, stream)
        return hidden, f"{name}.linear_out"
    return FeedForward(weights, f"{name}.net.0.proj", precision, stream), f"{name}.net.2"


@dataclass(frozen=True)
class SingleNames:
    """Where a single-stream block has its linears beside query, key and value, from its own name on.

    Attributes:
        gated: whether the first is the gate of the activations, and the activations.
    """

    feed_forward: str
    out: str
    gated: bool = False


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side over text and image.

    FLUX's `FluxSingleTransformerBlock` and `Flux2SingleTransformerBlock`.

    Args:
        rows: modulation [3, C] (shift, scale, gate), or None when given.
        last: no block reads the text after this one: it is only key and value.
    """

    def __init__(
        self,
        weights: Weights,
        name: str,
        heads: int,
        precision: Precision,
        *,
        rows: Rows,
        last: bool,
        parts: SingleNames = SingleNames("proj_mlp", "proj_out"),
        eps: float = 1e-6,
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
        self.norm = ModulatedNorm(None if rows is None else rows[:2], eps, Where(attn))
        self.project = HeadProjection(weights, names, heads, precision)
        up = f"{name}.{parts.feed_forward}"
        self.feed_forward: FeedForward | GatedFeedForward
        if parts.gated:
            self.feed_forward = GatedFeedForward(weights, (up,), precision)
        else:
            self.feed_forward = FeedForward(weights, up, precision)
        gate = None if rows is None else rows[2]
        self.out = read_gated(weights, f"{name}.{parts.out}", gate, precision)

    def forward(
        self,
        x: torch.Tensor,
        tokens: int,
        rotary: Rotary,
        rows: Rows = None,
        text_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Text then image [B, L + N, C] -> the same, or [B, N, C] in the last block.

        Args:
            tokens: N.
            rotary: of text and image tokens.
            text_bias: [L], added to the logits of the text's keys.
        """
        bias = None if text_bias is None else functional.pad(text_bias, (0, tokens))
        normed = self.norm(x, None if rows is None else rows[:2])
        query, key, value = self.project(normed, rotary)
        if self.last:
            x, normed, query = x[:, -tokens:], normed[:, -tokens:], query[:, :, -tokens:]
        attended, hidden = attention(query, key, value, self.attended, bias), self.feed_forward(normed)
        wider = torch.promote_types(attended.dtype, hidden.dtype)  # the recipe may hold them apart
        hidden = torch.cat([attended.to(wider), hidden.to(wider)], dim=2)
        return x + self.out(hidden, None if rows is None else rows[2])

    def smoothings(self) -> Iterator[Smoothing]:
        channels = self.project.channels
        yield Smoothing(channels, [Columns("project.linear"), Columns("feed_forward.up")], norm="norm")
        # Of what the output reads, the values come first, the feed-forward's activations second.
        yield Smoothing(channels, [Columns("out.linear")], makers=[self.project.values("project")])


class JointTrunk(Trunk):
    """Embedder, two-stream blocks, then single-stream blocks over text and image.

    Given at run time: `modulation` [R, C], the image's and the text's rows of each two-stream block, the
    rows of each single-stream block, block k's; `text` [L, C]; and `text_bias` [L] where it may be masked.

    Args:
        embedder: latents -> tokens.
        doubles, singles: blocks; a double's `reads_text` is False if it needs only what it has as constants.
        output_norm: block k's.
        text: [1, L, C] float32, where it is constant.
        rotary: of text and image tokens, [L + N, D / 2], or None.
        sizes: rows of each block, in the modulation's order.
        text_rotated: whether two-stream blocks rotate the text.
    """

    def __init__(
        self,
        embedder: PatchEmbedder,
        doubles: Sequence[nn.Module],
        singles: Sequence[nn.Module],
        output_norm: ModulatedNorm,
        text: torch.Tensor | None,
        rotary: Rotary | None,
        sizes: Sequence[int],
        text_rotated: bool = False,
    ) -> None:
        super().__init__(embedder, output_norm, embedder.weight.shape[0])
        self.doubles = nn.ModuleList(doubles)
        self.singles = nn.ModuleList(singles)
        needed = len(singles) > 0 or any(block.reads_text for block in doubles)
        self.text = constant(text) if needed and text is not None else None
        used = rotary if rotary is not None and (doubles or singles) else None
        self.cosine = None if used is None else constant(used[0])
        self.sine = None if used is None else constant(used[1])
        self.sizes = tuple(sizes)
        self.text_rotated = text_rotated

    def forward(self, latents: torch.Tensor, given: Given) -> torch.Tensor:
        x: torch.Tensor = self.embedder(latents)
        tokens = x.shape[1]
        rows: list[Rows] = [None] * len(self.sizes)
        if "modulation" in given:
            rows = list(given["modulation"].split([*self.sizes, 2])[:-1])
        text = self._text(given, x)
        rotary: Rotary | None = None
        image_rotary: Rotary | None = None
        own: dict[str, Any] = {"text_bias": given["text_bias"]} if "text_bias" in given else {}
        whole = dict(own)
        if self.cosine is not None and self.sine is not None:
            rotary = (self.cosine, self.sine)
            image_rotary = (self.cosine[-tokens:], self.sine[-tokens:])
            if self.text_rotated:
                own["text_rotary"] = (self.cosine[:-tokens], self.sine[:-tokens])
        for index, block in enumerate(self.doubles):
            x, text = block(x, text, image_rotary, rows[2 * index], rows[2 * index + 1], **own)
        if len(self.singles):
            x = torch.cat([text, x], dim=1)
        for index, block in enumerate(self.singles):
            x = block(x, tokens, rotary, rows[2 * len(self.doubles) + index], **whole)
        return x

    def _text(self, given: Given, x: torch.Tensor) -> torch.Tensor:
        text = given["text"][None] if "text" in given else self.text
        return x[:, :0] if text is None else text.expand(x.shape[0], -1, -1).to(x.dtype)
