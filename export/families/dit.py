"""DiT (Peebles & Xie 2022): diffusers DiTTransformer2DModel, class-conditional."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from torch.nn import functional

from ditf.export.checkpoint import Checkpoint, Weights
from ditf.export.families.base import Condition, Defaults, Family, TrunkSpec
from ditf.export.families.sincos import sincos_embedder
from ditf.export.graph.blocks import Block, Modulation
from ditf.export.graph.layers import ModulatedNorm
from ditf.export.graph.trunk import Trunk
from ditf.runtime.errors import InputError

_NORM1_EPS = 1e-6  # AdaLayerNormZero fixes it (diffusers/models/normalization.py)


class DiT(Family):
    """DiT-XL/2 and its kin; the demo model is one."""

    name = "dit"
    transformer_class = "DiTTransformer2DModel"
    takes_prompt = False
    defaults = Defaults(
        timestep=261,
        source="none published for DiT: half of DiT-XL's depth, and the timestep DIFT (Tang et al. 2023)"
        " published for a DDPM schedule",
    )

    def encode_condition(
        self, checkpoint: Checkpoint, prompt: str | None, class_label: int | None
    ) -> Condition:
        classes = self.config["num_embeds_ada_norm"]
        label = classes if class_label is None else class_label  # the null class comes last
        if not 0 <= label <= classes:
            raise InputError(f"class label {label} is out of range", f"choose 0..{classes}")
        return {"class_labels": torch.tensor([label])}

    def reference_inputs(
        self, condition: Condition, timestep: int, size: tuple[int, int], batch: int
    ) -> dict[str, Any]:
        return {
            "timestep": torch.full((batch,), timestep),
            "class_labels": condition["class_labels"].expand(batch),
        }

    def build_trunk(self, weights: Weights, spec: TrunkSpec) -> Trunk:
        self.require(
            norm_type=("ada_norm_zero",),
            activation_fn=("gelu-approximate",),
            norm_elementwise_affine=(False,),
            upcast_attention=(False,),
        )
        modulations = [self._modulation(weights, i, spec) for i in range(spec.layer + 1)]
        eps = (_NORM1_EPS, self.config["norm_eps"])
        heads = self.config["num_attention_heads"]
        blocks = [
            Block(weights, f"transformer_blocks.{i}", heads, modulations[i], eps, None, spec.precision)
            for i in range(spec.layer)
        ]
        last = modulations[spec.layer]
        return Trunk(
            sincos_embedder(weights, self.config, spec.grid, interpolation_scale=1),
            blocks,
            ModulatedNorm(last.scale_attention, last.shift_attention, _NORM1_EPS),
        )

    def _modulation(self, weights: Weights, index: int, spec: TrunkSpec) -> Modulation:
        """AdaLayerNormZero: linear(silu(embedding of timestep and class)), each block its own."""
        norm = f"transformer_blocks.{index}.norm1"
        embedding = CombinedTimestepLabelEmbeddings(self.config["num_embeds_ada_norm"], self.channels)
        weights.load_into(embedding, f"{norm}.emb")
        vector = embedding(torch.tensor([spec.timestep]), spec.condition["class_labels"], torch.float32)
        packed = functional.linear(
            functional.silu(vector),
            weights.tensor(f"{norm}.linear.weight"),
            weights.tensor(f"{norm}.linear.bias"),
        )
        return Modulation.unpack(packed[0])
