"""Precision of a graph: what `--fp16` means, in one place (design, section 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

KEPT_FLOAT32 = {
    "residual": "grows through the network; massive channels pass 65504 in large models",
    "norms and modulation": "squares of massive channels overflow float16",
    "gates": "small values lose their mantissa in float16",
    "embedders": "patch, position and noise write the residual",
    "cross-attention query": "its GEMM reads the residual un-normalised",
    "tail": "ensemble mean, discard and the last norm read the residual",
}
"""What stays float32 in a float16 graph, and why."""


@dataclass(frozen=True)
class Precision:
    """Types of a graph.

    Attributes:
        name: "float16" or "float32", as in the manifest.
        compute: dtype of weights, GEMMs, convolutions and attention.
        output: dtype of the features.
    """

    name: str
    compute: torch.dtype
    output: torch.dtype

    @property
    def recipe(self) -> dict[str, Any]:
        """For the manifest: which tensors have which type, and why."""
        if self.compute == torch.float32:
            return {"float32": {"everything": "exported without --fp16"}}
        return {
            "float16": ["weights", "GEMMs", "attention", "feed-forward", "VAE convolutions"],
            "float32": {**KEPT_FLOAT32, "VAE group norms": "their squares overflow float16"},
        }


FLOAT32 = Precision("float32", torch.float32, torch.float32)
FLOAT16 = Precision("float16", torch.float16, torch.float16)
