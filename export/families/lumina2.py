"""Lumina-Image 2.0 (Qin et al. 2025): diffusers Lumina2Transformer2DModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_1d_rotary_pos_embed
from torch import nn

from ditf.export.checkpoint import Checkpoint
from ditf.export.families.base import Blocks, Condition, Defaults, Family, TrunkSpec, check_prompt
from ditf.export.graph.condition import (
    MODULATION,
    Conditioner,
    LinearRows,
    Projection,
    with_constant_frequencies,
)
from ditf.export.graph.layers import Linear, Rotary, constant, read_linear, rms_norm
from ditf.export.graph.modulation import ModulatedRMSNorm
from ditf.export.graph.precision import Precision
from ditf.export.graph.sandwich import ROWS, SandwichBlock, SandwichNames, SandwichTrunk
from ditf.export.graph.trunk import Given, PatchEmbedder
from ditf.export.pretrained import load_text_pipeline
from ditf.export.weights import Weights

_TEXT_TOKENS = 256  # max_sequence_length of Lumina2Pipeline.encode_prompt, its system prompt among them
_QK_EPS = 1e-5  # Lumina2TransformerBlock fixes it
_ROPE_BASE = 10000  # Lumina2Transformer2DModel fixes it
_TIME_WIDTH = 1024  # widest timestep embedding
_MASKED = -10000.0  # added to the logits of a token that is not there: its weight is exactly 0


class Lumina2(Family):
    """Lumina-Image 2.0: blocks that refine the image alone, then blocks over text and image.

    Its norms are RMSNorms with weights, and are not shifted: the feature is
    F = (1 + scale_k) * weight_k * z / rms(z), what block k hands to its attention.

    An image token's first position is the number of text tokens. Only differences of positions matter, so
    a text that is shorter than others of its graph stands at the end of their length, masked in front: the
    image's position is then the same for all.
    """

    name = "lumina2"
    transformer_class = "Lumina2Transformer2DModel"
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
        """Blocks over the image alone; as many refine the text, before it is read."""
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

    def encode_conditions(
        self, checkpoint: Checkpoint, subjects: Sequence[str | int], guidance: float | None
    ) -> list[Condition]:
        pipeline = load_text_pipeline(checkpoint, ("Lumina2Pipeline",))
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

    def conditioner(
        self, weights: Weights, layer: int, size: tuple[int, int], precision: Precision
    ) -> Conditioner:
        sizes = [ROWS] * layer + [1]
        linears = LinearRows(
            weights,
            [(f"{self.block_name(i)}.norm1.linear", rows * self.channels) for i, rows in enumerate(sizes)],
        )
        width = min(self.channels, _TIME_WIDTH)
        time = weights.load_into(
            lambda: TimestepEmbedding(256, width), "time_caption_embed.timestep_embedder"
        )
        projection = Projection(linears, precision.of(MODULATION), self.channels)
        text = self._text(weights, precision) if layer > self._refiners else None
        return _Conditioner(time, projection, text)

    def _text(self, weights: Weights, precision: Precision) -> _Text:
        blocks = [
            self._block(weights, f"context_refiner.{index}", precision, text=True)
            for index in range(self._refiners)
        ]
        cosine, sine = self._rotary([torch.arange(_TEXT_TOKENS), torch.zeros(1), torch.zeros(1)])
        return _Text(weights, self.config["norm_eps"], blocks, (cosine, sine))

    def _block(
        self,
        weights: Weights,
        name: str,
        precision: Precision,
        rows: torch.Tensor | None = None,
        *,
        last: bool = False,
        text: bool = False,
    ) -> SandwichBlock:
        names = SandwichNames(
            "attn",
            ("norm1" if text else "norm1.norm", "norm2", "ffn_norm1", "ffn_norm2"),
            ("feed_forward.linear_1", "feed_forward.linear_3", "feed_forward.linear_2"),
        )
        return SandwichBlock(
            weights,
            name,
            names,
            self.config["num_attention_heads"],
            precision,
            rows=rows,
            eps=(self.config["norm_eps"], _QK_EPS),
            last=last,
            stream="text" if text else "image",
        )

    def trunk(self, weights: Weights, spec: TrunkSpec, fixed: Given | None) -> SandwichTrunk:
        rows: Sequence[torch.Tensor | None] = (None,) * (spec.layer + 1)
        reads_text = spec.layer > self._refiners
        if fixed is not None:
            rows = fixed["modulation"].split([ROWS] * spec.layer + [1])
        blocks = [
            self._block(
                weights,
                self.block_name(index),
                spec.precision,
                rows[index],
                last=reads_text and index == spec.layer - 1,
            )
            for index in range(spec.layer)
        ]
        norm = weights.tensor(f"{self.block_name(spec.layer)}.norm1.norm.weight")
        weight, bias = read_linear(weights, "x_embedder")
        patch = weight.unflatten(1, (self.patch_size, self.patch_size, -1)).permute(0, 3, 1, 2)
        text = spec.text_tokens if reads_text else 0
        positions = torch.stack(torch.meshgrid(*map(torch.arange, spec.grid), indexing="ij")).flatten(1)
        first = torch.cat([torch.arange(text), torch.full((positions.shape[1],), text)])
        return SandwichTrunk(
            PatchEmbedder(patch, bias, None),
            blocks,
            self._refiners,
            ModulatedRMSNorm(norm, rows[-1], self.config["norm_eps"]),
            fixed["text"][None] if fixed is not None and reads_text else None,
            self._rotary([first, *nn.functional.pad(positions, (text, 0))]),
        )

    def _rotary(self, positions: Sequence[torch.Tensor]) -> Rotary:
        """Cosines and sines [M, D / 2] of positions on the three axes, each [M], or [1] for all."""
        axes = [
            get_1d_rotary_pos_embed(width, position.double(), theta=_ROPE_BASE, freqs_dtype=torch.float64)
            for width, position in zip(self.config["axes_dim_rope"], positions, strict=True)
        ]
        count = max(map(len, axes))
        waves = torch.cat([axis.expand(count, -1) for axis in axes], dim=1)
        return waves.real.float(), waves.imag.float()


class _TimeEmbedding(nn.Module):
    """`timestep_embedder`, whose time is 1 for the image and 0 for noise."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.waves = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.projection = projection

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        return self.projection(self.waves(1 - timestep / 1000))


