"""The ONNX files of a bundle: features.onnx, what goes with it, and match.onnx."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ditf.calib.images import golden_pair
from ditf.export.assemble.features_graph import Specialised, specialise
from ditf.export.assemble.parameter_counts import Counts, parameter_parts, removed_parts
from ditf.export.graph.blocks.gated_linear import gate_counts, scales, subnormal_weights
from ditf.export.graph.match import INPUTS, OUTPUTS, MatchGraph
from ditf.export.measure.run_reference import Observation, Report
from ditf.export.onnx_writing.emulation import rehearse, rehearse_alone
from ditf.export.onnx_writing.onnx_file import Progress, write_onnx
from ditf.export.onnx_writing.value_sketches import write_trace
from ditf.export.planning.conditions import Entry
from ditf.export.planning.plan import Plan
from ditf.runtime.bundles import bundle as files
from ditf.runtime.bundles.conditions import key
from ditf.runtime.bundles.manifest import DYNAMIC_EXAMPLE
from ditf.runtime.files.unfinished import scratch_folder


@dataclass(frozen=True)
class Written:
    """What features.onnx is, for the manifest; attributes as there."""

    recipe: dict[str, Any]
    parts: dict[str, Counts]
    removed: Counts
    rehearsal: dict[str, float]


def write_graph(
    folder: Path,
    plan: Plan,
    entries: tuple[Entry, ...],
    noise: torch.Tensor,
    observed: Observation,
    report: Report,
    progress: Progress,
) -> Written:
    """features.onnx with its weights, trace.npz and conditions.npz."""
    report(f"reading and folding the weights of {plan.layer} blocks")
    made = specialise(plan, entries, noise, observed.settings, observed.projection)
    against = " against the reference" if observed.golden else ""
    report(f"rehearsing {plan.layer} blocks in {plan.precision.name}{against}")
    measured: dict[str, float] = {}
    if observed.golden:
        measured = rehearse(made.graph, made.feeds, folder / files.GOLDEN, plan.options.precision)
    else:
        rehearse_alone(made.graph, made.feeds[0], plan.size, plan.options.precision)
    report(f"tracing {plan.layer} blocks in {plan.precision.name}")
    parts = parameter_parts(made.graph)
    described = plan.precision.describe(scales(made.graph.trunk))
    if plan.precision.compute != torch.float32 and plan.options.pca is not None:
        described["float32"]["projection"] = "part of the tail; the output is cast last"
    if plan.options.conditioning == "bake":
        described["gates"] = gate_counts(made.graph.trunk)
    if plan.precision.recipe.exceptions():
        described["subnormal_weights"] = subnormal_weights(made.graph.trunk)
    products = _write_features(folder, plan, made, progress)
    if plan.precision.compute != torch.float32:
        described["float32_products"] = products
    _write_conditions(folder, made)
    return Written(described, parts, removed_parts(plan, made), measured)


def _write_features(folder: Path, plan: Plan, made: Specialised, progress: Progress) -> list[str]:
    """features.onnx, and what its program computes on the first golden image; its float32 products."""
    dynamic = plan.options.batch == "dynamic"
    batch = DYNAMIC_EXAMPLE if plan.options.batch == "dynamic" else plan.options.batch
    inputs = {"image": torch.zeros((batch, *plan.size, 3), dtype=torch.uint8), **made.feeds[0]}
    shapes: tuple[Any, ...] | None = None
    if dynamic:
        image = {0: torch.export.Dim("batch")}
        shapes = (image, tuple({} for _ in made.feeds[0])) if made.feeds[0] else (image,)
    path = folder / files.FEATURES
    traced = write_onnx(made.graph, inputs, ["features"], path, plan.options.opset, shapes, progress)
    if plan.options.golden == "none":
        return traced.float32_products
    inputs["image"] = torch.from_numpy(golden_pair(plan.size)[:1].repeat(batch, axis=0))
    with np.load(folder / files.GOLDEN) as golden:
        write_trace(folder / files.TRACE, traced, inputs, golden, plan.grid, plan.options.ensemble)
    return traced.float32_products


def _write_conditions(folder: Path, made: Specialised) -> None:
    """The rows of a bank, or the embeddings for a live graph."""
    arrays = {
        key(index, name): made.feeds[index][name].numpy()
        for index in range(len(made.feeds))
        for name in made.condition_inputs
    }
    if arrays:
        np.savez(folder / files.CONDITIONS, allow_pickle=False, **arrays)


@lru_cache(maxsize=8)
def match_onnx(channels: int, grid: tuple[int, int], dtype: torch.dtype, opset: int) -> bytes:
    """match.onnx, which has no weights: the same for every layer of a model, and traced once a process."""
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
