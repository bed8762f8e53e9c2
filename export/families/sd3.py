"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): diffusers SD3Transformer2DModel."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.loading import load_text_pipeline
from ditf.export.checkpoints.weights import Weights
from ditf.export.families.base import Condition, Defaults, Family, TrunkSpec, check_prompt
from ditf.export.families.mmdit import PooledConditioner
from ditf.export.families.sincos import cropped_embedder
from ditf.export.graph.blocks.adaln import ModulatedNorm
from ditf.export.graph.blocks.trunk import Given
from ditf.export.graph.blocks.two_stream import DUAL_ROWS, IMAGE_ROWS, NORM_ROWS, JointBlock, JointTrunk
from ditf.export.graph.condition import Conditioner

_CLIP_TOKENS = 77  # come first in prompt_embeds, T5's follow
_T5_TOKENS = 256  # max_sequence_length of StableDiffusion3Pipeline.encode_prompt
_EPS = 1e-6  # JointTransformerBlock fixes it


class SD3(Family):
    """SD3 medium; SD3.5 medium, with a second attention in its first blocks; SD3.5 large."""

    name = "sd3"
    transformer_class = "SD3Transformer2DModel"
    pipelines = ("StableDiffusion3Pipeline",)
    text_classes = (
        "CLIPTextModelWithProjection",
        "CLIPTokenizer",
        "CLIPTokenizerFast",
        "T5EncoderModel",
        "T5Tokenizer",
        "T5TokenizerFast",
    )
    takes_prompt = True
    attention_name = "attn"
    leading_tokens = _CLIP_TOKENS

    @property
    def defaults(self) -> Defaults:
        return Defaults(
            timestep=260,
            prompt="a photo",
            channels={(1536, None): (810,), (1536, "rms_norm"): (676,), (2432, "rms_norm"): (676,)}.get(
                (self.channels, self.config["qk_norm"])
            ),
            source="DiTF publishes the massive channels of SD3 and SD3.5 only: half of the depth, and the"
            " timestep it published for FLUX, which has the same noise schedule",
        )

    @property
    def largest_grid(self) -> int:
        return int(self.config["pos_embed_max_size"])

    def example_condition(self) -> Condition:
        return {
            "prompt_embeds": torch.zeros(1, _CLIP_TOKENS + _T5_TOKENS, self.config["joint_attention_dim"]),
            "pooled_prompt_embeds": torch.zeros(1, self.config["pooled_projection_dim"]),
        }

    def encode_conditions(
        self, checkpoint: Checkpoint, subjects: Sequence[str | int], guidance: float | None
    ) -> list[Condition]:
        pipeline = load_text_pipeline(checkpoint, self.pipelines, self.text_classes)
        conditions: list[Condition] = []
        for prompt in map(str, subjects):
            for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
                check_prompt(prompt, tokenizer, pipeline.tokenizer_max_length, "CLIP")
            if pipeline.tokenizer_3 is None:  # the pipeline asks the transformer for the width of its zeros
                pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**self.config))
            else:
                check_prompt(prompt, pipeline.tokenizer_3, _T5_TOKENS, "T5")
            embeds, _, pooled, _ = pipeline.encode_prompt(
                prompt, None, None, do_classifier_free_guidance=False, device=torch.device("cpu")
            )
            conditions.append({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})
        return conditions

    def reference_inputs(
        self, condition: Condition, timestep: int, size: tuple[int, int], grid: tuple[int, int], batch: int
    ) -> dict[str, Any]:
        return {
            "timestep": torch.full((batch,), timestep),
            "encoder_hidden_states": condition["prompt_embeds"].expand(batch, -1, -1),
            "pooled_projections": condition["pooled_prompt_embeds"].expand(batch, -1),
        }

    def _rows(self, index: int, layer: int) -> tuple[int, int]:
        """Modulation rows of the image and of the text in a block that runs."""
        image = DUAL_ROWS if index in self.config["dual_attention_layers"] else IMAGE_ROWS
        return image, NORM_ROWS if index == layer - 1 else IMAGE_ROWS

    def conditioner(self, weights: Weights, spec: TrunkSpec) -> Conditioner:
        embedding = weights.load_into(
            lambda: CombinedTimestepTextProjEmbeddings(self.channels, self.config["pooled_projection_dim"]),
            "time_text_embed",
        )
        linears = []
        for index in range(spec.layer):
            image, text = self._rows(index, spec.layer)
            name = self.block_name(index)
            linears += [(f"{name}.norm1.linear", image), (f"{name}.norm1_context.linear", text)]
        linears.append((f"{self.block_name(spec.layer)}.norm1.linear", NORM_ROWS))
        context = "context_embedder" if spec.layer else None
        return PooledConditioner(weights, embedding, linears, context, False, self.channels, spec.precision)

    def trunk(self, weights: Weights, spec: TrunkSpec, fixed: Given | None) -> JointTrunk:
        self.require(qk_norm=(None, "rms_norm"))
        sizes = [rows for index in range(spec.layer) for rows in self._rows(index, spec.layer)]
        rows: Sequence[torch.Tensor | None] = (None,) * (len(sizes) + 1)
        text = None
        if fixed is not None:
            rows = fixed["modulation"].split([*sizes, NORM_ROWS])
            text = fixed["text"][None] if spec.layer else None
        doubles = [
            JointBlock(
                weights,
                self.block_name(index),
                self.config["num_attention_heads"],
                spec.precision,
                dual=index in self.config["dual_attention_layers"],
                qk_norm=self.config["qk_norm"] is not None,
                rotary=False,
                image_rows=rows[2 * index],
                text_rows=rows[2 * index + 1],
                last=index == spec.layer - 1,
                text=text if index == 0 else None,
                eps=_EPS,
            )
            for index in range(spec.layer)
        ]
        return JointTrunk(
            cropped_embedder(weights, spec.grid),
            doubles,
            [],
            ModulatedNorm(rows[-1], _EPS),
            text,
            None,
            sizes,
        )
