"""manifest.json of a bundle: what was decided, measured and written."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ditf.calib.parity import tolerances
from ditf.export.bundle_graphs import FeaturesRecord
from ditf.export.graph.features import FeatureSettings
from ditf.export.measure.feature_statistics import FeatureStatistics
from ditf.export.measure.golden import GoldenOutputs
from ditf.export.measure.vae_compatibility import VaeComparison
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import Plan
from ditf.runtime.bundles.manifest import SCHEMA, Manifest, tool_versions
from ditf.runtime.files.hashed import sha256

_RECORDED = {field.name for field in fields(Manifest)} & {field.name for field in fields(ExportOptions)}
"""Options that the manifest has a field for; they are recorded as given, unless the plan decides them."""


def make_manifest(
    folder: Path,
    plan: Plan,
    settings: FeatureSettings,
    features: FeaturesRecord,
    golden: GoldenOutputs | None,
    emulated: dict[str, float],
    statistics: FeatureStatistics,
    vaes: VaeComparison | None,
    text_is_cut: bool,
) -> Manifest:
    """The manifest of a bundle whose other files are written.

    Args:
        folder: the bundle's; all its files are listed with their sizes and hashes.
        settings: the feature's definition.
        emulated: feature parity of the graph in PyTorch, in its own precision; empty without golden outputs.
        statistics: of the features, with --pca.
        vaes: with --vae.
        text_is_cut: whether --text-tokens cut text that matters.
    """
    options, first = plan.options, plan.entries[0]
    half = plan.output_dtype == torch.float16
    decided: dict[str, Any] = {
        "model": {
            "id": plan.checkpoint.id,
            "revision": plan.checkpoint.revision,
            "family": plan.family.name,
            "transformer": plan.family.transformer_class,
        },
        "layer": plan.layer,
        "timestep": first.timestep,
        "prompt": first.prompt,
        "class_label": first.class_label,
        "guidance": plan.guidance,
        "text_tokens": options.text_tokens if text_is_cut else None,
        "size": plan.size,
        "opset": plan.opset,
        "discard": {
            "channels": list(settings.channels),
            "stage": settings.stage,
            "source": options.discard if isinstance(options.discard, str) else "given",
        },
        "features_dtype": "float16" if half else "float32",
        "pca": None,
        "vae": None if vaes is None else {**plan.latents.identity(), "x_0": vaes.agreement},
        "golden": {} if golden is None else golden.manifest,
        "command": options.command or f"ditf-export --model {shlex.quote(options.model)}",
    }
    if statistics.manifest is not None and golden is not None:
        decided["pca"] = {**statistics.manifest, **golden.projection_cost}
    limits = {}
    if emulated:
        limits = tolerances(options.precision, emulated, plan.size[0] / plan.grid[0], half)
    return Manifest(
        schema=SCHEMA,
        layer_name=plan.family.blocks.describe(plan.layer),
        grid=plan.grid,
        channels=plan.channels,
        recipe=features.recipe,
        parts=features.parts,
        removed=features.removed,
        conditions=[entry.to_json() for entry in plan.entries],
        tolerances=limits,
        rehearsal=emulated,
        measured={},
        versions=tool_versions(
            "ditf", "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime"
        ),
        files={
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(folder.iterdir())
        },
        **{name: getattr(options, name) for name in _RECORDED} | decided,
    )
