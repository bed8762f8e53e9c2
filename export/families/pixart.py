"""PixArt-alpha and PixArt-Sigma (Chen et al. 2023, 2024): diffusers PixArtTransformer2DModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.normalization import AdaLayerNormSingle
from torch import nn

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.text.pipeline import load_text_pipeline
from ditf.export.checkpoints.weights import Weights
from ditf.export.families.base import Condition, Defaults, Family, TrunkSpec, check_prompt
from ditf.export.families.patch_embedders import sincos_embedder
from ditf.export.graph.blocks.adaln import NORM_ROWS, modulations
from ditf.export.graph.blocks.condition_tensors import (
    KEYS,
    MODULATION,
    TEXT_BIAS,
    VALUES,
    ConditionTensors,
)
from ditf.export.graph.blocks.dit import (
    BLOCK_ROWS,
    CrossAttention,
    DiTBlock,
    DiTSpec,
    DiTTrunk,
    FoldedCrossAttention,
)
from ditf.export.graph.blocks.layers import Linear, constant, read_linear
from ditf.export.graph.condition import Conditioner, with_constant_frequencies
from ditf.export.graph.range_probes import Where

_MASKED = -10000.0  # what diffusers adds to the logits of a masked token: its weight is exactly 0
_TEXT_LIMIT = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}  # max_sequence_length of encode_prompt


class PixArt(Family):
    """PixArt-XL/2 at 256, 512, 1024 and 2048 px."""

    name = "pixart"
    transformer_class = "PixArtTransformer2DModel"
    pipelines = tuple(_TEXT_LIMIT)
    text_classes = ("T5EncoderModel", "T5Tokenizer", "T5TokenizerFast")
    takes_prompt = True
    text_stream = False
    ddpm = True
    shifts_latents = False
    short_text = 8
    longest_text = max(_TEXT_LIMIT.values())
    defaults = Defaults(
        timestep=261,
        prompt="a photo",
        source="none published for PixArt: half of its depth, and the timestep DIFT (Tang et al. 2023)"
        " published for a DDPM schedule",
    )

    @property
    def _micro_conditions(self) -> bool:
        """Whether resolution and aspect ratio are embedded too; by default only in alpha's 1024 px models."""
        given = self.config.get("use_additional_conditions")
        return self.sample_size == 128 if given is None else bool(given)

    def example_condition(self) -> Condition:
        tokens = _TEXT_LIMIT["PixArtAlphaPipeline"]
        return {
            "prompt_embeds": torch.zeros(
                1, tokens, self.config["caption_channels"] or self.config["cross_attention_dim"]
            ),
            "prompt_attention_mask": torch.ones(1, tokens, dtype=torch.int64),
        }

    def encode_conditions(
        self, checkpoint: Checkpoint, subjects: Sequence[str | int], guidance: float | None
    ) -> list[Condition]:
        pipeline = load_text_pipeline(checkpoint, self.pipelines, self.text_classes)
        limit = _TEXT_LIMIT[type(pipeline).__name__]
        conditions: list[Condition] = []
        for prompt in map(str, subjects):
            check_prompt(prompt, pipeline.tokenizer, limit, "T5")
            embeds, mask, _, _ = pipeline.encode_prompt(
                prompt, do_classifier_free_guidance=False, device=torch.device("cpu")
            )
            conditions.append({"prompt_embeds": embeds, "prompt_attention_mask": mask.to(torch.int64)})
        return conditions

    def text_tokens(self, condition: Condition) -> int:
        return int(condition["prompt_attention_mask"].sum())

    def reference_inputs(
        self, condition: Condition, timestep: int, size: tuple[int, int], grid: tuple[int, int], batch: int
    ) -> dict[str, Any]:
        mask = condition["prompt_attention_mask"]
        return {
            "timestep": torch.full((batch,), timestep),
            "encoder_hidden_states": condition["prompt_embeds"].expand(batch, -1, -1),
            "encoder_attention_mask": mask.to(torch.float32).expand(batch, -1),
            "added_cond_kwargs": self._added_conditions(size, batch),
        }

    def _added_conditions(self, size: tuple[int, int], batch: int) -> dict[str, torch.Tensor | None]:
        """The tensors that PixArtAlphaPipeline.__call__ makes."""
        if not self._micro_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = size
        return {
            "resolution": torch.tensor([[height, width]], dtype=torch.float32).repeat(batch, 1),
            "aspect_ratio": torch.tensor([[height / width]], dtype=torch.float32).repeat(batch, 1),
        }

    def conditioner(self, weights: Weights, spec: TrunkSpec) -> Conditioner:
        adaln = weights.load_into(
            lambda: AdaLayerNormSingle(self.channels, use_additional_conditions=self._micro_conditions),
            "adaln_single",
        )
        tables = [weights.tensor(f"{self.block_name(i)}.scale_shift_table") for i in range(spec.layer + 1)]
        projection = None
        if spec.layer and self.config.get("caption_channels") is not None:
            projection = weights.load_into(
                lambda: PixArtAlphaTextProjection(self.config["caption_channels"], self.channels),
                "caption_projection",
            )
        blocks = [f"{self.block_name(i)}.attn2" for i in range(spec.layer)]
        dtype = spec.precision.of(*blocks)  # one for all: they are stacked
        keys, values = (
            [
                Linear(*read_linear(weights, name), dtype, Where(name, "text"))
                for name in (f"{block}.to_{part}" for block in blocks)
            ]
            for part in "kv"
        )
        return _Conditioner(
            adaln,
            self._added_conditions(spec.size, 1),
            torch.cat([*tables[:-1], tables[-1][:NORM_ROWS]]),
            projection,
            keys,
            values,
        )

    def trunk(self, weights: Weights, spec: TrunkSpec, constants: ConditionTensors | None) -> DiTTrunk:
        self.require(
            norm_type=("ada_norm_single",),
            activation_fn=("gelu-approximate",),
            norm_elementwise_affine=(False,),
            upcast_attention=(False,),
            attention_type=("default",),
        )
        *parts, own = modulations(constants, [BLOCK_ROWS] * spec.layer + [NORM_ROWS])
        eps, heads = self.config["norm_eps"], self.config["num_attention_heads"]
        kind = DiTSpec(heads, (eps, eps))
        blocks = []
        for index, modulation in enumerate(parts):
            name = self.block_name(index)
            text = None if constants is None else (constants[KEYS][index], constants[VALUES][index])
            cross: CrossAttention | FoldedCrossAttention
            if text is not None and FoldedCrossAttention.pays(len(text[0]), heads, self.channels):
                cross = FoldedCrossAttention(weights, f"{name}.attn2", heads, text, spec.precision)
            else:
                cross = CrossAttention(weights, f"{name}.attn2", heads, index, text, spec.precision)
            blocks.append(DiTBlock(weights, name, kind, modulation, spec.precision, cross))
        scale = self.config.get("interpolation_scale") or max(self.sample_size // 64, 1)
        embedder = sincos_embedder(weights, self.config, spec.grid, scale, spec.precision)
        return DiTTrunk(embedder, blocks, own.norm(0, eps))


class _Conditioner(Conditioner):
    """Computes the modulation, and the keys and values of the caption for each block.

    In AdaLN-single all blocks share [6, C], and each adds a table of its own.

    Args:
        adaln: the shared modulation; added: its micro-conditions.
        tables: [6 k + 2, C], the tables of all blocks.
        projection: of the caption; None where the config has none or no block reads the caption.
        keys, values: a linear for each block.
    """

    def __init__(
        self,
        adaln: nn.Module,
        added: Mapping[str, torch.Tensor | None],
        tables: torch.Tensor,
        projection: nn.Module | None,
        keys: list[Linear],
        values: list[Linear],
    ) -> None:
        super().__init__()
        self.adaln = with_constant_frequencies(adaln)
        self.tables = constant(tables)
        self.projection = projection
        self.keys = nn.ModuleList(keys)
        self.values = nn.ModuleList(values)
        self.added = {name: None if value is None else constant(value) for name, value in added.items()}
        self.inputs = ("prompt_embeds", "prompt_attention_mask") if keys else ()

    def forward(
        self, timestep: torch.Tensor, condition: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        packed, _ = self.adaln(timestep, self.added, batch_size=1, hidden_dtype=torch.float32)
        shared = packed.unflatten(1, (BLOCK_ROWS, -1))[0]
        blocks = len(self.keys)
        own = shared[:NORM_ROWS]
        rows = torch.cat([shared.repeat(blocks, 1), own]) if blocks else own
        given = {MODULATION: rows + self.tables}
        if not blocks:
            return given
        text = condition["prompt_embeds"][0]
        if self.projection is not None:
            text = self.projection(text)
        mask = condition["prompt_attention_mask"][0].to(torch.float32)
        return {
            **given,
            KEYS: torch.stack([key(text) for key in self.keys]),
            VALUES: torch.stack([value(text) for value in self.values]),
            TEXT_BIAS: (1.0 - mask) * _MASKED,
        }
