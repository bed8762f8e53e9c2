"""The ONNX files of a bundle: features.onnx, what goes with it, and match.onnx."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ditf.export.assemble.features_graph import AssembledGraph
from ditf.export.assemble.parameter_counts import Counts, parameter_parts, removed_parts
from ditf.export.graph.blocks.gated_linear import gate_counts, scales, subnormal_weights
from ditf.export.graph.match import INPUTS, OUTPUTS, MatchGraph
from ditf.export.measure.golden import GoldenOutputs
from ditf.export.onnx_writing.emulation import ExactFeatures
from ditf.export.onnx_writing.onnx_file import Progress, Traced, write_onnx
from ditf.export.onnx_writing.value_sketches import write_trace
from ditf.export.planning.plan import Plan
from ditf.runtime.bundles import bundle as files
from ditf.runtime.bundles.conditions import key
from ditf.runtime.bundles.manifest import DYNAMIC_EXAMPLE
from ditf.runtime.files.unfinished import scratch_folder


@dataclass(frozen=True)
class FeaturesRecord:
    """What the manifest says about features.onnx; the attributes are the manifest's fields."""

    recipe: dict[str, Any]
    parts: dict[str, Counts]
    removed: Counts


def write_features(
    folder: Path,
    plan: Plan,
    made: AssembledGraph,
    golden: GoldenOutputs | None,
    exact: ExactFeatures | None,
    progress: Progress,
) -> FeaturesRecord:
    """Trace the features graph and write features.onnx with its weights, trace.npz and conditions.npz.

    Args:
        folder: the bundle's.
        golden: trace.npz is written for its first image; None leaves trace.npz out.
        exact: of a 16-bit graph, for trace.npz.
        progress: called with the bytes of weights that are written, and of all.
    """
    parts = parameter_parts(made.graph)
    recipe = plan.precision.describe(scales(made.graph.trunk))
    if plan.precision.compute != torch.float32 and plan.options.pca is not None:
        recipe["float32"]["projection"] = "part of the tail; the output is cast last"
    if plan.options.conditioning == "bake":
        recipe["gates"] = gate_counts(made.graph.trunk)
    if plan.precision.recipe.exceptions():
        recipe["subnormal_weights"] = subnormal_weights(made.graph.trunk)
    traced = _trace(folder, plan, made, golden, exact, progress)
    if plan.precision.compute != torch.float32:
        recipe["float32_products"] = traced.float32_products
    _write_conditions(folder, made)
    return FeaturesRecord(recipe, parts, removed_parts(plan, made))


def _trace(
    folder: Path,
    plan: Plan,
    made: AssembledGraph,
    golden: GoldenOutputs | None,
    exact: ExactFeatures | None,
    progress: Progress,
) -> Traced:
    """Write features.onnx, and trace.npz: what its program computes on the first golden image."""
    dynamic = plan.options.batch == "dynamic"
    batch = DYNAMIC_EXAMPLE if plan.options.batch == "dynamic" else plan.options.batch
    inputs = {"image": torch.zeros((batch, *plan.size, 3), dtype=torch.uint8), **made.feeds[0]}
    shapes: tuple[Any, ...] | None = None
    if dynamic:
        image = {0: torch.export.Dim("batch")}
        shapes = (image, tuple({} for _ in made.feeds[0])) if made.feeds[0] else (image,)
    path = folder / files.FEATURES
    traced = write_onnx(made.graph, inputs, ["features"], path, plan.opset, shapes, progress)
    if golden is not None:
        inputs["image"] = torch.from_numpy(golden.arrays["images"][:1].repeat(batch, axis=0))
        path = folder / files.TRACE
        write_trace(path, traced, inputs, golden.arrays, plan.grid, plan.options.ensemble, exact)
    return traced


def _write_conditions(folder: Path, made: AssembledGraph) -> None:
    """Write conditions.npz: the rows of a bank, or the embeddings that a live graph takes."""
    arrays = {
        key(index, name): made.feeds[index][name].numpy()
        for index in range(len(made.feeds))
        for name in made.condition_inputs
    }
    if arrays:
        np.savez(folder / files.CONDITIONS, allow_pickle=False, **arrays)


@cache
def match_onnx(channels: int, grid: tuple[int, int], dtype: torch.dtype, opset: int) -> bytes:
    """The bytes of match.onnx. It has no weights and is the same for every layer of a model, so it is cached.

    Args:
        channels: C of the features.
        grid: (h, w) of the features in cells.
        dtype: of the features.
    """
    h, w = grid
    features = torch.zeros((1, channels, h, w), dtype=dtype)
    height, width, points = 48, 40, 5  # examples: these dimensions are dynamic
    tensors = (
        features,
        features.clone(),
        torch.zeros(points, h),
        torch.zeros(points, w),
        torch.zeros(height, h),
        torch.zeros(width, w),
    )
    count = torch.export.Dim("points")
    shapes: dict[str, Any] = {
        "source": {},
        "target": {},
        "point_rows": {0: count},
        "point_columns": {0: count},
        "rows": {0: torch.export.Dim("height")},
        "columns": {0: torch.export.Dim("width")},
    }
    with scratch_folder("ditf-match-") as folder:
        path = folder / files.MATCH
        write_onnx(MatchGraph(), dict(zip(INPUTS, tensors, strict=True)), OUTPUTS, path, opset, shapes)
        return path.read_bytes()
