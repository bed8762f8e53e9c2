"""FLUX.2 [klein] (Black Forest Labs 2026): diffusers Flux2Transformer2DModel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed, Flux2TimestepGuidanceEmbeddings
from torch import nn

from ditf.export.checkpoints.chat_template import as_template, render_chats
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.loading import load_text_pipeline
from ditf.export.checkpoints.weights import Weights
from ditf.export.families.base import Blocks, Condition, Defaults, Family, TrunkSpec, check_prompt
from ditf.export.families.mmdit import stream_rows
from ditf.export.graph.blocks.adaln import ModulatedNorm
from ditf.export.graph.blocks.layers import Linear, Rotary, read_linear
from ditf.export.graph.blocks.trunk import Given, PatchEmbedder
from ditf.export.graph.blocks.two_stream import (
    NORM_ROWS,
    JointBlock,
    JointTrunk,
    SingleBlock,
    SingleNames,
)
from ditf.export.graph.condition import (
    MODULATION,
    Conditioner,
    LinearRows,
    Projection,
    with_constant_frequencies,
)
from ditf.runtime.errors import InputError

_PIPELINE = "Flux2KleinPipeline"
_TEXT_TOKENS = 512  # max_sequence_length of Flux2KleinPipeline.encode_prompt
_DOUBLE_IMAGE, _DOUBLE_TEXT, _SINGLE = (
    f"{name}.linear"
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
)
_FUSED = "attn.to_qkv_mlp_proj"
_PARTS = SingleNames("attn.mlp_proj", "attn.to_out", gated=True)


def _pipeline() -> Any:
    """Imported when needed: it brings image processors that few families use."""
    from diffusers import Flux2KleinPipeline

    return Flux2KleinPipeline


class Flux2(Family):
    """FLUX.2 [klein]: two-stream blocks, then single-stream ones, whose modulation is one for each kind.

    x_0 is the VAE's latents in squares of 2x2, normed by its batch norm. The text is rotated by its place.
    All 512 text tokens are read, padding too, as the pipeline does.
    """

    name = "flux2"
    transformer_class = "Flux2Transformer2DModel"
    pipelines = (_PIPELINE,)
    text_classes = ("Qwen3ForCausalLM", "Qwen2Tokenizer", "Qwen2TokenizerFast")
    takes_prompt = True
    attention_name = "attn"
    vae_class = "AutoencoderKLFlux2"
    defaults = Defaults(
        timestep=260,
        prompt="a photo",
        size=(640, 640),
        source="none published for FLUX.2: half of its depth, and the timestep and size DiTF published for"
        " FLUX.1, which has the same noise schedule",
    )

    @property
    def blocks(self) -> Blocks:
        return Blocks((("double", self.config["num_layers"]), ("single", self.config["num_single_layers"])))

    def block_name(self, index: int) -> str:
        kind, number = self.blocks.locate(index)
        return f"transformer_blocks.{number}" if kind == "double" else f"single_transformer_blocks.{number}"

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
        """Of image [N, 4] and text [L, 4]."""
        pipeline = _pipeline()
        image = pipeline._prepare_latent_ids(torch.empty(1, 1, *grid))
        return image[0], pipeline._prepare_text_ids(torch.empty(1, text_tokens, 1))[0]

    def _doubles(self, layer: int) -> int:
        """Two-stream blocks that run."""
        return min(layer, int(self.config["num_layers"]))

    def conditioner(self, weights: Weights, spec: TrunkSpec) -> Conditioner:
        doubles = self._doubles(spec.layer)
        shared = [_DOUBLE_IMAGE, _DOUBLE_TEXT] * doubles + [_SINGLE] * (spec.layer - doubles)
        shared.append(_DOUBLE_IMAGE if spec.layer < self.config["num_layers"] else _SINGLE)
        parts: list[tuple[str, int]] = []
        count = 0
        starts: dict[str, int] = {}
        rows: list[int] = []
        for name, used in zip(
            shared, [*stream_rows(spec.layer, self._doubles(spec.layer)), NORM_ROWS], strict=True
        ):
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
        context = Linear(*read_linear(weights, "context_embedder"), torch.float32) if spec.layer else None
        projection = Projection(LinearRows(weights, parts), spec.precision.of(MODULATION), self.channels)
        return _Conditioner(embedding, projection, rows, context)

    def trunk(self, weights: Weights, spec: TrunkSpec, fixed: Given | None) -> JointTrunk:
        self.require(guidance_embeds=(False,), patch_size=(1,), eps=(1e-6,))
        sizes = stream_rows(spec.layer, self._doubles(spec.layer))
        rows: Sequence[torch.Tensor | None] = (None,) * (len(sizes) + 1)
        text = None
        if fixed is not None:
            rows = fixed[MODULATION].split([*sizes, NORM_ROWS])
            text = fixed["text"][None] if spec.layer else None
        heads, eps, doubles = (
            self.config["num_attention_heads"],
            self.config["eps"],
            self._doubles(spec.layer),
        )
        cosine, sine = self._rotary(spec)
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
                text_rotary=(cosine[: spec.text_tokens], sine[: spec.text_tokens]),
                gated=True,
                eps=eps,
            )
            for index in range(doubles)
        ]
        single_blocks = [
            SingleBlock(
                _Unfused(weights, self.block_name(index), self.channels),
                self.block_name(index),
                heads,
                spec.precision,
                rows=rows[doubles + index],
                last=index == spec.layer - 1,
                parts=_PARTS,
                eps=eps,
            )
            for index in range(doubles, spec.layer)
        ]
        weight, bias = read_linear(weights, "x_embedder")
        return JointTrunk(
            PatchEmbedder(weight[:, :, None, None], bias, None),
            double_blocks,
            single_blocks,
            ModulatedNorm(rows[-1], eps),
            text,
            (cosine, sine),
            sizes,
            text_rotated=True,
        )

    def _rotary(self, spec: TrunkSpec) -> Rotary:
        """Cosines and sines [L + N, D / 2]."""
        image, text = self._positions(spec.grid, spec.text_tokens)
        embedding = Flux2PosEmbed(self.config["rope_theta"], self.config["axes_dims_rope"])
        cosine, sine = embedding(torch.cat([text, image]))
        return cosine[:, ::2], sine[:, ::2]  # diffusers repeats each for its pair


class _Unfused(Weights):
    """The fused first linear of a single-stream block as query, key, value and feed-forward."""

    def __init__(self, weights: Weights, name: str, channels: int) -> None:
        source = f"{name}.{_FUSED}.weight"
        rows, width = weights.shapes[source]
        edges = {
            "attn.to_q": (0, channels),
            "attn.to_k": (channels, 2 * channels),
            "attn.to_v": (2 * channels, 3 * channels),
            _PARTS.feed_forward: (3 * channels, rows),
        }
        self._parts = {f"{name}.{part}.weight": slice(*edge) for part, edge in edges.items()}
        self._fused = weights.tensor(source)
        self._weights = weights
        shapes = {part: (rows.stop - rows.start, width) for part, rows in self._parts.items()}
        super().__init__(
            {**weights.shapes, **shapes},
            {**weights.bytes_of, **{part: 4 * math.prod(shape) for part, shape in shapes.items()}},
        )
        self.read = weights.read

    def tensor(self, name: str) -> torch.Tensor:
        return self._fused[self._parts[name]] if name in self._parts else self._weights.tensor(name)

    def _load(self, name: str) -> torch.Tensor:
        return self._weights.tensor(name)


class _Conditioner(Conditioner):
    """Timestep -> rows of the shared modulations, once for every block; text embeddings -> text tokens.

    Args:
        rows: of the shared modulations, in the order of the blocks.
        context: text embedder, None where no block reads the text.
    """

    def __init__(
        self, embedding: nn.Module, projection: Projection, rows: Sequence[int], context: Linear | None
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
            given["text"] = self.context(condition["prompt_embeds"][0]).to(torch.float32)
        return given
