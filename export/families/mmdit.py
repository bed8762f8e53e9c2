"""What SD3 and FLUX share: a pooled condition for AdaLN, text tokens in a stream of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ditf.export.checkpoints.weights import Weights
from ditf.export.graph.blocks.layers import Linear, read_linear
from ditf.export.graph.blocks.two_stream import IMAGE_ROWS, NORM_ROWS, SINGLE_ROWS
from ditf.export.graph.condition import (
    MODULATION,
    Conditioner,
    LinearRows,
    Projection,
    with_constant_frequencies,
)
from ditf.export.graph.precision import Precision


def stream_rows(layer: int, doubles: int) -> list[int]:
    """Modulation rows of FLUX's blocks: image and text of each two-stream block, then each single-stream one.

    Args:
        layer: blocks that run; doubles: how many of them have two streams. Of the last text only the norm's.
    """
    sizes = [IMAGE_ROWS] * (2 * doubles) + [SINGLE_ROWS] * (layer - doubles)
    if 0 < layer == doubles:
        sizes[-1] = NORM_ROWS
    return sizes


class PooledConditioner(Conditioner):
    """Timestep, pooled text (and guidance) -> modulation; text embeddings -> text tokens.

    Args:
        weights: of the transformer.
        embedding: its `time_text_embed`.
        linears: AdaLN linears and how many rows of each are used, in the order of the rows.
        context: name of the text embedder, None where no block reads the text.
        guidance: whether `embedding` takes it.
        channels: C.
        precision: of the stacked AdaLN linear; the text embedder is float32.
    """

    def __init__(
        self,
        weights: Weights,
        embedding: nn.Module,
        linears: Sequence[tuple[str, int]],
        context: str | None,
        guidance: bool,
        channels: int,
        precision: Precision,
    ) -> None:
        super().__init__()
        self.embedding = with_constant_frequencies(embedding)
        used = LinearRows(weights, [(name, rows * channels) for name, rows in linears])
        self.projection = Projection(used, precision.of(MODULATION), channels)
        self.context = None
        if context is not None:
            self.context = Linear(*read_linear(weights, context), torch.float32)  # writes the residual
        self.guidance = guidance
        self.inputs = (
            "pooled_prompt_embeds",
            *(("prompt_embeds",) if context else ()),
            *(("guidance",) if guidance else ()),
        )

    def forward(
        self, timestep: torch.Tensor, condition: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        pooled = condition["pooled_prompt_embeds"]
        middle = (condition["guidance"] * 1000.0,) if self.guidance else ()
        given = {"modulation": self.projection(self.embedding(timestep, *middle, pooled))}
        if self.context is not None:
            given["text"] = self.context(condition["prompt_embeds"][0]).to(torch.float32)
        return given
