"""PixArt-alpha (Chen et al. 2023): diffusers PixArtTransformer2DModel, T5-conditioned."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PixArtAlphaPipeline
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.normalization import AdaLayerNormSingle

from ditf.export.checkpoint import Checkpoint, Weights
from ditf.export.families.base import Condition, Defaults, Family, TrunkSpec
from ditf.export.families.sincos import sincos_embedder
from ditf.export.graph.blocks import Block, Modulation
from ditf.export.graph.layers import ModulatedNorm
from ditf.export.graph.trunk import Trunk
from ditf.export.pretrained import load_pipeline


class PixArt(Family):
    """PixArt-XL/2 at 256, 512 and 1024 px."""

    name = "pixart"
    transformer_class = "PixArtTransformer2DModel"
    takes_prompt = True
    defaults = Defaults(
        timestep=261,
        prompt="a photo",
        source="none published for PixArt: half of its depth, and the timestep DIFT (Tang et al. 2023)"
        " published for a DDPM schedule",
    )

    @property
    def _micro_conditions(self) -> bool:
        """Resolution and aspect ratio beside the timestep; by default only the 1024 px models."""
        given = self.config.get("use_additional_conditions")
        return self.sample_size == 128 if given is None else bool(given)

    def encode_condition(
        self, checkpoint: Checkpoint, prompt: str | None, class_label: int | None
    ) -> Condition:
        pipeline = load_pipeline(PixArtAlphaPipeline, checkpoint.path, transformer=None, vae=None)
        pipeline.text_encoder.to(torch.float32)
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, device=torch.device("cpu")
        )
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def reference_inputs(
        self, condition: Condition, timestep: int, size: tuple[int, int], batch: int
    ) -> dict[str, Any]:
        mask = condition["encoder_attention_mask"]
        return {
            "timestep": torch.full((batch,), timestep),
            "encoder_hidden_states": condition["encoder_hidden_states"].expand(batch, -1, -1),
            "encoder_attention_mask": mask.to(torch.float32).expand(batch, -1),
            "added_cond_kwargs": self._added_conditions(size, batch),
        }

    def build_trunk(self, weights: Weights, spec: TrunkSpec) -> Trunk:
        self.require(
            norm_type=("ada_norm_single",),
            activation_fn=("gelu-approximate",),
            norm_elementwise_affine=(False,),
            upcast_attention=(False,),
            attention_type=("default",),
        )
        shared = self._shared_modulation(weights, spec.timestep, spec.size)
        modulations = [
            Modulation.unpack(shared + weights.tensor(f"transformer_blocks.{i}.scale_shift_table"))
            for i in range(spec.layer + 1)
        ]
        eps = self.config["norm_eps"]
        heads = self.config["num_attention_heads"]
        text = self._text_tokens(weights, spec.condition) if spec.layer else None
        blocks = [
            Block(weights, f"transformer_blocks.{i}", heads, modulations[i], (eps, eps), text, spec.precision)
            for i in range(spec.layer)
        ]
        scale = self.config.get("interpolation_scale") or max(self.sample_size // 64, 1)
        last = modulations[spec.layer]
        return Trunk(
            sincos_embedder(weights, self.config, spec.grid, scale),
            blocks,
            ModulatedNorm(last.scale_attention, last.shift_attention, eps),
        )

    def _shared_modulation(self, weights: Weights, timestep: int, size: tuple[int, int]) -> torch.Tensor:
        """AdaLN-single: [6, C], the same for every block, which adds its own table to it."""
        embedding = AdaLayerNormSingle(self.channels, use_additional_conditions=self._micro_conditions)
        weights.load_into(embedding, "adaln_single")
        packed, _ = embedding(
            torch.tensor([timestep]),
            self._added_conditions(size, 1),
            batch_size=1,
            hidden_dtype=torch.float32,
        )
        shared: torch.Tensor = packed.reshape(6, -1)
        return shared

    def _added_conditions(self, size: tuple[int, int], batch: int) -> dict[str, torch.Tensor | None]:
        """As PixArtAlphaPipeline.__call__ makes them."""
        if not self._micro_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = size
        return {
            "resolution": torch.tensor([[height, width]], dtype=torch.float32).repeat(batch, 1),
            "aspect_ratio": torch.tensor([[height / width]], dtype=torch.float32).repeat(batch, 1),
        }

    def _text_tokens(self, weights: Weights, condition: Condition) -> torch.Tensor:
        """[L, C]: projected caption tokens. Masked ones get -10000 and so weight 0: dropped, exactly."""
        embeds, mask = condition["encoder_hidden_states"], condition["encoder_attention_mask"]
        tokens = embeds[0][mask[0].bool()]
        if self.config.get("caption_channels") is not None:
            projection = PixArtAlphaTextProjection(self.config["caption_channels"], self.channels)
            weights.load_into(projection, "caption_projection")
            tokens = projection(tokens)
        return tokens
