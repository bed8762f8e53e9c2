"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): diffusers SD3Transformer2DModel."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.text.pipeline import load_text_pipeline
from ditf.export.checkpoints.weights import Weights
from ditf.export.families.base import Condition, Defaults, Family, TrunkSpec, check_prompt
from ditf.export.families.patch_embedders import cropped_embedder
from ditf.export.families.pooled_conditioner import PooledConditioner
from ditf.export.graph.blocks.condition_tensors import ConditionTensors
from ditf.export.graph.blocks.joint_trunk import JointBlocks, JointTrunk, build_joint_trunk
from ditf.export.graph.blocks.two_stream import TwoStreamSpec
from ditf.export.graph.condition import Conditioner
from ditf.runtime.errors import InputError

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
        if pipeline.tokenizer_max_length != _CLIP_TOKENS:
            raise InputError(
                f"the tokenizer of {checkpoint.id} has model_max_length={pipeline.tokenizer_max_length}, and"
                f" {self.name} has {_CLIP_TOKENS} tokens of CLIP",
                f'write "model_max_length": {_CLIP_TOKENS} into tokenizer/tokenizer_config.json',
            )
        for prompt in map(str, subjects):
            if pipeline.tokenizer_3 is None:  # the pipeline asks the transformer for the width of its zeros
                for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
                    check_prompt(prompt, tokenizer, _CLIP_TOKENS, "CLIP")
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

    def _blocks(self, layer: int) -> JointBlocks:
        doubles = [
            TwoStreamSpec(
                self.config["num_attention_heads"],
                qk_norm=self.config["qk_norm"] is not None,
                dual=index in self.config["dual_attention_layers"],
                eps=_EPS,
            )
            for index in range(self.blocks.count)
        ]
        return JointBlocks.cut([self.block_name(index) for index in range(layer + 1)], doubles)

    def conditioner(self, weights: Weights, spec: TrunkSpec) -> Conditioner:
        embedding = weights.load_into(
            lambda: CombinedTimestepTextProjEmbeddings(self.channels, self.config["pooled_projection_dim"]),
            "time_text_embed",
        )
        modulated = self._blocks(spec.layer).modulated
        context = "context_embedder" if spec.layer else None
        return PooledConditioner(weights, embedding, modulated, context, False, self.channels, spec.precision)

    def trunk(self, weights: Weights, spec: TrunkSpec, constants: ConditionTensors | None) -> JointTrunk:
        self.require(qk_norm=(None, "rms_norm"))
        embedder = cropped_embedder(weights, spec.grid, spec.precision)
        return build_joint_trunk(weights, self._blocks(spec.layer), embedder, spec.precision, constants)
