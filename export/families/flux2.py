"""FLUX.2 [klein] (Black Forest Labs 2026): diffusers Flux2Transformer2DModel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed, Flux2TimestepGuidanceEmbeddings
from torch import nn

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.text.chat_template import as_template, render_chats
from ditf.export.checkpoints.text.pipeline import load_text_pipeline
from ditf.export.checkpoints.weights import Weights
from ditf.export.families.base import Condition, Defaults, TrunkSpec, check_prompt
from ditf.export.families.flux import FluxLayout
from ditf.export.graph.blocks.condition_tensors import MODULATION, TEXT, ConditionTensors
from ditf.export.graph.blocks.joint_trunk import JointTrunk
from ditf.export.graph.blocks.layers import Linear, Rotary, read_linear
from ditf.export.graph.blocks.single_stream import SingleStreamBlock, SingleStreamSpec
from ditf.export.graph.blocks.trunk import PatchEmbedder
from ditf.export.graph.blocks.two_stream import TwoStreamSpec
from ditf.export.graph.condition import (
    Conditioner,
    LinearRows,
    ModulationProjection,
    with_constant_frequencies,
)
from ditf.export.graph.precision import EMBEDDERS, Precision
from ditf.runtime.errors import InputError

_PIPELINE = "Flux2KleinPipeline"
_TEXT_TOKENS = 512  # max_sequence_length of Flux2KleinPipeline.encode_prompt
_DOUBLE_IMAGE, _DOUBLE_TEXT, _SINGLE = (
    f"{name}.linear"
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
)
_FUSED = "attn.to_qkv_mlp_proj"
_FEED_FORWARD = "attn.mlp_proj"  # its part of the fused linear


def _pipeline() -> Any:
    """Flux2KleinPipeline is imported when it is needed, since it imports image processors."""
    from diffusers import Flux2KleinPipeline

    return Flux2KleinPipeline


class Flux2(FluxLayout):
    """FLUX.2 [klein]: two-stream blocks, then single-stream ones; all blocks of a kind share a modulation.

    x_0 is the VAE's latents in squares of 2x2, normed by the VAE's batch norm. The text is rotated by its
    position. All 512 text tokens are read, padding included, as in the pipeline.
    """

    name = "flux2"
    transformer_class = "Flux2Transformer2DModel"
    pipelines = (_PIPELINE,)
    text_classes = ("Qwen3ForCausalLM", "Qwen2Tokenizer", "Qwen2TokenizerFast")
    vae_class = "AutoencoderKLFlux2"
    defaults = Defaults(
        timestep=260,
        prompt="a photo",
        size=(640, 640),
        source="none published for FLUX.2: half of its depth, and the timestep and size DiTF published for"
        " FLUX.1, which has the same noise schedule",
    )

    def example_condition(self) -> Condition:
        return {"prompt_embeds": torch.zeros(1, _TEXT_TOKENS, self.config["joint_attention_dim"])}

    def encode_conditions(
        self, checkpoint: Checkpoint, subjects: Sequence[str | int], guidance: float | None
    ) -> list[Condition]:
        own = checkpoint.index().get("_class_name")
        if own != _PIPELINE:
            raise InputError(f"{checkpoint.id} is a {own}, whose text is not supported", f"use a {_PIPELINE}")
        pipeline = load_text_pipeline(checkpoint, self.pipelines, self.text_classes)
        conditions: list[Condition] = []
        prompts = [str(subject) for subject in subjects]
        chats = render_chats(pipeline.tokenizer, prompts, thinking=False)
        for prompt, chat in zip(prompts, chats, strict=True):
            check_prompt(prompt, pipeline.tokenizer, _TEXT_TOKENS, "Qwen3", chat)
            pipeline.tokenizer.chat_template = as_template(chat)
            embeds, _ = pipeline.encode_prompt(prompt, device=torch.device("cpu"))
            conditions.append({"prompt_embeds": embeds})
        return conditions

    def reference_inputs(
        self, condition: Condition, timestep: int, size: tuple[int, int], grid: tuple[int, int], batch: int
    ) -> dict[str, Any]:
        embeds = condition["prompt_embeds"]
        image, text = self._positions(grid, embeds.shape[1])
        return {
            "timestep": torch.full((batch,), timestep / 1000),
            "encoder_hidden_states": embeds.expand(batch, -1, -1),
            "img_ids": image,
            "txt_ids": text,
        }

    def reference_latents(self, x_t: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = _pipeline()._pack_latents(x_t)
        return packed

    @staticmethod
    def _positions(grid: tuple[int, int], text_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of image [N, 4] and text [L, 4]."""
        pipeline = _pipeline()
        image = pipeline._prepare_latent_ids(torch.empty(1, 1, *grid))
        return image[0], pipeline._prepare_text_ids(torch.empty(1, text_tokens, 1))[0]

    def conditioner(self, weights: Weights, spec: TrunkSpec) -> Conditioner:
        blocks = self.joint_blocks(spec.layer)
        shared = [_DOUBLE_IMAGE, _DOUBLE_TEXT] * len(blocks.doubles) + [_SINGLE] * len(blocks.singles)
        shared.append(_DOUBLE_IMAGE if spec.layer < self.config["num_layers"] else _SINGLE)
        parts: list[tuple[str, int]] = []
        count = 0
        starts: dict[str, int] = {}
        rows: list[int] = []
        for name, used in zip(shared, blocks.rows, strict=True):
            if name not in starts:
                starts[name] = count
                parts.append((name, weights.shapes[f"{name}.weight"][0]))
                count += parts[-1][1] // self.channels
            rows += range(starts[name], starts[name] + used)
        embedding = weights.load_into(
            lambda: Flux2TimestepGuidanceEmbeddings(
                self.config["timestep_guidance_channels"], self.channels, guidance_embeds=False
            ),
            "time_guidance_embed",
        )
        context = None
        if spec.layer:
            context = Linear.read(weights, "context_embedder", precision=spec.precision, kept=EMBEDDERS)
        projection = ModulationProjection(LinearRows(weights, parts), spec.precision, self.channels)
        return _Conditioner(embedding, projection, rows, context)

    @property
    def block_specs(self) -> tuple[TwoStreamSpec, SingleStreamSpec]:
        heads, eps = self.config["num_attention_heads"], self.config["eps"]
        return (
            TwoStreamSpec(heads, rotary=True, text_rotary=True, gated=True, eps=eps),
            _FusedSingleSpec(heads, _FEED_FORWARD, "attn.to_out", gated=True, eps=eps),
        )

    def trunk(self, weights: Weights, spec: TrunkSpec, constants: ConditionTensors | None) -> JointTrunk:
        self.require(guidance_embeds=(False,), patch_size=(1,), eps=(1e-6,))
        return super().trunk(weights, spec, constants)

    def embedder(self, weights: Weights, precision: Precision) -> PatchEmbedder:
        """The linear over the channels of a latent pixel, as a convolution."""
        weight, bias = read_linear(weights, "x_embedder")
        return PatchEmbedder(weight[:, :, None, None], bias, None, precision)

    def rotary(self, spec: TrunkSpec) -> Rotary:
        image, text = self._positions(spec.grid, spec.text_tokens)
        embedding = Flux2PosEmbed(self.config["rope_theta"], self.config["axes_dims_rope"])
        cosine, sine = embedding(torch.cat([text, image]))
        return cosine[:, ::2], sine[:, ::2]  # diffusers repeats each for its pair


