"""AuraFlow (fal 2024): diffusers AuraFlowTransformer2DModel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.text.pipeline import load_text_pipeline
from ditf.export.checkpoints.weights import Weights
from ditf.export.families.base import Blocks, Condition, Defaults, Family, TrunkSpec, check_prompt
from ditf.export.graph.blocks.auraflow import AuraFlowJointSpec, AuraFlowSingleSpec
from ditf.export.graph.blocks.condition_tensors import MODULATION, TEXT, ConditionTensors
from ditf.export.graph.blocks.joint_trunk import JointBlocks, JointTrunk, build_joint_trunk
from ditf.export.graph.blocks.layers import Linear, constant, read_linear
from ditf.export.graph.blocks.trunk import PatchEmbedder
from ditf.export.graph.condition import (
    Conditioner,
    LinearRows,
    ModulationProjection,
    with_constant_frequencies,
)
from ditf.export.graph.precision import EMBEDDERS, Precision

_TEXT_TOKENS = 256  # max_sequence_length of AuraFlowPipeline.encode_prompt


class AuraFlow(Family):
    """AuraFlow: joint blocks, then single ones. Register tokens precede the text, and no token is masked."""

    name = "auraflow"
    transformer_class = "AuraFlowTransformer2DModel"
    pipelines = ("AuraFlowPipeline",)
    text_classes = (
        "UMT5EncoderModel",
        "LlamaTokenizer",
        "LlamaTokenizerFast",
        "T5Tokenizer",
        "T5TokenizerFast",
    )
    takes_prompt = True
    attention_name = "attn"
    shifts_latents = False
    defaults = Defaults(
        timestep=260,
        prompt="a photo",
        source="none published for AuraFlow: half of its depth, and the timestep DiTF published for FLUX,"
        " which has the same noise schedule",
    )

    @property
    def blocks(self) -> Blocks:
        joint, single = self.config["num_mmdit_layers"], self.config["num_single_dit_layers"]
        return Blocks((("joint", joint), ("single", single)))

    @property
    def largest_grid(self) -> int:
        return math.isqrt(self.config["pos_embed_max_size"])

    def block_name(self, index: int) -> str:
        kind, number = self.blocks.locate(index)
        return f"{kind}_transformer_blocks.{number}"

    def example_condition(self) -> Condition:
        return {"prompt_embeds": torch.zeros(1, _TEXT_TOKENS, self.config["joint_attention_dim"])}

    def encode_conditions(
        self, checkpoint: Checkpoint, subjects: Sequence[str | int], guidance: float | None
    ) -> list[Condition]:
        pipeline = load_text_pipeline(checkpoint, self.pipelines, self.text_classes)
        conditions: list[Condition] = []
        for prompt in map(str, subjects):
            check_prompt(prompt, pipeline.tokenizer, _TEXT_TOKENS, "T5")
            embeds, _, _, _ = pipeline.encode_prompt(
                prompt, do_classifier_free_guidance=False, device=torch.device("cpu")
            )
            conditions.append({"prompt_embeds": embeds})
        return conditions

    def reference_inputs(
        self, condition: Condition, timestep: int, size: tuple[int, int], grid: tuple[int, int], batch: int
    ) -> dict[str, Any]:
        return {
            "timestep": torch.full((batch,), timestep / 1000),
            "encoder_hidden_states": condition["prompt_embeds"].expand(batch, -1, -1),
        }

    def _blocks(self, layer: int) -> JointBlocks:
        heads = self.config["num_attention_heads"]
        names = [self.block_name(index) for index in range(layer + 1)]
        doubles = [AuraFlowJointSpec(heads)] * self.config["num_mmdit_layers"]
        return JointBlocks.cut(names, doubles, AuraFlowSingleSpec(heads))

    def conditioner(self, weights: Weights, spec: TrunkSpec) -> Conditioner:
        modulated = self._blocks(spec.layer).modulated
        linears = LinearRows(weights, [(f"{name}.linear", rows * self.channels) for name, rows in modulated])
        return _Conditioner(weights, self.channels, linears, spec.layer > 0, spec.precision)

    def trunk(self, weights: Weights, spec: TrunkSpec, constants: ConditionTensors | None) -> JointTrunk:
        embedder = self._embedder(weights, spec)
        return build_joint_trunk(weights, self._blocks(spec.layer), embedder, spec.precision, constants)

    def _embedder(self, weights: Weights, spec: TrunkSpec) -> PatchEmbedder:
        """`AuraFlowPatchEmbed` is a linear over patches, plus the middle of a learned square of positions."""
        weight, bias = read_linear(weights, "pos_embed.proj")
        side = self.largest_grid
        top, left = (side // 2 - length // 2 for length in spec.grid)
        square = weights.tensor("pos_embed.pos_embed").reshape(side, side, -1)
        position = square[top : top + spec.grid[0], left : left + spec.grid[1]].flatten(0, 1)
        patch = weight.unflatten(1, (-1, self.patch_size, self.patch_size))
        return PatchEmbedder(patch, bias, position, spec.precision)


class _TimeEmbedding(nn.Module):
    """`time_step_embed` and `time_step_proj` of the transformer, whose time is 0..1."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.waves = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000)
        self.projection = projection

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        return self.projection(self.waves(timestep / 1000))


class _Conditioner(Conditioner):
    """Timestep -> modulation; register tokens and text embeddings -> text tokens."""

    def __init__(
        self,
        weights: Weights,
        channels: int,
        linears: LinearRows,
        text: bool,
        precision: Precision,
    ) -> None:
        super().__init__()
        projection = weights.load_into(lambda: TimestepEmbedding(256, channels), "time_step_proj")
        self.embedding = with_constant_frequencies(_TimeEmbedding(projection))
        self.projection = ModulationProjection(linears, precision, channels)
        self.context: Linear | None = None
        if text:
            self.context = Linear.read(weights, "context_embedder", precision=precision, kept=EMBEDDERS)
            self.registers = constant(weights.tensor("register_tokens")[0])
        self.inputs = ("prompt_embeds",) if text else ()

    def forward(
        self, timestep: torch.Tensor, condition: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        given = {MODULATION: self.projection(self.embedding(timestep))}
        if self.context is not None:
            tokens = self.context(condition["prompt_embeds"][0]).to(torch.float32)
            given[TEXT] = torch.cat([self.registers, tokens])
        return given
