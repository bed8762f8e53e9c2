"""The precision of a graph: which type each part computes in (docs/design.md, "Precision")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ditf.calib.recipe import Recipe, Scale
from ditf.export.graph.range_probes import branch_of

EMBEDDERS, CROSS_ATTENTION_QUERY = "embedders", "cross-attention query"
"""Linears that are float32 whatever the precision."""

KEPT_FLOAT32 = {
    "residual": "grows through the network; massive channels pass 65504 in large models",
    "norms and modulation": "squares of massive channels overflow float16",
    "gates": "small values lose their mantissa in float16",
    EMBEDDERS: "patch, position, text and noise write the residual",
    CROSS_ATTENTION_QUERY: "its GEMM reads the residual un-normalised",
    "tail": "ensemble mean, discard and the last norm read the residual",
    "VAE group norms": "their squares overflow float16; with the activation behind each",
}
"""What is float32 in every precision, and why. A calibration may add to it (`ditf.calib.recipe.Recipe`)."""

FOLD_ERROR = 4e-4
"""The FP16 rule for gates: the largest relative rounding error of a row of weights with its gate folded in.
Rounding to float16 alone makes 2e-4."""

_COMPUTED = ["weights", "GEMMs", "attention", "feed-forward", "VAE convolutions"]
_QUANTISED = ["weights of linears, per output channel", "their inputs, per tensor, smoothed where free"]
_NOT_QUANTISED = ["attention", "VAE convolutions", "linears that the exceptions name"]


@dataclass(frozen=True)
class Precision:
    """The types of a graph.

    Attributes:
        name: as the manifest has it.
        compute: dtype of weights, GEMMs, convolutions and attention.
        output: dtype of the features.
        residual: dtype of the residual stream.
        fold_gates: False keeps every gate an explicit factor, so that its input can be measured.
        recipe: the exceptions that a calibration asks for.
        maxima: the largest |x| of each input channel of a linear [C_in], by the linear's path in the trunk.
            None where no linear is quantised to int8.
        smooth: False for quantisation without smoothing, as a comparison.
    """

    name: str
    compute: torch.dtype
    output: torch.dtype
    residual: torch.dtype = torch.float32
    fold_gates: bool = True
    recipe: Recipe = field(default_factory=Recipe)
    maxima: Mapping[str, torch.Tensor] | None = None
    smooth: bool = True

    def of(self, *names: str, kept: str = "") -> torch.dtype:
        """The type that modules of the checkpoint compute in: every linear asks here.

        Args:
            names: of the modules. Several are computed as one: where they would differ it is in float32.
            kept: the entry of `KEPT_FLOAT32` that the modules belong to, if they belong to one.
        """
        if kept:
            assert kept in KEPT_FLOAT32
            return torch.float32
        types = {torch.float32 if branch_of(n) in self.recipe.float32 else self.compute for n in names}
        return types.pop() if len(types) == 1 else torch.float32

    def scale(self, name: str, folded: bool) -> Scale:
        """The power of two that the last linear of a branch is divided by, to stay in float16's range.

        Args:
            name: of the linear.
            folded: whether its gate is folded into it.
        """
        return self.recipe.scale(name, folded) if self.of(name) == torch.float16 else Scale()

    def folds_gate(self, name: str, weight: torch.Tensor, gate: torch.Tensor) -> bool:
        """Whether a constant gate [C] is folded into the weight [C, in] of a linear, or stays a factor."""
        return self.fold_gates and holds_gate(weight, gate, self.of(name))

    def describe(self, used: Mapping[str, Scale]) -> dict[str, Any]:
        """The manifest's entry: which parts have which type, and why.

        Args:
            used: the scales that were applied, by name of the linear.
        """
        if self.compute == torch.float32:
            return {"float32": {"everything": "exported without --precision"}}
        short = str(self.compute).removeprefix("torch.")
        return {
            **({"int8": _QUANTISED} if self.maxima else {}),
            short: _NOT_QUANTISED if self.maxima else _COMPUTED,
            "float32": dict(KEPT_FLOAT32),
            "exceptions": self.recipe.exceptions(used),
        }


def holds_gate(weight: torch.Tensor, gate: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a gate folded into the rows of `weight` [C, in] costs no accuracy in `dtype`.

    In float32 and bfloat16 it never does. In float16 a small gate may push a row into the subnormals
    (`FOLD_ERROR`), and with a gate above 1 the linear would emit more than the model was seen to emit.
    """
    if dtype != torch.float16 or weight.is_meta:  # bfloat16 has float32's range
        return True
    if gate.abs().max() > 1:
        return False
    folded = weight * gate[:, None]
    error = (folded.to(dtype).to(torch.float32) - folded).norm(dim=1)
    return bool((error <= FOLD_ERROR * folded.norm(dim=1)).all())


FLOAT32 = Precision("float32", torch.float32, torch.float32)
FLOAT16 = Precision("float16", torch.float16, torch.float16)
BFLOAT16 = Precision("bfloat16", torch.bfloat16, torch.float16)
"""Its features are float16: they are normalised, so float16 holds them with three bits more than bfloat16
would, and numpy has the type."""

INT8 = Precision("int8", torch.float16, torch.float16)
"""Float16 with quantised linears, once `maxima` says how large their inputs are."""

MEASURING = Precision("float32", torch.float32, torch.float32, fold_gates=False)
"""For a graph that runs under range probes."""

PRECISIONS = {precision.name: precision for precision in (FLOAT32, FLOAT16, BFLOAT16, INT8)}
