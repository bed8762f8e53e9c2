"""Precision of a graph: what `--precision` means, in one place (design, section 6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ditf.calib.recipe import Recipe, Scale
from ditf.export.graph.range_probes import branch_of

KEPT_FLOAT32 = {
    "residual": "grows through the network; massive channels pass 65504 in large models",
    "norms and modulation": "squares of massive channels overflow float16",
    "gates": "small values lose their mantissa in float16",
    "embedders": "patch, position, text and noise write the residual",
    "cross-attention query": "its GEMM reads the residual un-normalised",
    "tail": "ensemble mean, discard and the last norm read the residual",
    "VAE group norms": "their squares overflow float16",
}
"""What stays float32 whatever the precision, and why. What a calibration adds is in `Recipe`."""

_COMPUTED = ["weights", "GEMMs", "attention", "feed-forward", "VAE convolutions"]
_QUANTISED = ["weights of linears, per output channel", "their inputs, per tensor, smoothed where free"]
_NOT_QUANTISED = ["attention", "VAE convolutions", "linears that the exceptions name"]


@dataclass(frozen=True)
class Precision:
    """Types of a graph.

    Attributes:
        name: as in the manifest.
        compute: dtype of weights, GEMMs, convolutions and attention.
        output: dtype of the features.
        residual: dtype of the residual stream.
        fold_gates: False leaves every gate an explicit factor, to see what it meets.
        recipe: exceptions that a calibration asks for.
        maxima: of the inputs of linears, by path in the trunk, where those are quantised to int8.
        smooth: False for a naive quantisation, to compare with.
    """

    name: str
    compute: torch.dtype
    output: torch.dtype
    residual: torch.dtype = torch.float32
    fold_gates: bool = True
    recipe: Recipe = field(default_factory=Recipe)
    maxima: Mapping[str, torch.Tensor] | None = None
    smooth: bool = True

    def of(self, name: str) -> torch.dtype:
        """Type that a module of the checkpoint computes in."""
        return torch.float32 if branch_of(name) in self.recipe.float32 else self.compute

    def describe(self, used: Mapping[str, Scale]) -> dict[str, Any]:
        """For the manifest: which tensors have which type, and why.

        Args:
            used: scales of linears as they were built.
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


FLOAT32 = Precision("float32", torch.float32, torch.float32)
FLOAT16 = Precision("float16", torch.float16, torch.float16)
BFLOAT16 = Precision("bfloat16", torch.bfloat16, torch.float16)
"""Features are normalised: float16 holds them, with three bits more, and numpy knows it."""

INT8 = Precision("int8", torch.float16, torch.float16)
"""Float16, whose linears are quantised once their inputs are measured (`maxima`)."""

MEASURING = Precision("float32", torch.float32, torch.float32, fold_gates=False)
"""For a graph whose values are looked at."""

PRECISIONS = {precision.name: precision for precision in (FLOAT32, FLOAT16, BFLOAT16, INT8)}
