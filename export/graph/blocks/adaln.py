"""AdaLN modulation: shift, scale and gate of every norm and branch, constant or given at run time.

A model's modulation is a table of rows [R, C] in diffusers' order. With `--conditioning bake` the rows are
constants, and fold into the norms and linears that they modulate. Otherwise the table is given at run time,
and each norm and gate knows its place in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from ditf.export.graph.blocks.condition_tensors import MODULATION, ConditionTensors
from ditf.export.graph.blocks.layers import constant, rms_norm
from ditf.export.graph.range_probes import Where, probe
from ditf.export.graph.roles import Role, Roles

NORM_ROWS = 2
"""Rows of a norm alone: shift and scale."""


@dataclass(frozen=True, eq=False)
class Row:
    """One row of the modulation: a constant, a place in the table given at run time, or neither.

    Attributes:
        constant: [C] float32, or None.
        place: its number in the table [R, C], or None.
    """

    constant: torch.Tensor | None = None
    place: int | None = None


UNGATED = Row()
"""The gate of a branch that has none."""


@dataclass(frozen=True, eq=False)
class Modulation:
    """The rows that modulate one stream of a block; blocks ask it for their norms and gates.

    Attributes:
        rows: [R, C] float32, where they are constant.
        first: the place of the first row in the table, where they are given at run time.
    """

    rows: torch.Tensor | None = None
    first: int | None = None

    def row(self, index: int) -> Row:
        """Row `index` of these rows."""
        return Row(
            None if self.rows is None else self.rows[index],
            None if self.first is None else self.first + index,
        )

    def norm(self, first: int, eps: float, where: Where | None = None) -> ModulatedNorm:
        """The LayerNorm that rows `first` and `first` + 1 shift and scale.

        Args:
            eps, where: as for `ModulatedNorm`.
        """
        return ModulatedNorm(self.row(first), self.row(first + 1), eps, where)

    def rms_norm(
        self, row: int, weight: torch.Tensor, eps: float, where: Where | None = None
    ) -> ModulatedRMSNorm:
        """The RMSNorm that one row scales.

        Args:
            weight, eps, where: as for `ModulatedRMSNorm`.
        """
        return ModulatedRMSNorm(weight, self.row(row), eps, where)


UNMODULATED = Modulation()
"""Of blocks without AdaLN: their RMSNorms have their own weights alone, and no branch is gated."""


def modulations(constants: Mapping[str, torch.Tensor] | None, sizes: Sequence[int]) -> list[Modulation]:
    """The modulation table in parts.

    Args:
        constants: what a conditioner made, to be constants; None where the table is given at run time.
        sizes: number of rows of each part, in the table's order.
    """
    if constants is not None:
        return [Modulation(rows) for rows in constants[MODULATION].split(list(sizes))]
    return [Modulation(first=last - size) for last, size in zip(accumulate(sizes), sizes, strict=True)]


class ModulatedNorm(nn.Module):
    """(1 + scale) * LayerNorm(x) + shift, in float32, as one LayerNormalization node.

    Scale and shift are the norm's own affine parameters: constant ones cost no node and no rounding, and
    TensorRT computes the whole in float32.

    Args:
        shift, scale: rows of the modulation.
        eps: the epsilon of the model's own norm.
        where: names the norm to range probes. It is None for block k's norm, whose input the calibration of
            channels looks at.
    """

    roles: ClassVar[Roles] = dict.fromkeys(("weight", "bias", "smooth"), Role.MODULATION)

    def __init__(self, shift: Row, scale: Row, eps: float, where: Where | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.where = where
        self.weight = None if scale.constant is None else constant(1.0 + scale.constant)
        self.bias = None if shift.constant is None else constant(shift.constant)
        self.smooth: nn.Parameter | None = None
        self.shift_place, self.scale_place = shift.place, scale.place

    def forward(self, x: torch.Tensor, given: ConditionTensors) -> torch.Tensor:
        """[B, N, C] of any float type -> float32 [B, N, C]."""
        # A residual of another type than float32 is for comparison only (`ditf.export.graph.precision`).
        x = probe(self.where, "norm input", x).to(torch.float32)
        weight, bias = self._affine(given)
        return functional.layer_norm(x, weight.shape, weight, bias, self.eps)

    def _affine(self, given: ConditionTensors) -> tuple[torch.Tensor, torch.Tensor]:
        """1 + scale and shift, [C] each."""
        if self.weight is not None and self.bias is not None:
            return self.weight, self.bias
        rows = given[MODULATION]
        weight, bias = 1.0 + rows[self.scale_place], rows[self.shift_place]
        if self.smooth is not None:
            weight, bias = weight * self.smooth, bias * self.smooth
        return weight, bias

    @torch.no_grad()
    def divide(self, factor: torch.Tensor) -> None:
        """Divide the norm's output by a factor for each channel, [C], in place."""
        if self.weight is None or self.bias is None:
            self.smooth = constant(1.0 / factor)
            return
        self.weight.div_(factor)
        self.bias.div_(factor)


class ModulatedRMSNorm(nn.Module):
    """(1 + scale) * weight * x / rms(x), in float32: no mean is subtracted and nothing is added.

    Args:
        weight: the norm's own weight, [C] float32.
        scale: a row of the modulation; an empty one where the norm is not modulated.
        eps, where: as for `ModulatedNorm`.
    """

    roles: ClassVar[Roles] = {"weight": Role.MODULATION}

    def __init__(self, weight: torch.Tensor, scale: Row, eps: float, where: Where | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.where = where
        self.weight = constant(weight if scale.constant is None else weight * (1.0 + scale.constant))
        self.scale_place = scale.place

    def forward(self, x: torch.Tensor, given: ConditionTensors) -> torch.Tensor:
        """[B, N, C] of any float type -> float32 [B, N, C]."""
        x = probe(self.where, "norm input", x).to(torch.float32)
        weight: torch.Tensor = self.weight
        if self.scale_place is not None:
            weight = weight * (1.0 + given[MODULATION][self.scale_place])
        return rms_norm(x, weight, self.eps)

    @torch.no_grad()
    def divide(self, factor: torch.Tensor) -> None:
        """Divide the norm's output by a factor for each channel, [C], in place."""
        self.weight.div_(factor)
