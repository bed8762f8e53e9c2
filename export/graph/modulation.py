"""AdaLN modulation, constant or given at run time, and where it disappears to when it is constant.

A modulation is rows [R, C]: shift, scale and gate of every norm and branch, in diffusers' order. A layer
is made with its rows (`--conditioning bake`), or without and then takes them in `forward`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from ditf.export.graph.layers import Linear, constant, read_linear
from ditf.export.graph.precision import Precision
from ditf.export.weights import Weights

FOLD_ERROR = 4e-4
"""Largest relative rounding error of a row of weights with its gate folded in; float16 alone has 2e-4."""


class ModulatedNorm(nn.Module):
    """(1 + scale) * LayerNorm(x) + shift, float32, as one LayerNormalization node.

    Scale and shift are the norm's own affine parameters: constant ones cost no node and no rounding, and
    TensorRT computes the whole in float32.

    Args:
        rows: shift and scale, [2, C] float32, or None when they are given.
        eps: of the model's own norm.
    """

    def __init__(self, rows: torch.Tensor | None, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = None if rows is None else constant(1.0 + rows[1])
        self.bias = None if rows is None else constant(rows[0])

    def forward(self, x: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        if rows is None:
            assert self.weight is not None
            weight, bias = self.weight, self.bias
        else:
            weight, bias = 1.0 + rows[1], rows[0]  # type: ignore[assignment]
        return functional.layer_norm(x, weight.shape, weight, bias, self.eps)


class GatedLinear(nn.Module):
    """gate * (x W + b), float32 out: the last linear of a branch.

    A constant gate is folded into W and b where their type holds it (`fold_gate`), else it stays an
    explicit float32 factor.

    Args:
        name: of the linear in `weights`.
        gate: [C] float32, or None when it is given, or when the branch has none.
    """

    def __init__(self, weights: Weights, name: str, gate: torch.Tensor | None, precision: Precision) -> None:
        super().__init__()
        weight, bias = read_linear(weights, name)
        self.gate: nn.Parameter | None = None
        self.folded = False
        if gate is not None:
            self.folded = holds_gate(weight, gate, precision.compute)
            if self.folded:
                weight, bias = weight * gate[:, None], None if bias is None else bias * gate
            else:
                self.gate = constant(gate)
        self.linear = Linear(weight, bias, precision.compute)

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        y: torch.Tensor = self.linear(x).to(torch.float32)
        if self.gate is not None:
            gate = self.gate
        return y if gate is None else y * gate


def gate_counts(module: nn.Module) -> dict[str, int]:
    """How many constant gates are folded into weights, and how many are explicit factors."""
    gated = [m for m in module.modules() if isinstance(m, GatedLinear)]
    return {
        "folded": sum(m.folded for m in gated),
        "explicit": sum(m.gate is not None for m in gated),
    }


def holds_gate(weight: torch.Tensor, gate: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a gate folded into the rows of `weight` [C, in] costs no accuracy in `dtype`.

    In float32 always. In float16 not where a small gate would push a row into the subnormals, nor where
    a gate above 1 would make what the linear emits larger than what the model was seen to emit.
    """
    if dtype == torch.float32 or weight.is_meta:
        return True
    if gate.abs().max() > 1:
        return False
    folded = weight * gate[:, None]
    error = (folded.to(dtype).to(torch.float32) - folded).norm(dim=1)
    return bool((error <= FOLD_ERROR * folded.norm(dim=1)).all())
