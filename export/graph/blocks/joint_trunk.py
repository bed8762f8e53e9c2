"""The trunk of SD3, FLUX and AuraFlow: two-stream blocks, then single-stream blocks over text and image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from ditf.export.checkpoints.weights import Weights
from ditf.export.graph.blocks.adaln import NORM_ROWS, ModulatedNorm, modulations
from ditf.export.graph.blocks.auraflow import AuraFlowJointSpec, AuraFlowSingleSpec
from ditf.export.graph.blocks.condition_tensors import (
    IMAGE_TEXT_BIAS,
    TEXT,
    TEXT_BIAS,
    TEXT_BIAS_ROWS,
    TEXT_IMAGE_BIAS,
    ConditionTensors,
)
from ditf.export.graph.blocks.layers import Rotary, constant
from ditf.export.graph.blocks.single_stream import SingleStreamSpec
from ditf.export.graph.blocks.trunk import PatchEmbedder, Trunk
from ditf.export.graph.blocks.two_stream import TEXT_ROWS, ConstantText, TwoStreamSpec
from ditf.export.graph.precision import Precision

DoubleSpec = TwoStreamSpec | AuraFlowJointSpec
SingleSpec = SingleStreamSpec | AuraFlowSingleSpec


@dataclass(frozen=True)
class JointBlocks:
    """The blocks of a joint trunk: blocks 0..k-1 run, of block k the first norm is applied.

    Attributes:
        doubles: (name in the checkpoint, spec) of each two-stream block that runs.
        singles: of each single-stream block that runs; they follow.
        tapped: of block k.
    """

    doubles: Sequence[tuple[str, DoubleSpec]]
    singles: Sequence[tuple[str, SingleSpec]]
    tapped: tuple[str, DoubleSpec | SingleSpec]

    @classmethod
    def cut(
        cls, names: Sequence[str], doubles: Sequence[DoubleSpec], single: SingleSpec | None = None
    ) -> JointBlocks:
        """The blocks of a model that is cut at block k.

        Args:
            names: of blocks 0..k in the checkpoint.
            doubles: of all two-stream blocks of the model.
            single: of the blocks after them, if the model has any.
        """
        layer = len(names) - 1
        running = min(layer, len(doubles))
        tapped = doubles[layer] if layer < len(doubles) else single
        assert tapped is not None
        return cls(
            [*zip(names[:running], doubles, strict=False)],
            [] if single is None else [(name, single) for name in names[running:layer]],
            (names[layer], tapped),
        )

    @property
    def modulated(self) -> list[tuple[str, int]]:
        """(Module in the checkpoint, number of rows that it makes) of every part of the modulation, in order.

        The parts are image and text of each two-stream block, each single-stream block, and block k's norm.
        """
        parts = []
        for index, (name, double) in enumerate(self.doubles):
            image, text = double.norms
            last = index == len(self.doubles) + len(self.singles) - 1  # its text is only attended to
            parts.append((f"{name}.{image}", double.image_rows))
            parts.append((f"{name}.{text}", NORM_ROWS if last else TEXT_ROWS))
        parts += [(f"{name}.{single.norms[0]}", single.rows) for name, single in self.singles]
        name, tapped = self.tapped
        return [*parts, (f"{name}.{tapped.norms[0]}", NORM_ROWS)]

    @property
    def rows(self) -> list[int]:
        """The number of rows of every part of the modulation."""
        return [rows for _, rows in self.modulated]


class JointTrunk(Trunk):
    """Embedder, two-stream blocks, then single-stream blocks over text and image.

    Given at run time: the modulation [R, C], the text [L, C], and the text's bias [L] and its rows [L], where
    some tokens are masked or weighed less.

    Args:
        embedder: latents -> tokens.
        doubles, singles: the blocks that run.
        output_norm: block k's.
        text: [1, L, C] float32, where it is constant and a block reads it.
        biases: the text's bias and its rows, where they are constant.
        rotary: of text and image tokens, [L + N, D / 2], or None.
        text_rotary: two-stream blocks rotate the text.
    """

    def __init__(
        self,
        embedder: PatchEmbedder,
        doubles: Sequence[nn.Module],
        singles: Sequence[nn.Module],
        output_norm: ModulatedNorm,
        text: torch.Tensor | None,
        rotary: Rotary | None,
        text_rotary: bool = False,
        biases: ConditionTensors | None = None,
    ) -> None:
        super().__init__(embedder, output_norm)
        self.text_bias = None if biases is None else constant(biases[TEXT_BIAS])
        self.text_bias_rows = None if biases is None else constant(biases[TEXT_BIAS_ROWS])
        self.doubles = nn.ModuleList(doubles)
        self.singles = nn.ModuleList(singles)
        self.text = None if text is None else constant(text)
        used = rotary if doubles or singles else None
        self.cosine = None if used is None else constant(used[0])
        self.sine = None if used is None else constant(used[1])
        self.text_rotary = text_rotary

    def forward(self, latents: torch.Tensor, given: ConditionTensors) -> torch.Tensor:
        x: torch.Tensor = self.embedder(latents)
        tokens = x.shape[1]
        text = self._text(given, x)
        given = {**given, **self._joint_biases(given, tokens)}
        both, image, own = self._rotary(tokens)
        for block in self.doubles:
            x, text = block(x, text, given, image, own)
        if len(self.singles):
            x = torch.cat([text, x], dim=1)
        for block in self.singles:
            x = block(x, tokens, given, both)
        return x

    def _joint_biases(self, given: ConditionTensors, tokens: int) -> dict[str, torch.Tensor]:
        """The biases of attention over image and text, in both orders; {} where the text has none."""
        bias = given.get(TEXT_BIAS, self.text_bias)
        rows = given.get(TEXT_BIAS_ROWS, self.text_bias_rows)
        if bias is None:
            return {}
        made = {}
        for name, pad in ((IMAGE_TEXT_BIAS, (tokens, 0)), (TEXT_IMAGE_BIAS, (0, tokens))):
            made[name] = functional.pad(bias, pad)
            if rows is not None:
                made[name] = functional.pad(rows, pad, value=1.0)[:, None] * made[name]
        return made

    def _text(self, given: ConditionTensors, x: torch.Tensor) -> torch.Tensor:
        """[B, L, C]; no tokens where no block reads them."""
        text = given[TEXT][None] if TEXT in given else self.text
        return x[:, :0] if text is None else text.expand(x.shape[0], -1, -1).to(x.dtype)

    def _rotary(self, tokens: int) -> tuple[Rotary | None, Rotary | None, Rotary | None]:
        """Of text and image, of the image, and of the text in two-stream blocks.

        Args:
            tokens: N.
        """
        if self.cosine is None or self.sine is None:
            return None, None, None
        cosine, sine = self.cosine, self.sine
        own = (cosine[:-tokens], sine[:-tokens]) if self.text_rotary else None
        return (cosine, sine), (cosine[-tokens:], sine[-tokens:]), own


def build_joint_trunk(
    weights: Weights,
    blocks: JointBlocks,
    embedder: PatchEmbedder,
    precision: Precision,
    constants: Mapping[str, torch.Tensor] | None,
    rotary: Rotary | None = None,
) -> JointTrunk:
    """The trunk of a model that is cut at block k.

    Args:
        constants: what the conditioner made, to be constants; None where it is given at run time.
        rotary: of text and image tokens, [L + N, D / 2].
    """
    *parts, own = modulations(constants, blocks.rows)
    layer = len(blocks.doubles) + len(blocks.singles)
    text = constants[TEXT][None] if constants is not None and layer else None
    text_rotary = any(double.text_rotary for _, double in blocks.doubles)
    entering: ConstantText | None = None
    if text is not None:
        length = text.shape[1]
        own_rotary = (rotary[0][:length], rotary[1][:length]) if rotary and text_rotary else None
        entering = ConstantText(text, own_rotary)
    doubles = []
    for index, (name, double) in enumerate(blocks.doubles):
        image, other = parts[2 * index : 2 * index + 2]
        last, constant_text = index == layer - 1, entering if index == 0 else None
        doubles.append(double.block(weights, name, double, image, other, precision, last, constant_text))
    singles = []
    for index, (name, single) in enumerate(blocks.singles, len(doubles)):
        part, last = parts[len(doubles) + index], index == layer - 1
        singles.append(single.block(weights, name, single, part, precision, last))
    needed = singles or any(block.reads_text for block in doubles)
    norm = own.norm(0, blocks.tapped[1].eps)
    biases = None
    if (
        constants is not None and layer and TEXT_BIAS_ROWS in constants
    ):  # else no token is left that is masked
        biases = {name: constants[name] for name in (TEXT_BIAS, TEXT_BIAS_ROWS)}
    used = text if needed else None
    return JointTrunk(embedder, doubles, singles, norm, used, rotary, text_rotary, biases)
