"""AdaLN modulation, constant or given at run time, and where it disappears to when it is constant.

A modulation is rows [R, C]: shift, scale and gate of every norm and branch, in diffusers' order. A layer
is made with its rows (`--conditioning bake`), or without and then takes them in `forward`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from ditf.calib.recipe import Scale
from ditf.export.checkpoints.weights import Weights
from ditf.export.graph.blocks.layers import Linear, constant, read_linear, rms_norm
from ditf.export.graph.precision import Precision
from ditf.export.graph.range_probes import Stream, Where, tap

FOLD_ERROR = 4e-4
"""Largest relative rounding error of a row of weights with its gate folded in; float16 alone has 2e-4."""


class ModulatedNorm(nn.Module):
    """(1 + scale) * LayerNorm(x) + shift, float32, as one LayerNormalization node.

    Scale and shift are the norm's own affine parameters: constant ones cost no node and no rounding, and
    TensorRT computes the whole in float32.

    Args:
        rows: shift and scale, [2, C] float32, or None when they are given.
        eps: of the model's own norm.
        where: for the taps; None for block k's, which the calibration of channels looks at.
    """

    rows = 2
    """Rows of the modulation that it takes."""

    def __init__(self, rows: torch.Tensor | None, eps: float, where: Where | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.where = where
        self.weight = None if rows is None else constant(1.0 + rows[1])
        self.bias = None if rows is None else constant(rows[0])
        self.smooth: nn.Parameter | None = None

    def forward(self, x: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        if rows is None:
            assert self.weight is not None
            weight, bias = self.weight, self.bias
        else:
            scale, shift = 1.0 + rows[1], rows[0]
            if self.smooth is not None:
                scale, shift = scale * self.smooth, shift * self.smooth
            weight, bias = scale, shift  # type: ignore[assignment]
        # A residual of another type than float32 is for comparison only (`ditf.export.graph.precision`).
        x = tap(self.where, "norm input", x).to(torch.float32)
        return functional.layer_norm(x, weight.shape, weight, bias, self.eps)

    @torch.no_grad()
    def divide(self, factor: torch.Tensor) -> None:
        """Divide what the norm gives by a factor [C] for each channel, in place."""
        if self.weight is None:
            self.smooth = constant(1.0 / factor)
            return
        assert self.bias is not None
        self.weight.div_(factor)
        self.bias.div_(factor)


class ModulatedRMSNorm(nn.Module):
    """(1 + scale) * weight * x / rms(x), float32: no mean is taken off and nothing is added.

    Args:
        weight: [C] float32, the norm's own.
        row: scale, [1, C] float32; None when it is given, or when the norm is not modulated.
        eps, where: as `ModulatedNorm`.
    """

    rows = 1

    def __init__(
        self, weight: torch.Tensor, row: torch.Tensor | None, eps: float, where: Where | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.where = where
        self.weight = constant(weight if row is None else weight * (1.0 + row[0]))

    def forward(self, x: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        x = tap(self.where, "norm input", x).to(torch.float32)
        weight = self.weight if rows is None else self.weight * (1.0 + rows[0])
        return rms_norm(x, weight, self.eps)

    @torch.no_grad()
    def divide(self, factor: torch.Tensor) -> None:
        """Divide what the norm gives by a factor [C] for each channel, in place."""
        self.weight.div_(factor)


class GatedLinear(nn.Module):
    """gate * (x W + b), as the residual is: the last linear of a branch.

    A constant gate is folded into W and b where their type holds it (`holds_gate`), else it stays an
    explicit float32 factor. Where the recipe scales the linear by 2**-s, the factor 2**s follows in float32.

    With a norm it is gate * RMSNorm(x W + b), in float32: a constant gate joins the norm's weight, and the
    norm does not see 2**-s once its epsilon has its square.

    Args:
        weight: [C, in] float32; bias: [C] or None.
        name: of the linear in the checkpoint.
        gate: [C] float32, or None when it is given, or when the branch has none.
        norm: weight [C] and epsilon of an RMSNorm of what the linear emits.

    Attributes:
        scale: 2**-s, and why.
        subnormal: weights that the scale pushed out of float16's normal range.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        name: str,
        gate: torch.Tensor | None,
        precision: Precision,
        stream: Stream = "image",
        norm: tuple[torch.Tensor, float] | None = None,
    ) -> None:
        super().__init__()
        dtype = precision.of(name)
        self.where = Where(name, stream)
        self.residual = precision.residual
        self.gate: nn.Parameter | None = None
        self.gate_norm: nn.Parameter | None = None
        self.folded = gate is not None and precision.fold_gates
        if norm is None and gate is not None:
            self.folded = self.folded and holds_gate(weight, gate, dtype)
        inside = self.folded and norm is None  # of what the linear emits
        self.scale = precision.recipe.scale(name, inside) if dtype == torch.float16 else Scale()
        self.subnormal = 0
        if norm is not None:
            self.gate_norm = constant(norm[0] * gate if gate is not None and self.folded else norm[0])
            self.eps = norm[1] * 4.0**-self.scale.exponent
            if gate is not None and not self.folded:
                self.gate = constant(gate)
        elif gate is not None and self.folded:
            weight, bias = weight * gate[:, None], None if bias is None else bias * gate
        elif gate is not None:
            self.gate = constant(gate * 2.0**self.scale.exponent)
        if self.scale.exponent:
            before = count_subnormal(weight)
            factor = 2.0**-self.scale.exponent
            weight, bias = weight * factor, None if bias is None else bias * factor
            self.subnormal = count_subnormal(weight) - before
        self.linear = Linear(weight, bias, dtype)

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        for parameter in self.linear.parameters():
            tap(self.where, "scaled weight", parameter)
        y = tap(self.where, "emitted", self.linear(tap(self.where, "input", x)).to(torch.float32))
        if self.gate_norm is not None:
            y = rms_norm(y, self.gate_norm, self.eps)
        if self.gate is not None:
            y = y * tap(self.where, "gate", self.gate)
        elif self.scale.exponent and self.gate_norm is None:
            y = y * 2.0**self.scale.exponent
        if gate is not None:
            y = y * tap(self.where, "gate", gate)
        return tap(self.where, "gated", y).to(self.residual)


