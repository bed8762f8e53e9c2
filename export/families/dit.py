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
from ditf.export.families.patch_embedders import sincos_embedder
from ditf.export.graph.blocks.adaln import NORM_ROWS, modulations
from ditf.export.graph.blocks.condition_tensors import MODULATION, ConditionTensors
from ditf.export.graph.blocks.dit import BLOCK_ROWS, DiTBlock, DiTSpec, DiTTrunk
from ditf.export.graph.condition import (
    Conditioner,
    LinearRows,
    ModulationProjection,
    with_constant_frequencies,
)
from ditf.export.graph.precision import Precision

_NORM1_EPS = 1e-6  # AdaLayerNormZero fixes it (diffusers/models/normalization.py)


class DiT(Family):
    """DiT-XL/2 and models of its class, such as the demo model."""

    name = "dit"
    transformer_class = "DiTTransformer2DModel"
    takes_prompt = False
    ddpm = True
    shifts_latents = False
    defaults = Defaults(
        timestep=261,
        source="none published for DiT: half of DiT-XL's depth, and the timestep DIFT (Tang et al. 2023)"
        " published for a DDPM schedule",
    )

    @property
    def null_class(self) -> int:
        """The label after the last class."""
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
                self._norm(weights, index, BLOCK_ROWS if index < spec.layer else NORM_ROWS, spec.precision)
                for index in range(spec.layer + 1)
            ]
        )

    def _norm(
        self, weights: Weights, index: int, rows: int, precision: Precision
    ) -> tuple[nn.Module, ModulationProjection]:
        """AdaLayerNormZero of one block: linear(silu(embedding of timestep and class))."""
        norm = f"{self.block_name(index)}.norm1"
        embedding = weights.load_into(
            lambda: CombinedTimestepLabelEmbeddings(self.null_class, self.channels), f"{norm}.emb"
        )
        linear = LinearRows(weights, [(f"{norm}.linear", rows * self.channels)])
        return embedding, ModulationProjection(linear, precision, self.channels)

    def trunk(self, weights: Weights, spec: TrunkSpec, constants: ConditionTensors | None) -> DiTTrunk:
        self.require(
            norm_type=("ada_norm_zero",),
            activation_fn=("gelu-approximate",),
            norm_elementwise_affine=(False,),
            upcast_attention=(False,),
        )
        *parts, own = modulations(constants, [BLOCK_ROWS] * spec.layer + [NORM_ROWS])
        kind = DiTSpec(self.config["num_attention_heads"], (_NORM1_EPS, self.config["norm_eps"]))
        blocks = [
            DiTBlock(weights, self.block_name(index), kind, modulation, spec.precision)
            for index, modulation in enumerate(parts)
        ]
        embedder = sincos_embedder(weights, self.config, spec.grid, 1, spec.precision)
        return DiTTrunk(embedder, blocks, own.norm(0, _NORM1_EPS))


class _Conditioner(Conditioner):
    """Computes the modulation; each block embeds timestep and class by itself."""

    inputs = ("class_labels",)

    def __init__(self, norms: list[tuple[nn.Module, ModulationProjection]]) -> None:
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
        return {MODULATION: torch.cat(rows)}
