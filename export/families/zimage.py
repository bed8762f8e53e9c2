"""Z-Image and Z-Image-Turbo (Tongyi-MAI 2025): diffusers ZImageTransformer2DModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.transformer_z_image import TimestepEmbedder
from torch import nn

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.text.chat_template import as_template, render_chats
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

_TEXT_TOKENS = 512  # max_sequence_length of ZImagePipeline.encode_prompt
_MULTIPLE = 32  # SEQ_MULTI_OF: text and image are each padded to a multiple of it
_PATCH, _FRAMES = 2, 1  # what the pipeline leaves to ZImageTransformer2DModel.forward's defaults
_QK_EPS = 1e-5  # ZImageTransformerBlock fixes it
_TIME_WIDTH, _TIME_HIDDEN = 256, 1024  # ADALN_EMBED_DIM, at the widest; mid_size of its embedder


class ZImage(Family):
    """Z-Image: blocks that refine the image alone, then blocks over image and text.

    As in Lumina2, the norms are RMSNorms with weights and without a shift, so the feature is
    F = (1 + scale_k) * weight_k * z / rms(z), the input of block k's attention.

    Text and image are padded to multiples of 32 with learned tokens. Every block reads them like other
    tokens, so the graph contains them. The image's padding is at the origin, the text starts at position 1
    and the image follows it, so the distance between image and padding depends on the condition. The image
    comes first in the unmodified model's sequence and last in the graph's, which makes no difference to
    attention.
    """

    name = "zimage"
    transformer_class = "ZImageTransformer2DModel"
    pipelines = ("ZImagePipeline",)
    text_classes = ("Qwen3Model", "Qwen3ForCausalLM", "Qwen2Tokenizer", "Qwen2TokenizerFast")
    takes_prompt = True
    attention_name = "attention"
    rms_norms = True
    short_text = text_multiple = _MULTIPLE
    defaults = Defaults(
        timestep=260,
        prompt="a photo",
        size=(640, 640),
        source="none published for Z-Image: half of its depth, and the timestep and size DiTF published for"
        " FLUX.1, which has the same noise schedule and VAE",
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.require(qk_norm=(True,), siglip_feat_dim=(None,))  # the latter is Z-Image-Omni, of other inputs

    @property
    def blocks(self) -> Blocks:
        return Blocks((("refiner", self._refiners), ("layer", self.config["n_layers"])))

    @property
    def _refiners(self) -> int:
        """The number of blocks over the image alone; as many blocks refine the text before it is read."""
        return int(self.config["n_refiner_layers"])

    @property
    def channels(self) -> int:
        return int(self.config["dim"])

    @property
    def patch_size(self) -> int:
        return _PATCH

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
        prompts = [str(subject) for subject in subjects]
        chats = render_chats(pipeline.tokenizer, prompts, thinking=True)
        for prompt, chat in zip(prompts, chats, strict=True):
            check_prompt(prompt, pipeline.tokenizer, _TEXT_TOKENS, "Qwen3", chat)
            pipeline.tokenizer.chat_template = as_template(chat)
            (embeds,), _ = pipeline.encode_prompt(
                prompt, device=torch.device("cpu"), do_classifier_free_guidance=False
            )
            tokens = len(embeds)
            conditions.append(
                {
                    "prompt_embeds": nn.functional.pad(embeds, (0, 0, 0, _TEXT_TOKENS - tokens))[None],
                    "prompt_attention_mask": (torch.arange(_TEXT_TOKENS) < tokens).to(torch.int64)[None],
                }
            )
        return conditions

    def text_tokens(self, condition: Condition) -> int:
        return _padded(int(condition["prompt_attention_mask"].sum()))

    def trim_text(self, condition: Condition, tokens: int) -> Condition:
        return super().trim_text(condition, _padded(tokens))

    def reference_inputs(
        self, condition: Condition, timestep: int, size: tuple[int, int], grid: tuple[int, int], batch: int
    ) -> dict[str, Any]:
        text = condition["prompt_embeds"][0, : int(condition["prompt_attention_mask"].sum())]
        return {"t": (1000 - torch.full((batch,), float(timestep))) / 1000, "cap_feats": [text] * batch}

    def reference_latents(self, x_t: torch.Tensor) -> list[torch.Tensor]:
        return list(x_t.unsqueeze(2))

    def reference_tokens(self, tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens[..., :count, :], tokens[..., _padded(count) :, :]

    def conditioner(self, weights: Weights, spec: TrunkSpec) -> Conditioner:
        sizes = modulation_rows(spec.layer)
        linears = LinearRows(
            weights,
            [
                (f"{self.block_name(i)}.adaLN_modulation.0", rows * self.channels)
                for i, rows in enumerate(sizes)
            ],
        )
        width = min(self.channels, _TIME_WIDTH)
        time = weights.load_into(lambda: TimestepEmbedder(width, _TIME_HIDDEN), "t_embedder")
        embedding = with_constant_frequencies(_TimeEmbedding(time, self.config["t_scale"]))
        projection = ModulationProjection(linears, spec.precision, self.channels, activated=False)
        rotary = self._rotary([torch.arange(_TEXT_TOKENS + 1), torch.zeros(1), torch.zeros(1)])
        text = None
        if spec.layer > self._refiners:
            blocks = [
                PrePostNormBlock(
                    weights,
                    f"context_refiner.{index}",
                    self._kind,
                    UNMODULATED,
                    spec.precision,
                    stream="text",
                )
                for index in range(self._refiners)
            ]
            padding = weights.tensor("cap_pad_token")[0]
            text = RefinedText(
                weights, "cap_embedder", self.config["norm_eps"], blocks, rotary, spec.precision, padding
            )
        padded = spec.layer > 0 and _padding(spec.grid) > 0
        return RefinedConditioner(embedding, projection, text, _MULTIPLE, rotary if padded else None)

    @property
    def _kind(self) -> PrePostNormSpec:
        """What its blocks are like."""
        return PrePostNormSpec(
            self.config["n_heads"],
            "attention",
            ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"),
            ("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
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
                self._kind,
                modulation,
                spec.precision,
                last=index == spec.layer - 1,
            )
            for index, modulation in enumerate(parts)
        ]
        norm = weights.tensor(f"{self.block_name(spec.layer)}.attention_norm1.weight")
        weight, bias = read_linear(weights, f"all_x_embedder.{_PATCH}-{_FRAMES}")
        patch = weight.unflatten(1, (_PATCH, _PATCH, -1)).permute(0, 3, 1, 2)
        padding = _padding(spec.grid) if spec.layer else 0
        return PrePostNormTrunk(
            PatchEmbedder(patch, bias, None, spec.precision),
            blocks,
            self._refiners,
            own.rms_norm(0, norm, self.config["norm_eps"]),
            constants[TEXT][None] if constants is not None and reads_text else None,
            self._positions(spec, spec.text_tokens if reads_text else 0, padding),
            weights.tensor("x_pad_token").expand(padding, -1) if padding else None,
        )

    def _positions(self, spec: TrunkSpec, text: int, padding: int) -> Rotary:
        """The rotary embedding of text, padding (at the origin) and image."""
        image = torch.stack(torch.meshgrid(*map(torch.arange, spec.grid), indexing="ij")).flatten(1)
        behind = torch.full((image.shape[1],), spec.text_tokens + 1)
        first = torch.cat([1 + torch.arange(text), torch.zeros(padding, dtype=torch.int64), behind])
        return self._rotary([first, *nn.functional.pad(image, (text + padding, 0))])

    def _rotary(self, positions: Sequence[torch.Tensor]) -> Rotary:
        return axes_rotary(self.config["axes_dims"], self.config["rope_theta"], positions)


def _padded(tokens: int) -> int:
    """The length that this number of tokens is padded to."""
    return -(-tokens // _MULTIPLE) * _MULTIPLE


def _padding(grid: tuple[int, int]) -> int:
    """P, the number of tokens that pad the image."""
    return -(grid[0] * grid[1]) % _MULTIPLE


class _TimeEmbedding(nn.Module):
    """`t_embedder`; its time is 1 for the image and 0 for noise."""

    def __init__(self, embedder: nn.Module, scale: float) -> None:
        super().__init__()
        self.waves = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.projection = embedder.get_submodule("mlp")
        self.scale = scale

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        time = (1000 - timestep.to(torch.float32)) / 1000
        embedded: torch.Tensor = self.projection(self.waves(time * self.scale))
        return embedded