def read_gated(
    weights: Weights,
    name: str,
    gate: torch.Tensor | None,
    precision: Precision,
    stream: Stream = "image",
    norm: tuple[torch.Tensor, float] | None = None,
) -> GatedLinear:
    """The gated linear of this name in the checkpoint."""
    return GatedLinear(*read_linear(weights, name), name, gate, precision, stream, norm)


def gate_counts(module: nn.Module) -> dict[str, int]:
    """How many constant gates are folded into weights, and how many are explicit factors."""
    gated = [m for m in module.modules() if isinstance(m, GatedLinear)]
    return {
        "folded": sum(m.folded for m in gated),
        "explicit": sum(m.gate is not None for m in gated),
    }


def holds_gate(weight: torch.Tensor, gate: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a gate folded into the rows of `weight` [C, in] costs no accuracy in `dtype`.

    In float32 and bfloat16 always. In float16 not where a small gate would push a row into the subnormals,
    nor where a gate above 1 would make the linear emit more than the model was seen to emit.
    """
    if dtype != torch.float16 or weight.is_meta:  # bfloat16 has float32's range
        return True
    if gate.abs().max() > 1:
        return False
    folded = weight * gate[:, None]
    error = (folded.to(dtype).to(torch.float32) - folded).norm(dim=1)
    return bool((error <= FOLD_ERROR * folded.norm(dim=1)).all())


def scales(module: nn.Module) -> dict[str, Scale]:
    """The recipe's scales as they were built, by name of the linear."""
    gated = (m for m in module.modules() if isinstance(m, GatedLinear))
    return {m.where.name: m.scale for m in gated if m.scale.exponent}


def subnormal_weights(module: nn.Module) -> int:
    """Weights that scales pushed out of float16's normal range."""
    return sum(m.subnormal for m in module.modules() if isinstance(m, GatedLinear))


def count_subnormal(weight: torch.Tensor) -> int:
    """Values below float16's smallest normal number, zeros apart."""
    if weight.is_meta:
        return 0
    size = weight.abs()
    return int(((size > 0) & (size < torch.finfo(torch.float16).smallest_normal)).sum())
