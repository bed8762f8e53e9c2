"""FLUX.1 (Black Forest Labs 2024): diffusers FluxTransformer2DModel, dev (guidance-distilled) and schnell."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.embeddings import (
    CombinedTimestepGuidanceTextProjEmbeddings,
    CombinedTimestepTextProjEmbeddings,
)
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.text.pipeline import load_text_pipeline
from ditf.export.checkpoints.weights import Weights
from ditf.export.families.base import Blocks, Condition, Defaults, Family, TrunkSpec, check_prompt
from ditf.export.families.pooled_conditioner import PooledConditioner
from ditf.export.graph.blocks.condition_tensors import ConditionTensors
from ditf.export.graph.blocks.joint_trunk import JointBlocks, JointTrunk, build_joint_trunk
from ditf.export.graph.blocks.layers import Rotary, read_linear
from ditf.export.graph.blocks.single_stream import SingleStreamSpec
from ditf.export.graph.blocks.trunk import PatchEmbedder
from ditf.export.graph.blocks.two_stream import TwoStreamSpec
from ditf.export.graph.condition import Conditioner
from ditf.export.graph.precision import Precision

_PACK = 2  # latent pixels along the side of a token: the pipeline packs them, not the transformer
_EPS = 1e-6  # the blocks fix it
_ROPE_BASE = 10000  # FluxTransformer2DModel fixes it


def _pipeline() -> Any:
    """FluxPipeline is imported when it is needed, since it imports image processors."""
    from diffusers import FluxPipeline

    return FluxPipeline


class FluxLayout(Family):
    """What FLUX.1, FLUX.2 and Chroma share: two-stream blocks, then single-stream ones, and their trunk."""

    takes_prompt = True
    attention_name = "attn"

    @property
    def blocks(self) -> Blocks:
        return Blocks((("double", self.config["num_layers"]), ("single", self.config["num_single_layers"])))

    def block_name(self, index: int) -> str:
        kind, number = self.blocks.locate(index)
        return f"transformer_blocks.{number}" if kind == "double" else f"single_transformer_blocks.{number}"

    @property
    @abstractmethod
    def block_specs(self) -> tuple[TwoStreamSpec, SingleStreamSpec]:
        """What its blocks are like."""

    def joint_blocks(self, layer: int) -> JointBlocks:
        """Blocks 0..k-1, and block k, whose first norm is the feature's."""
        double, single = self.block_specs
        names = [self.block_name(index) for index in range(layer + 1)]
        return JointBlocks.cut(names, [double] * self.config["num_layers"], single)

    @abstractmethod
    def embedder(self, weights: Weights, precision: Precision) -> PatchEmbedder:
        """Latents -> tokens."""

    @abstractmethod
    def rotary(self, spec: TrunkSpec) -> Rotary:
        """Cosines and sines of text and image tokens, [L + N, D / 2]."""

    def trunk(self, weights: Weights, spec: TrunkSpec, constants: ConditionTensors | None) -> JointTrunk:
        blocks, embedder = self.joint_blocks(spec.layer), self.embedder(weights, spec.precision)
        return build_joint_trunk(weights, blocks, embedder, spec.precision, constants, self.rotary(spec))