class _Text(nn.Module):
    """`caption_embedder` and the blocks that refine the text."""

    def __init__(self, weights: Weights, eps: float, blocks: Sequence[SandwichBlock], rotary: Rotary) -> None:
        super().__init__()
        embedder = "time_caption_embed.caption_embedder"
        self.norm = constant(weights.tensor(f"{embedder}.0.weight"))
        self.eps = eps
        self.linear = Linear(*read_linear(weights, f"{embedder}.1"), torch.float32)  # writes the residual
        self.blocks = nn.ModuleList(blocks)
        self.cosine, self.sine = constant(rotary[0]), constant(rotary[1])

    def forward(self, embeds: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Embeddings [L, d] and what is added to their logits [L] -> text tokens [L, C]."""
        tokens = len(embeds)
        text = self.linear(rms_norm(embeds, self.norm, self.eps))[None]
        for block in self.blocks:
            text = block(text, tokens, (self.cosine[:tokens], self.sine[:tokens]), None, bias)
        return text[0]


class _Conditioner(Conditioner):
    """Timestep -> scales and gates; text embeddings -> refined text, at the end of its length."""

    def __init__(self, time: nn.Module, projection: Projection, text: _Text | None) -> None:
        super().__init__()
        self.embedding = with_constant_frequencies(_TimeEmbedding(time))
        self.projection = projection
        self.text = text
        self.inputs = ("prompt_embeds", "prompt_attention_mask") if text else ()

    def forward(
        self, timestep: torch.Tensor, condition: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        rows = self.projection(self.embedding(timestep))
        gates = torch.arange(len(rows), device=rows.device)[:, None] % 2 == 1
        given = {MODULATION: torch.where(gates, torch.tanh(rows), rows)}
        if self.text is None:
            return given
        embeds, mask = condition["prompt_embeds"][0], condition["prompt_attention_mask"][0]
        tokens = torch.arange(len(embeds), device=embeds.device) - (len(embeds) - mask.sum())
        bias = torch.where(tokens < 0, _MASKED, 0.0).to(torch.float32)
        return {**given, "text": self.text(embeds[tokens.clamp(min=0)], bias), "text_bias": bias}
