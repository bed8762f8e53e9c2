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

from ditf.calib.recipe import Scale
from ditf.export.checkpoints.weights import Weights
from ditf.export.graph.blocks.condition_tensors import MODULATION, ConditionTensors
from ditf.export.graph.blocks.layers import Linear, constant, read_linear, rms_norm
from ditf.export.graph.precision import Precision
from ditf.export.graph.range_probes import Stream, Where, probe
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


class GatedLinear(nn.Module):
    """gate * (x W + b), in the residual's type: the last linear of a branch.

    A constant gate is folded into W and b where their type holds it (`Precision.folds_gate`). Elsewhere it
    stays an explicit float32 factor. Where the recipe scales the linear by 2**-s, the factor 2**s follows in
    float32.

    With a norm the module computes gate * RMSNorm(x W + b), in float32. A constant gate joins the norm's
    weight, and the norm's epsilon is multiplied by 4**-s, so that 2**-s cancels.

    Args:
        weight: [C, in] float32; bias: [C] or None.
        name: the linear's name in the checkpoint.
        gate: a row of the modulation, or `UNGATED`.
        stream: whose tokens it reads.
        norm: weight [C] and epsilon of an RMSNorm of the linear's output.

    Attributes:
        scale: 2**-s, and why.
        subnormal: number of weights that the scale pushed out of float16's normal range.
    """

    roles: ClassVar[Roles] = dict.fromkeys(("gate", "gate_norm"), Role.MODULATION)

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        name: str,
        gate: Row,
        precision: Precision,
        stream: Stream = "image",
        norm: tuple[torch.Tensor, float] | None = None,
    ) -> None:
        super().__init__()
        self.where = Where(name, stream)
        self.residual = precision.residual
        self.gate_place = gate.place
        self.gate: nn.Parameter | None = None
        self.gate_norm: nn.Parameter | None = None
        factor = gate.constant
        self.folded = factor is not None and precision.fold_gates
        if factor is not None and norm is None:
            self.folded = precision.folds_gate(name, weight, factor)
        self.scale = precision.scale(name, self.folded and norm is None)
        self.subnormal = 0
        if norm is not None:
            self.gate_norm = constant(norm[0] * factor if factor is not None and self.folded else norm[0])
            self.eps = norm[1] * 4.0**-self.scale.exponent
            if factor is not None and not self.folded:
                self.gate = constant(factor)
        elif factor is not None and self.folded:
            weight, bias = weight * factor[:, None], None if bias is None else bias * factor
        elif factor is not None:
            self.gate = constant(factor * 2.0**self.scale.exponent)
        if self.scale.exponent:
            before = count_subnormal(weight)
            down = 2.0**-self.scale.exponent
            weight, bias = weight * down, None if bias is None else bias * down
            self.subnormal = count_subnormal(weight) - before
        self.linear = Linear(weight, bias, precision.of(name))

    def forward(self, x: torch.Tensor, given: ConditionTensors) -> torch.Tensor:
        """[B, N, in] -> [B, N, C], to be added to the residual."""
        for parameter in self.linear.parameters():
            probe(self.where, "scaled weight", parameter)
        y = probe(self.where, "emitted", self.linear(probe(self.where, "input", x)).to(torch.float32))
        if self.gate_norm is not None:
            y = rms_norm(y, self.gate_norm, self.eps)
        if self.gate is not None:
            y = y * probe(self.where, "gate", self.gate)
        elif self.scale.exponent and self.gate_norm is None:
            y = y * 2.0**self.scale.exponent
        if self.gate_place is not None:
            y = y * probe(self.where, "gate", given[MODULATION][self.gate_place])
        return probe(self.where, "gated", y).to(self.residual)


def read_gated(
    weights: Weights,
    name: str,
    gate: Row,
    precision: Precision,
    stream: Stream = "image",
    norm: tuple[torch.Tensor, float] | None = None,
) -> GatedLinear:
    """The gated linear of this name in the checkpoint; arguments as for `GatedLinear`."""
    return GatedLinear(*read_linear(weights, name), name, gate, precision, stream, norm)


def gate_counts(module: nn.Module) -> dict[str, int]:
    """How many constant gates are folded into weights, and how many are explicit factors."""
    gated = [m for m in module.modules() if isinstance(m, GatedLinear)]
    return {
        "folded": sum(m.folded for m in gated),
        "explicit": sum(m.gate is not None for m in gated),
    }


def scales(module: nn.Module) -> dict[str, Scale]:
    """The recipe's scales as they were applied, by name of the linear."""
    gated = (m for m in module.modules() if isinstance(m, GatedLinear))
    return {m.where.name: m.scale for m in gated if m.scale.exponent}


def subnormal_weights(module: nn.Module) -> int:
    """Number of weights that scales pushed out of float16's normal range."""
    return sum(m.subnormal for m in module.modules() if isinstance(m, GatedLinear))


def count_subnormal(weight: torch.Tensor) -> int:
    """Number of values below float16's smallest normal number; zeros do not count."""
    if weight.is_meta:
        return 0
    size = weight.abs()
    return int(((size > 0) & (size < torch.finfo(torch.float16).smallest_normal)).sum())
