"""Running a graph in PyTorch, in its own precision, before it is traced.

ONNX Runtime on a CPU computes most of a float16 graph in float32 and hides overflow; PyTorch does not.
What this measures is the rounding of this model in this precision: `ditf check` gates against it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ditf.calib.parity import CEILINGS, TOLERANCES, feature_parity, gates
from ditf.export.graph.features import FeaturesGraph
from ditf.runtime.errors import GateFailed


@torch.no_grad()
def rehearse(graph: FeaturesGraph, noise: torch.Tensor, golden: Path, precision: str) -> dict[str, float]:
    """Feature parity of the module on the first golden image.

    Args:
        graph: the module that will be traced.
        noise: eps [E, c, h', w'], for a graph that takes it as an input.
        golden: golden.npz.
        precision: "float32" or "float16".

    Raises:
        GateFailed: the graph is not the reference in this precision; nothing should be shipped.
    """
    with np.load(golden) as arrays:
        image, rows = arrays["images"][:1], arrays["rows"][0]
        expected = arrays["features"][0]
    inputs = [torch.from_numpy(image)] + ([noise] if graph.noise is None else [])
    tokens = graph.eval()(*inputs)[0].flatten(1).T
    measured = feature_parity(tokens[torch.from_numpy(rows)].numpy(), expected)
    limits = {**TOLERANCES[precision], **CEILINGS[precision]}
    for gate in gates(measured, limits):
        if not gate.ok:
            fix = "export without --fp16" if precision == "float16" else "this is a defect of ditf"
            raise GateFailed(
                f"the {precision} graph does not match the model: {gate.name} {gate.value:.6g},"
                f" limit {gate.limit:g}",
                fix,
            )
    return measured