class _Unfused(Weights):
    """Presents the fused first linear of a single-stream block as query, key, value and feed-forward."""

    def __init__(self, weights: Weights, name: str, channels: int) -> None:
        source = f"{name}.{_FUSED}.weight"
        rows, width = weights.shapes[source]
        edges = {
            "attn.to_q": (0, channels),
            "attn.to_k": (channels, 2 * channels),
            "attn.to_v": (2 * channels, 3 * channels),
            _FEED_FORWARD: (3 * channels, rows),
        }
        self._parts = {f"{name}.{part}.weight": slice(*edge) for part, edge in edges.items()}
        self._fused = weights.tensor(source)
        self._weights = weights
        shapes = {part: (rows.stop - rows.start, width) for part, rows in self._parts.items()}
        super().__init__(
            {**weights.shapes, **shapes},
            {**weights.bytes_of, **{part: 4 * math.prod(shape) for part, shape in shapes.items()}},
            {**weights.dtypes, **dict.fromkeys(shapes, weights.dtypes[source])},
        )
        self.read = weights.read

    def tensor(self, name: str) -> torch.Tensor:
        part = self._parts.get(name)
        return self._weights.tensor(name) if part is None else self._fused[part]

    def _load(self, name: str) -> torch.Tensor:
        return self._weights.tensor(name)


class _FusedSingleBlock(SingleStreamBlock):
    """A single-stream block whose first linears are one in the checkpoint."""

    def __init__(self, weights: Weights, name: str, spec: SingleStreamSpec, *others: Any) -> None:
        width = weights.shapes[f"{name}.{_FUSED}.weight"][1]
        super().__init__(_Unfused(weights, name, width), name, spec, *others)


class _FusedSingleSpec(SingleStreamSpec):
    block = _FusedSingleBlock


class _Conditioner(Conditioner):
    """Computes the shared modulations, repeated for every block, and text tokens from text embeddings.

    Args:
        rows: of the shared modulations, in the order of the blocks.
        context: text embedder, None where no block reads the text.
    """

    def __init__(
        self,
        embedding: nn.Module,
        projection: ModulationProjection,
        rows: Sequence[int],
        context: Linear | None,
    ) -> None:
        super().__init__()
        self.embedding = with_constant_frequencies(embedding)
        self.projection = projection
        self.rows = list(rows)
        self.context = context
        self.inputs = ("prompt_embeds",) if context else ()

    def forward(
        self, timestep: torch.Tensor, condition: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        shared = self.projection(self.embedding(timestep.to(torch.float32), None))
        given = {MODULATION: shared[self.rows]}
        if self.context is not None:
            given[TEXT] = self.context(condition["prompt_embeds"][0]).to(torch.float32)
        return given
