"""The conditioner of SD3 and FLUX.1: pooled text makes the modulation, text tokens have their own stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ditf.export.checkpoints.weights import Weights
from ditf.export.graph.blocks.condition_tensors import MODULATION, TEXT
from ditf.export.graph.blocks.layers import Linear
from ditf.export.graph.condition import (
    Conditioner,
    LinearRows,
    ModulationProjection,
    with_constant_frequencies,
)
from ditf.export.graph.precision import EMBEDDERS, Precision


class PooledConditioner(Conditioner):
    """Computes the modulation from timestep, pooled text and guidance, and text tokens from text embeddings.

    Args:
        weights: the transformer's.
        embedding: its `time_text_embed`.
        modulated: (module with an AdaLN linear, number of rows), as from `JointBlocks.modulated`.
        context: name of the text embedder; None where no block reads the text.
        guidance: whether `embedding` takes the guidance scale.
        channels: C.
        precision: of the AdaLN linears; the text embedder is float32.
    """

    def __init__(
        self,
        weights: Weights,
        embedding: nn.Module,
        modulated: Sequence[tuple[str, int]],
        context: str | None,
        guidance: bool,
        channels: int,
        precision: Precision,
    ) -> None:
        super().__init__()
        self.embedding = with_constant_frequencies(embedding)
        used = LinearRows(weights, [(f"{name}.linear", rows * channels) for name, rows in modulated])
        self.projection = ModulationProjection(used, precision, channels)
        self.context = None
        if context is not None:
            self.context = Linear.read(weights, context, precision=precision, kept=EMBEDDERS)
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
        given = {MODULATION: self.projection(self.embedding(timestep, *middle, pooled))}
        if self.context is not None:
            given[TEXT] = self.context(condition["prompt_embeds"][0]).to(torch.float32)
        return given
