"""FLUX.1 (Black Forest Labs 2024): diffusers FluxTransformer2DModel, dev (guidance-distilled) and schnell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.embeddings import (
    CombinedTimestepGuidanceTextProjEmbeddings,
    CombinedTimestepTextProjEmbeddings,
)
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.loading import load_text_pipeline
from ditf.export.checkpoints.weights import Weights
from ditf.export.families.base import Blocks, Condition, Defaults, Family, TrunkSpec, check_prompt
from ditf.export.families.mmdit import PooledConditioner, stream_rows
from ditf.export.graph.blocks.adaln import ModulatedNorm
from ditf.export.graph.blocks.layers import Rotary, read_linear
from ditf.export.graph.blocks.trunk import Given, PatchEmbedder
from ditf.export.graph.blocks.two_stream import (
    NORM_ROWS,
    JointBlock,
    JointTrunk,
    SingleBlock,
)
from ditf.export.graph.condition import Conditioner

_PACK = 2  # latent pixels along the side of a token: the pipeline packs them, not the transformer
_EPS = 1e-6  # the blocks fix it
_ROPE_BASE = 10000  # FluxTransformer2DModel fixes it


def _pipeline() -> Any:
    """Imported when needed: it brings image processors that no other family uses."""
    from diffusers import FluxPipeline

    return FluxPipeline


class Flux(Family):
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
    takes_prompt = True
    attention_name = "attn"

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
    def blocks(self) -> Blocks:
        return Blocks((("double", self.config["num_layers"]), ("single", self.config["num_single_layers"])))

    @property
    def patch_size(self) -> int:
        return _PACK

    @property
    def latent_channels(self) -> int:
        return int(self.config["in_channels"]) // _PACK**2

    @property
    def _text_limit(self) -> int:
        """T5 tokens: the pipeline's 512; schnell was trained with 256."""
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
            check_prompt(prompt, pipeline.tokenizer, pipeline.tokenizer_max_length, "CLIP")
            check_prompt(prompt, pipeline.tokenizer_2, self._text_limit, "T5")
            embeds, pooled, _ = pipeline.encode_prompt(
                prompt, None, device=torch.device("cpu"), max_sequence_length=self._text_limit
            )
            condition = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
            if guidance is not None:
                condition["guidance"] = torch.tensor([guidance])
            conditions.append(condition)
        return conditions

    def block_name(self, index: int) -> str:
        kind, number = self.blocks.locate(index)
        return f"transformer_blocks.{number}" if kind == "double" else f"single_transformer_blocks.{number}"

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
        """Of image [N, 3] and text [L, 3], as the pipeline makes them."""
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
        names = [f"{self.block_name(index)}.{norm}.linear" for index, norm in self._norms(spec.layer)]
        linears = [*zip(names, stream_rows(spec.layer, self._doubles(spec.layer)), strict=True)]
        own = "norm1" if self.blocks.locate(spec.layer)[0] == "double" else "norm"
        linears.append((f"{self.block_name(spec.layer)}.{own}.linear", NORM_ROWS))
        context = "context_embedder" if spec.layer else None
        return PooledConditioner(
            weights, embedding, linears, context, self.takes_guidance, self.channels, spec.precision
        )

    def _doubles(self, layer: int) -> int:
        """Two-stream blocks that run."""
        return min(layer, int(self.config["num_layers"]))

    def _norms(self, layer: int) -> list[tuple[int, str]]:
        """(block, norm) in the order of the modulation's rows."""
        doubles = self._doubles(layer)
        return [
            *((index, norm) for index in range(doubles) for norm in ("norm1", "norm1_context")),
            *((index, "norm") for index in range(doubles, layer)),
        ]

    def trunk(self, weights: Weights, spec: TrunkSpec, fixed: Given | None) -> JointTrunk:
        sizes = stream_rows(spec.layer, self._doubles(spec.layer))
        rows: Sequence[torch.Tensor | None] = (None,) * (len(sizes) + 1)
        text = None
        if fixed is not None:
            rows = fixed["modulation"].split([*sizes, NORM_ROWS])
            text = fixed["text"][None] if spec.layer else None
        heads = self.config["num_attention_heads"]
        doubles = self._doubles(spec.layer)
        double_blocks = [
            JointBlock(
                weights,
                self.block_name(index),
                heads,
                spec.precision,
                dual=False,
                qk_norm=True,
                rotary=True,
                image_rows=rows[2 * index],
                text_rows=rows[2 * index + 1],
                last=index == spec.layer - 1,
                text=text if index == 0 else None,
                eps=_EPS,
            )
            for index in range(doubles)
        ]
        single_blocks = [
            SingleBlock(
                weights,
                self.block_name(index),
                heads,
                spec.precision,
                rows=rows[doubles + index],
                last=index == spec.layer - 1,
                eps=_EPS,
            )
            for index in range(doubles, spec.layer)
        ]
        return JointTrunk(
            self._embedder(weights),
            double_blocks,
            single_blocks,
            ModulatedNorm(rows[-1], _EPS),
            text,
            self._rotary(spec),
            sizes,
        )

    def _embedder(self, weights: Weights) -> PatchEmbedder:
        """The linear over packed latents (c, 2, 2) as the convolution that it is."""
        weight, bias = read_linear(weights, "x_embedder")
        return PatchEmbedder(weight.unflatten(1, (-1, _PACK, _PACK)), bias, None)

    def _rotary(self, spec: TrunkSpec) -> Rotary:
        """Cosines and sines [L + N, D / 2]; the text is at the origin."""
        ids = _pipeline()._prepare_latent_image_ids(1, *spec.grid, "cpu", torch.float32)
        embedding = FluxPosEmbed(_ROPE_BASE, self.config["axes_dims_rope"])
        cosine, sine = embedding(torch.cat([torch.zeros(spec.text_tokens, 3), ids]))
        return cosine[:, ::2], sine[:, ::2]  # diffusers repeats each for its pair
