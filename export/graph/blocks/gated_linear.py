"""The last linear of a branch, with the branch's gate folded in or as a factor, and counts of both."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from ditf.calib.recipe import Scale
from ditf.export.checkpoints.weights import Weights
from ditf.export.graph.blocks.adaln import Row
from ditf.export.graph.blocks.condition_tensors import MODULATION, ConditionTensors
from ditf.export.graph.blocks.layers import Linear, constant, read_linear, rms_norm
from ditf.export.graph.precision import Precision
from ditf.export.graph.range_probes import Stream, Where, probe
from ditf.export.graph.roles import Role, Roles


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
    value_bias: torch.Tensor | None = None,
) -> GatedLinear:
    """The gated linear of this name in the checkpoint; other arguments as for `GatedLinear`.

    Args:
        value_bias: what its first inputs lack, float32 [at most in]; the product joins the bias.
    """
    weight, bias = read_linear(weights, name)
    if value_bias is not None:
        folded = weight[:, : len(value_bias)] @ value_bias
        bias = folded if bias is None else bias + folded
    return GatedLinear(weight, bias, name, gate, precision, stream, norm)


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
