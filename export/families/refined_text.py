"""The conditioner of Lumina2 and Z-Image, whose text has blocks of its own, and their rotary axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import nn

from ditf.export.checkpoints.weights import Weights
from ditf.export.graph.blocks.condition_tensors import MODULATION, PADDING_ROTARY, TEXT, TEXT_BIAS
from ditf.export.graph.blocks.layers import Linear, Rotary, constant, rms_norm
from ditf.export.graph.blocks.pre_post_norm import PrePostNormBlock
from ditf.export.graph.condition import Conditioner, ModulationProjection
from ditf.export.graph.precision import EMBEDDERS, Precision

_MASKED = -10000.0  # added to the logits of a token that is not there: its weight is exactly 0


def axes_rotary(widths: Sequence[int], base: float, positions: Sequence[torch.Tensor]) -> Rotary:
    """Cosines and sines [M, D / 2] of positions on several axes.

    Args:
        widths: of each axis in D.
        positions: of each axis, [M], or [1] for all.
    """
    axes = [
        get_1d_rotary_pos_embed(width, position.double(), theta=base, freqs_dtype=torch.float64)
        for width, position in zip(widths, positions, strict=True)
    ]
    count = max(map(len, axes))
    waves = torch.cat([axis.expand(count, -1) for axis in axes], dim=1)
    return waves.real.float(), waves.imag.float()


class RefinedText(nn.Module):
    """The text embedder and the blocks that refine the text.

    Args:
        embedder: name of the embedder, which is an RMSNorm and a linear.
        rotary: of positions 0, 1, ... to one more than the longest text.
        precision: of the conditioner.
        padding: [C], the token that fills the text's end; None where the text is not padded.
    """

    def __init__(
        self,
        weights: Weights,
        embedder: str,
        eps: float,
        blocks: Sequence[PrePostNormBlock],
        rotary: Rotary,
        precision: Precision,
        padding: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.norm = constant(weights.tensor(f"{embedder}.0.weight"))
        self.eps = eps
        self.linear = Linear.read(weights, f"{embedder}.1", precision=precision, kept=EMBEDDERS)
        self.blocks = nn.ModuleList(blocks)
        self.cosine, self.sine = constant(rotary[0]), constant(rotary[1])
        self.padding = None if padding is None else constant(padding)

    def forward(self, embeds: torch.Tensor, bias: torch.Tensor, beyond: torch.Tensor) -> torch.Tensor:
        """Text tokens [L, C].

        Args:
            embeds: [L, d]; bias: [L], added to their logits.
            beyond: bool [L], the tokens that the padding replaces.
        """
        tokens = len(embeds)
        text = self.linear(rms_norm(embeds, self.norm, self.eps))
        if self.padding is not None:
            text = torch.where(beyond[:, None], self.padding, text)
        text = text[None]
        for block in self.blocks:
            text = block(text, tokens, {}, (self.cosine[1 : tokens + 1], self.sine[1 : tokens + 1]), bias)
        return text[0]


class RefinedConditioner(Conditioner):
    """Computes scales and gates from the timestep, and refined text from text embeddings.

    Only differences of positions matter to rotary attention. A text that is shorter than others of its graph
    is placed at the end of their length, and the tokens before it are masked. The image's position, which
    follows from the text's end, is then the same for all texts.

    Args:
        embedding: makes what the AdaLN linears read from the timestep.
        text: None where no block reads the text.
        multiple: a text is padded to a multiple of this length.
        padding: the rotary embedding of positions 0, 1, ..., where the image is padded with tokens at the
            position before the text's first; None where it is not padded.
    """

    def __init__(
        self,
        embedding: nn.Module,
        projection: ModulationProjection,
        text: RefinedText | None,
        multiple: int = 1,
        padding: Rotary | None = None,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.projection = projection
        self.text = text
        self.multiple = multiple
        self.padding = None if padding is None else constant(torch.stack(padding))
        self.inputs: tuple[str, ...] = ()
        if text is not None:
            self.inputs = ("prompt_embeds", "prompt_attention_mask")
        elif padding is not None:
            self.inputs = ("prompt_attention_mask",)

    def forward(
        self, timestep: torch.Tensor, condition: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        rows = self.projection(self.embedding(timestep))
        gates = torch.arange(len(rows), device=rows.device)[:, None] % 2 == 1
        given = {MODULATION: torch.where(gates, torch.tanh(rows), rows)}
        if not self.inputs:
            return given
        mask = condition["prompt_attention_mask"][0]
        own = mask.sum()
        missing = (
            len(mask)
            - torch.div(own + self.multiple - 1, self.multiple, rounding_mode="trunc") * self.multiple
        )
        if self.padding is not None:
            given[PADDING_ROTARY] = self.padding[:, missing[None]]
        if self.text is not None:
            embeds = condition["prompt_embeds"][0]
            place = torch.arange(len(embeds), device=embeds.device) - missing
            bias = torch.where(place < 0, _MASKED, 0.0).to(torch.float32)
            text = self.text(embeds[place.clamp(min=0)], bias, place >= own)
            given |= {TEXT: text, TEXT_BIAS: bias}
        return given
