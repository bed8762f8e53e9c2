"""Lumina-Image 2.0 (Qin et al. 2025): diffusers Lumina2Transformer2DModel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.text.pipeline import load_text_pipeline
from ditf.export.checkpoints.weights import Weights
from ditf.export.families.base import Blocks, Condition, Defaults, Family, TrunkSpec, check_prompt
from ditf.export.families.refined_text import RefinedConditioner, RefinedText, axes_rotary
from ditf.export.graph.blocks.adaln import UNMODULATED, modulations
from ditf.export.graph.blocks.condition_tensors import TEXT, ConditionTensors
from ditf.export.graph.blocks.layers import Rotary, read_linear
from ditf.export.graph.blocks.pre_post_norm import (
    PrePostNormBlock,
    PrePostNormSpec,
    PrePostNormTrunk,
    modulation_rows,
)
from ditf.export.graph.blocks.trunk import PatchEmbedder
from ditf.export.graph.condition import (
    Conditioner,
    LinearRows,
    ModulationProjection,
    with_constant_frequencies,
)
from ditf.export.graph.precision import Precision

_TEXT_TOKENS = 256  # max_sequence_length of Lumina2Pipeline.encode_prompt, its system prompt among them
_QK_EPS = 1e-5  # Lumina2TransformerBlock fixes it
_ROPE_BASE = 10000  # Lumina2Transformer2DModel fixes it
_TIME_WIDTH = 1024  # widest timestep embedding


class Lumina2(Family):
    """Lumina-Image 2.0: blocks that refine the image alone, then blocks over text and image.

    Its norms are RMSNorms with weights and without a shift, so the feature is
    F = (1 + scale_k) * weight_k * z / rms(z), the input of block k's attention. The first of an image token's
    three positions is the number of text tokens.
    """

    name = "lumina2"
    transformer_class = "Lumina2Transformer2DModel"
    pipelines = ("Lumina2Pipeline",)
    text_classes = ("Gemma2Model", "GemmaTokenizer", "GemmaTokenizerFast")
    takes_prompt = True
    attention_name = "attn"
    rms_norms = True
    defaults = Defaults(
        timestep=260,
        prompt="a photo",
        source="none published for Lumina2: half of its depth, and the timestep DiTF published for FLUX,"
        " which has the same noise schedule",
    )

    @property
    def blocks(self) -> Blocks:
        return Blocks((("refiner", self._refiners), ("layer", self.config["num_layers"])))

    @property
    def _refiners(self) -> int:
        """The number of blocks over the image alone; as many blocks refine the text before it is read."""
        return int(self.config["num_refiner_layers"])

    @property
    def channels(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def largest_grid(self) -> int:
        return int(min(self.config["axes_lens"][1:]))

    def block_name(self, index: int) -> str:
        kind, number = self.blocks.locate(index)
        return f"noise_refiner.{number}" if kind == "refiner" else f"layers.{number}"

    def example_condition(self) -> Condition:
        return {
            "prompt_embeds": torch.zeros(1, _TEXT_TOKENS, self.config["cap_feat_dim"]),
            "prompt_attention_mask": torch.ones(1, _TEXT_TOKENS, dtype=torch.int64),
        }

    def encode_conditions(
        self, checkpoint: Checkpoint, subjects: Sequence[str | int], guidance: float | None
    ) -> list[Condition]:
        pipeline = load_text_pipeline(checkpoint, self.pipelines, self.text_classes)
        conditions: list[Condition] = []
        for prompt in map(str, subjects):
            whole = f"{pipeline.system_prompt} <Prompt Start> {prompt}"
            check_prompt(whole, pipeline.tokenizer, _TEXT_TOKENS, "Gemma 2, with the system prompt,")
            embeds, mask, _, _ = pipeline.encode_prompt(
                prompt, do_classifier_free_guidance=False, device=torch.device("cpu")
            )
            conditions.append({"prompt_embeds": embeds, "prompt_attention_mask": mask})
        return conditions

    def text_tokens(self, condition: Condition) -> int:
        return int(condition["prompt_attention_mask"].sum())

    def reference_inputs(
        self, condition: Condition, timestep: int, size: tuple[int, int], grid: tuple[int, int], batch: int
    ) -> dict[str, Any]:
        return {
            "timestep": 1 - torch.full((batch,), timestep) / 1000,
            "encoder_hidden_states": condition["prompt_embeds"].expand(batch, -1, -1),
            "encoder_attention_mask": condition["prompt_attention_mask"].expand(batch, -1),
        }

    def conditioner(self, weights: Weights, spec: TrunkSpec) -> Conditioner:
        sizes = modulation_rows(spec.layer)
        linears = LinearRows(
            weights,
            [(f"{self.block_name(i)}.norm1.linear", rows * self.channels) for i, rows in enumerate(sizes)],
        )
        width = min(self.channels, _TIME_WIDTH)
        time = weights.load_into(
            lambda: TimestepEmbedding(256, width), "time_caption_embed.timestep_embedder"
        )
        projection = ModulationProjection(linears, spec.precision, self.channels)
        text = self._text(weights, spec.precision) if spec.layer > self._refiners else None
        embedding = with_constant_frequencies(_TimeEmbedding(time))
        return RefinedConditioner(embedding, projection, text)

    def _text(self, weights: Weights, precision: Precision) -> RefinedText:
        blocks = [
            PrePostNormBlock(
                weights,
                f"context_refiner.{index}",
                self._kind("norm1"),
                UNMODULATED,
                precision,
                stream="text",
            )
            for index in range(self._refiners)
        ]
        rotary = self._rotary([torch.arange(_TEXT_TOKENS + 1), torch.zeros(1), torch.zeros(1)])
        embedder = "time_caption_embed.caption_embedder"
        return RefinedText(weights, embedder, self.config["norm_eps"], blocks, rotary, precision)

    def _kind(self, first_norm: str) -> PrePostNormSpec:
        """What its blocks are like; the first norm of those that have no AdaLN has another name."""
        return PrePostNormSpec(
            self.config["num_attention_heads"],
            "attn",
            (first_norm, "norm2", "ffn_norm1", "ffn_norm2"),
            ("feed_forward.linear_1", "feed_forward.linear_3", "feed_forward.linear_2"),
            self.config["norm_eps"],
            _QK_EPS,
        )

    def trunk(
        self, weights: Weights, spec: TrunkSpec, constants: ConditionTensors | None
    ) -> PrePostNormTrunk:
        reads_text = spec.layer > self._refiners
        *parts, own = modulations(constants, modulation_rows(spec.layer))
        blocks = [
            PrePostNormBlock(
                weights,
                self.block_name(index),
                self._kind("norm1.norm"),
                modulation,
                spec.precision,
                last=reads_text and index == spec.layer - 1,
            )
            for index, modulation in enumerate(parts)
        ]
        norm = weights.tensor(f"{self.block_name(spec.layer)}.norm1.norm.weight")
        weight, bias = read_linear(weights, "x_embedder")
        patch = weight.unflatten(1, (self.patch_size, self.patch_size, -1)).permute(0, 3, 1, 2)
        text = spec.text_tokens if reads_text else 0
        positions = torch.stack(torch.meshgrid(*map(torch.arange, spec.grid), indexing="ij")).flatten(1)
        first = torch.cat([torch.arange(text), torch.full((positions.shape[1],), text)])
        return PrePostNormTrunk(
            PatchEmbedder(patch, bias, None, spec.precision),
            blocks,
            self._refiners,
            own.rms_norm(0, norm, self.config["norm_eps"]),
            constants[TEXT][None] if constants is not None and reads_text else None,
            self._rotary([first, *nn.functional.pad(positions, (text, 0))]),
        )

    def _rotary(self, positions: Sequence[torch.Tensor]) -> Rotary:
        return axes_rotary(self.config["axes_dim_rope"], _ROPE_BASE, positions)


class _TimeEmbedding(nn.Module):
    """`timestep_embedder`; its time is 1 for the image and 0 for noise."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.waves = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.projection = projection

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        return self.projection(self.waves(1 - timestep / 1000))