class Flux(FluxLayout):
    """FLUX.1 dev and schnell: two-stream blocks, then single-stream ones."""

    name = "flux"
    transformer_class = "FluxTransformer2DModel"
    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    text_classes: ClassVar[tuple[str, ...]] = (
        "CLIPTextModel",
        "CLIPTokenizer",
        "CLIPTokenizerFast",
        "T5EncoderModel",
        "T5Tokenizer",
        "T5TokenizerFast",
    )

    @property
    def takes_guidance(self) -> bool:  # type: ignore[override]
        return bool(self.config["guidance_embeds"])

    @property
    def defaults(self) -> Defaults:
        published = (self.channels, self.blocks.kinds) == (3072, (("double", 19), ("single", 38)))
        return Defaults(
            timestep=260,
            layer=28 if published else None,
            prompt="a photo",
            size=(640, 640),
            guidance=3.5 if self.takes_guidance else None,
            channels=(154, 1446) if published else None,
            source="DiTF's published settings for FLUX.1-dev: t=260, layer 28, guidance 3.5, 640 px",
        )

    @property
    def patch_size(self) -> int:
        return _PACK

    @property
    def latent_channels(self) -> int:
        return int(self.config["in_channels"]) // _PACK**2

    @property
    def _text_limit(self) -> int:
        """T5 tokens: the pipeline reads 512, schnell was trained with 256."""
        return 512 if self.takes_guidance else 256

    def example_condition(self) -> Condition:
        condition = {
            "prompt_embeds": torch.zeros(1, self._text_limit, self.config["joint_attention_dim"]),
            "pooled_prompt_embeds": torch.zeros(1, self.config["pooled_projection_dim"]),
        }
        return {**condition, "guidance": torch.zeros(1)} if self.takes_guidance else condition

    def encode_conditions(
        self, checkpoint: Checkpoint, subjects: Sequence[str | int], guidance: float | None
    ) -> list[Condition]:
        pipeline = load_text_pipeline(checkpoint, self.pipelines, self.text_classes)
        conditions: list[Condition] = []
        for prompt in map(str, subjects):
            check_prompt(prompt, pipeline.tokenizer_2, self._text_limit, "T5")
            embeds, pooled, _ = pipeline.encode_prompt(
                prompt, None, device=torch.device("cpu"), max_sequence_length=self._text_limit
            )
            condition = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
            if guidance is not None:
                condition["guidance"] = torch.tensor([guidance])
            conditions.append(condition)
        return conditions

    def reference_inputs(
        self, condition: Condition, timestep: int, size: tuple[int, int], grid: tuple[int, int], batch: int
    ) -> dict[str, Any]:
        embeds = condition["prompt_embeds"]
        guidance = condition.get("guidance")
        return {
            "timestep": torch.full((batch,), timestep / 1000),
            "encoder_hidden_states": embeds.expand(batch, -1, -1),
            "pooled_projections": condition["pooled_prompt_embeds"].expand(batch, -1),
            "guidance": None if guidance is None else guidance.expand(batch),
            **self.reference_positions(grid, embeds.shape[1]),
        }

    @staticmethod
    def reference_positions(grid: tuple[int, int], text_tokens: int) -> dict[str, torch.Tensor]:
        """Positions of image [N, 3] and text [L, 3], as the pipeline makes them."""
        image = _pipeline()._prepare_latent_image_ids(1, *grid, "cpu", torch.float32)
        return {"img_ids": image, "txt_ids": torch.zeros(text_tokens, 3)}

    def reference_latents(self, x_t: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = _pipeline()._pack_latents(x_t, *x_t.shape)
        return packed

    def conditioner(self, weights: Weights, spec: TrunkSpec) -> Conditioner:
        make = (
            CombinedTimestepGuidanceTextProjEmbeddings
            if self.takes_guidance
            else CombinedTimestepTextProjEmbeddings
        )
        embedding = weights.load_into(
            lambda: make(self.channels, self.config["pooled_projection_dim"]), "time_text_embed"
        )
        modulated = self.joint_blocks(spec.layer).modulated
        context = "context_embedder" if spec.layer else None
        return PooledConditioner(
            weights, embedding, modulated, context, self.takes_guidance, self.channels, spec.precision
        )

    @property
    def block_specs(self) -> tuple[TwoStreamSpec, SingleStreamSpec]:
        heads = self.config["num_attention_heads"]
        return TwoStreamSpec(heads, rotary=True, eps=_EPS), SingleStreamSpec(heads, eps=_EPS)

    def embedder(self, weights: Weights, precision: Precision) -> PatchEmbedder:
        """The linear over packed latents (c, 2, 2), as a convolution."""
        weight, bias = read_linear(weights, "x_embedder")
        return PatchEmbedder(weight.unflatten(1, (-1, _PACK, _PACK)), bias, None, precision)

    def rotary(self, spec: TrunkSpec) -> Rotary:
        """The text is at the origin."""
        ids = _pipeline()._prepare_latent_image_ids(1, *spec.grid, "cpu", torch.float32)
        embedding = FluxPosEmbed(_ROPE_BASE, self.config["axes_dims_rope"])
        cosine, sine = embedding(torch.cat([torch.zeros(spec.text_tokens, 3), ids]))
        return cosine[:, ::2], sine[:, ::2]  # diffusers repeats each for its pair
