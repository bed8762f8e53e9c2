"""Chroma (lodestones 2025): diffusers ChromaTransformer2DModel, FLUX.1's blocks with another modulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_chroma import (
    ChromaApproximator,
    ChromaCombinedTimestepTextProjEmbeddings,
)
from torch import nn

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.text.pipeline import load_text_pipeline
from ditf.export.checkpoints.weights import Weights
from ditf.export.families.base import Condition, Defaults, TrunkSpec, check_prompt
from ditf.export.families.flux import Flux
from ditf.export.graph.blocks.adaln import NORM_ROWS
from ditf.export.graph.blocks.condition_tensors import MODULATION, TEXT, TEXT_BIAS, TEXT_BIAS_ROWS
from ditf.export.graph.blocks.layers import Linear, constant
from ditf.export.graph.blocks.single_stream import SINGLE_ROWS
from ditf.export.graph.blocks.two_stream import IMAGE_ROWS
from ditf.export.graph.condition import Conditioner, with_constant_frequencies
from ditf.export.graph.precision import EMBEDDERS

_TEXT_TOKENS = 512  # max_sequence_length of ChromaPipeline.encode_prompt
_PIPELINE, _HIDDEN = "pipeline", "masked"  # values of --text-padding
_MASKED = -10000.0  # added to the logits of a masked token: its weight is exactly 0


class Chroma(Flux):
    """Chroma has FLUX.1's blocks, with another modulation.

    One network makes every row of the modulation from the timestep and the row's number.

    The text is T5's alone, padded to 512 tokens. The authors' code masks the padding but for one token. The
    diffusers pipeline passes on that mask as floats m, and its attention adds m_i m_j to the logit of query i
    and key j instead of masking (huggingface/diffusers 12116, 13619): to image and prompt the padding weighs
    1/e of the other tokens, and padding is not told apart from them. ditf follows the pipeline. With
    --text-padding masked the unmodified transformer is given only the tokens that the authors' code reads.
    """

    name = "chroma"
    transformer_class = "ChromaTransformer2DModel"
    pipelines = ("ChromaPipeline",)
    text_classes = ("T5EncoderModel", "T5Tokenizer", "T5TokenizerFast")
    takes_guidance = False
    text_paddings = (_PIPELINE, _HIDDEN)
    text_padding = _PIPELINE

    @property
    def short_text(self) -> int | None:  # type: ignore[override]
        return 8 if self.text_padding == _HIDDEN else None

    @property
    def defaults(self) -> Defaults:
        published = (self.channels, self.blocks.kinds) == (3072, (("double", 19), ("single", 38)))
        return Defaults(
            timestep=260,
            layer=28 if published else None,
            prompt="a photo",
            size=(640, 640),
            source="none published for Chroma: those DiTF published for FLUX.1, whose blocks and noise"
            " schedule it has",
        )

    def example_condition(self) -> Condition:
        return {
            "prompt_embeds": torch.zeros(1, _TEXT_TOKENS, self.config["joint_attention_dim"]),
            "prompt_attention_mask": torch.ones(1, _TEXT_TOKENS, dtype=torch.int64),
        }

    def encode_conditions(
        self, checkpoint: Checkpoint, subjects: Sequence[str | int], guidance: float | None
    ) -> list[Condition]:
        pipeline = load_text_pipeline(checkpoint, self.pipelines, self.text_classes)
        conditions: list[Condition] = []
        for prompt in map(str, subjects):
            check_prompt(prompt, pipeline.tokenizer, _TEXT_TOKENS, "T5")
            embeds, _, mask, *_ = pipeline.encode_prompt(
                prompt, device=torch.device("cpu"), do_classifier_free_guidance=False
            )
            conditions.append({"prompt_embeds": embeds, "prompt_attention_mask": mask.to(torch.int64)})
        return conditions

    def text_tokens(self, condition: Condition) -> int:
        if self.text_padding == _PIPELINE:
            return self.text_length(condition)
        return int(condition["prompt_attention_mask"].sum())

    def reference_inputs(
        self, condition: Condition, timestep: int, size: tuple[int, int], grid: tuple[int, int], batch: int
    ) -> dict[str, Any]:
        text = condition["prompt_embeds"][:, : self.text_tokens(condition)]
        mask = None
        if self.text_padding == _PIPELINE:  # ChromaPipeline._prepare_attention_mask
            own = condition["prompt_attention_mask"].to(torch.float32)
            mask = torch.cat([own, torch.ones(1, grid[0] * grid[1])], dim=1).expand(batch, -1)
        return {
            "timestep": torch.full((batch,), timestep / 1000),
            "encoder_hidden_states": text.expand(batch, -1, -1),
            "attention_mask": mask,
            **self.reference_positions(grid, text.shape[1]),
        }

    def conditioner(self, weights: Weights, spec: TrunkSpec) -> Conditioner:
        all_doubles, all_singles = (count for _, count in self.blocks.kinds)
        blocks = self.joint_blocks(spec.layer)
        doubles = len(blocks.doubles)
        image = SINGLE_ROWS * all_singles  # where they start: single-stream blocks, images, texts
        text = image + IMAGE_ROWS * all_doubles
        starts = [start + IMAGE_ROWS * index for index in range(doubles) for start in (image, text)] + [
            SINGLE_ROWS * index for index in range(spec.layer - doubles)
        ]
        starts.append(
            image + IMAGE_ROWS * spec.layer
            if spec.layer < all_doubles
            else SINGLE_ROWS * (spec.layer - all_doubles)
        )
        spans = zip(starts, blocks.rows, strict=True)
        rows = [row for start, size in spans for row in range(start, start + size)]
        width = self.config["approximator_num_channels"]
        embedding = ChromaCombinedTimestepTextProjEmbeddings(
            width // 4, text + IMAGE_ROWS * all_doubles + NORM_ROWS
        )
        network = weights.load_into(
            lambda: ChromaApproximator(
                width,
                self.channels,
                self.config["approximator_hidden_dim"],
                self.config["approximator_layers"],
            ),
            "distilled_guidance_layer",
        )
        context = None
        if spec.layer:
            context = Linear.read(weights, "context_embedder", precision=spec.precision, kept=EMBEDDERS)
        return _Conditioner(embedding, network, rows, context, self.text_padding == _HIDDEN)


class _Modulation(nn.Module):
    """Computes some rows of the modulation [R, C] from the timestep.

    Args:
        embedding: the unmodified model's.
        network: `distilled_guidance_layer`.
        rows: the numbers of the rows.
    """

    def __init__(self, embedding: nn.Module, network: nn.Module, rows: Sequence[int]) -> None:
        super().__init__()
        own: torch.Tensor = embedding.get_buffer("mod_proj")[list(rows)]
        self.time = embedding.get_submodule("time_proj")
        guidance = self.time(torch.zeros(1, device=own.device)).expand(len(rows), -1)  # distilled away
        self.numbers = constant(torch.cat([guidance, own], dim=1))
        self.network = network

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        time = self.time(timestep.to(torch.float32) / 1000 * 1000)  # as the model rounds it
        numbered = torch.cat([time.expand(len(self.numbers), -1), self.numbers], dim=1)
        made: torch.Tensor = self.network(numbered)
        return made


class _Conditioner(Conditioner):
    """Computes the modulation from the timestep, and text tokens and their bias from text embeddings.

    Args:
        context: text embedder, None where no block reads the text.
        hidden: whether the padding is masked. Otherwise the bias is m_i (m_j - 1), which differs from the
            pipeline's m_i m_j by a constant for each query, and softmax does not change with that.
    """

    def __init__(
        self,
        embedding: nn.Module,
        network: nn.Module,
        rows: Sequence[int],
        context: Linear | None,
        hidden: bool,
    ) -> None:
        super().__init__()
        self.hidden = hidden
        self.modulation = with_constant_frequencies(_Modulation(embedding, network, rows))
        self.context = context
        self.inputs = ("prompt_embeds", "prompt_attention_mask") if context else ()

    def forward(
        self, timestep: torch.Tensor, condition: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        given = {MODULATION: self.modulation(timestep)}
        if self.context is not None:
            mask = condition["prompt_attention_mask"][0]
            given[TEXT] = self.context(condition["prompt_embeds"][0]).to(torch.float32)
            given[TEXT_BIAS] = torch.where(mask == 0, _MASKED if self.hidden else -1.0, 0.0)
            if not self.hidden:
                given[TEXT_BIAS_ROWS] = mask
            given = {name: tensor.to(torch.float32) for name, tensor in given.items()}
        return given
