"""DiT (Peebles & Xie 2022): diffusers DiTTransformer2DModel, class-conditional."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from torch import nn

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.weights import Weights
from ditf.export.families.base import Condition, Defaults, Family, TrunkSpec
from ditf.export.families.sincos import sincos_embedder
from ditf.export.graph.blocks.adaln import ModulatedNorm
from ditf.export.graph.blocks.dit import ROWS, StreamBlock, StreamTrunk
from ditf.export.graph.blocks.trunk import Given
from ditf.export.graph.condition import (
    MODULATION,
    Conditioner,
    LinearRows,
    Projection,
    with_constant_frequencies,
)
from ditf.export.graph.precision import Precision

_NORM1_EPS = 1e-6  # AdaLayerNormZero fixes it (diffusers/models/normalization.py)


class DiT(Family):
    """DiT-XL/2 and its kin; the demo model is one."""

    name = "dit"
    transformer_class = "DiTTransformer2DModel"
    takes_prompt = False
    ddpm = True
    defaults = Defaults(
        timestep=261,
        source="none published for DiT: half of DiT-XL's depth, and the timestep DIFT (Tang et al. 2023)"
        " published for a DDPM schedule",
    )

    @property
    def null_class(self) -> int:
        """It comes after the last class."""
        return int(self.config["num_embeds_ada_norm"])

    def example_condition(self) -> Condition:
        return {"class_labels": torch.zeros(1, dtype=torch.int64)}

    def encode_conditions(
        self, checkpoint: Checkpoint, subjects: Sequence[str | int], guidance: float | None
    ) -> list[Condition]:
        return [{"class_labels": torch.tensor([label])} for label in subjects]

    def reference_inputs(
        self, condition: Condition, timestep: int, size: tuple[int, int], grid: tuple[int, int], batch: int
    ) -> dict[str, Any]:
        return {
            "timestep": torch.full((batch,), timestep),
            "class_labels": condition["class_labels"].expand(batch),
        }

    def conditioner(self, weights: Weights, spec: TrunkSpec) -> Conditioner:
        return _Conditioner(
            [
                self._norm(weights, index, ROWS if index < spec.layer else 2, spec.precision)
                for index in range(spec.layer + 1)
            ]
        )

    def _norm(
        self, weights: Weights, index: int, rows: int, precision: Precision
    ) -> tuple[nn.Module, Projection]:
        """AdaLayerNormZero: linear(silu(embedding of timestep and class)), each block its own."""
        norm = f"{self.block_name(index)}.norm1"
        embedding = weights.load_into(
            lambda: CombinedTimestepLabelEmbeddings(self.null_class, self.channels), f"{norm}.emb"
        )
        linear = LinearRows(weights, [(f"{norm}.linear", rows * self.channels)])
        return embedding, Projection(linear, precision.of(MODULATION), self.channels)

    def trunk(self, weights: Weights, spec: TrunkSpec, fixed: Given | None) -> StreamTrunk:
        self.require(
            norm_type=("ada_norm_zero",),
            activation_fn=("gelu-approximate",),
            norm_elementwise_affine=(False,),
            upcast_attention=(False,),
        )
        rows: Sequence[torch.Tensor | None] = (None,) * (spec.layer + 1)
        if fixed is not None:
            rows = fixed["modulation"].split([ROWS] * spec.layer + [2])
        eps = (_NORM1_EPS, self.config["norm_eps"])
        heads = self.config["num_attention_heads"]
        blocks = [
            StreamBlock(weights, self.block_name(i), heads, rows[i], eps, None, spec.precision)
            for i in range(spec.layer)
        ]
        embedder = sincos_embedder(weights, self.config, spec.grid, interpolation_scale=1)
        return StreamTrunk(embedder, blocks, ModulatedNorm(rows[-1], _NORM1_EPS))


class _Conditioner(Conditioner):
    """Each block embeds timestep and class by itself."""

    inputs = ("class_labels",)

    def __init__(self, norms: list[tuple[nn.Module, Projection]]) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(with_constant_frequencies(embedding) for embedding, _ in norms)
        self.projections = nn.ModuleList(projection for _, projection in norms)

    def forward(
        self, timestep: torch.Tensor, condition: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        labels = condition["class_labels"]
        rows = [
            projection(embedding(timestep, labels, torch.float32))
            for embedding, projection in zip(self.embeddings, self.projections, strict=True)
        ]
        return {"modulation": torch.cat(rows)}
