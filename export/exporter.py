"""The export, from options to a bundle on disk: the order of the work, and nothing else."""

from __future__ import annotations

import gc
import json
import shlex
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ditf.calib.images import golden_pair
from ditf.calib.parity import tolerances
from ditf.calib.recipe import FEATURES, decide
from ditf.export.calibrate import (
    Observed,
    massive_channels,
    observe,
    ranges_of,
    read_calibration,
    read_extents,
    read_maxima,
)
from ditf.export.checkpoint import open_checkpoint
from ditf.export.conditions import Entry, describe, encode, trim
from ditf.export.cost import bundle_bytes, written_bytes
from ditf.export.golden import Case, Whole, golden_cases, write_golden
from ditf.export.graph.match import INPUTS, OUTPUTS, MatchGraph
from ditf.export.graph.modulation import gate_counts, scales, subnormal_weights
from ditf.export.memory import check_memory
from ditf.export.onnx_file import Progress, check_opset, write_onnx
from ditf.export.options import ExportOptions
from ditf.export.parts import Counts, parameter_parts, removed_parts
from ditf.export.plan import Plan, make_plan
from ditf.export.reference import FeatureSettings, Reference
from ditf.export.rehearsal import rehearse, rehearse_alone
from ditf.export.scratch import spilling
from ditf.export.specialise import Specialised, specialise
from ditf.export.survey import Survey, survey
from ditf.export.swap import Swap, judge_encoder
from ditf.export.trace import write_trace
from ditf.runtime import bundle as files
from ditf.runtime.conditions import key
from ditf.runtime.manifest import DYNAMIC_EXAMPLE, NAME, SCHEMA, Manifest, read_manifest, tool_versions
from ditf.runtime.staging import check_space, staged

Report = Callable[[str], None]

_STAGES = {"float32": 9, "bfloat16": 9, "float16": 10, "int8": 10}


def stage_count(options: ExportOptions) -> int:
    """Times that `export_bundle` reports a stage."""
    measured = options.precision != "float32" and options.calibration is None
    more = measured + options.surveys + (options.vae is not None)
    return _STAGES[options.precision] + more - (options.golden == "none")


@dataclass(frozen=True)
class _Observed:
    """What the unmodified model told.

    Attributes:
        document: of calibration.json.
        found: new observations, or None where a calibration was given.
        projection: P of --pca, float32 [N, C]; pca: what it keeps and costs, for the manifest.
    """

    settings: FeatureSettings
    golden: dict[str, Any]
    document: dict[str, Any]
    found: Observed | None
    projection: np.ndarray | None
    pca: dict[str, Any] | None


def export_bundle(
    options: ExportOptions,
    report: Report = lambda stage: None,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Export a checkpoint up to a layer.

    Args:
        options: what to export.
        report: called with a line for people at the start of each of `stage_count(options)` stages.
        progress: called with bytes of weights, done and in all, while many are read or written.

    Returns:
        The bundle's directory. It is written beside its place and renamed when complete.

    Raises:
        DitfError: anything wrong with the options, the checkpoint or the disk.
    """
    check_opset(options.opset)
    report(f"opening {options.model}")
    with open_checkpoint(options.model, options.revision, options.variant, options.unneeded) as checkpoint:
        plan = make_plan(options, checkpoint)
        weights = bundle_bytes(plan)
        check_space(plan.output, written_bytes(plan, weights))
        check_memory(plan)
        if options.calibration is not None:
            read_calibration(options.calibration, plan)
        swap = None
        if options.vae is not None:
            report(f"comparing the encoder of {options.vae} with the model's own")
            swap = judge_encoder(plan)
        with staged(plan.output) as folder:
            report(f"{plan.family.blocks.describe(plan.layer)}; encoding {describe(plan.entries)}")
            with torch.no_grad():
                encoded = encode(plan.entries, plan.family, checkpoint, plan.guidance)
                gc.collect()  # a pipeline refers to itself
                _write_bundle(folder, plan, encoded, swap, weights, report, progress)
            read_manifest(folder)
    return plan.output


def _write_bundle(
    folder: Path,
    plan: Plan,
    encoded: tuple[Entry, ...],
    swap: Swap | None,
    weights: int,
    report: Report,
    progress: Progress,
) -> None:
    options = plan.options
    noise = plan.noise()
    live = options.conditioning == "live"
    whole = trim(encoded, plan.family, live)
    entries = trim(encoded, plan.family, live, options.text_tokens)
    cut = plan.family.text_length(entries[0].condition) < plan.family.text_length(whole[0].condition)
    exact = Whole(whole[0], None if swap is None else swap.x_0) if cut or swap is not None else None
    if options.golden == "none":
        observed = _without_reference(plan, report)
    else:
        observed = _run_reference(folder, plan, entries, exact, noise, report)
    document = observed.document
    if plan.precision.compute != torch.float32 and observed.found is not None:
        report("measuring every value that a 16-bit graph would hold")
        with spilling(folder):
            document.update(ranges_of(plan, observed.found, entries, noise))
        gc.collect()
    if plan.precision.compute == torch.float16:
        extents = read_extents(document)
        if plan.output_dtype != torch.float16:
            extents = [extent for extent in extents if extent.kind != FEATURES]
        recipe = decide(extents)
        maxima = read_maxima(document) if options.precision == "int8" else None
        plan = replace(plan, precision=replace(plan.precision, recipe=recipe, maxima=maxima))
        report(f"recipe: {plan.precision.recipe.summary()}")
    if document:
        (folder / files.CALIBRATION).write_text(json.dumps(document, indent=1) + "\n", "utf-8")

    with spilling(folder, lambda written: progress(written, weights)):
        written = _write_graph(folder, plan, entries, noise, observed, report, progress)
    gc.collect()
    report("tracing the matcher")
    matcher = _match_onnx(plan.channels, plan.grid, plan.output_dtype, options.opset)
    (folder / files.MATCH).write_bytes(matcher)
    if options.noise == "input":
        np.save(folder / files.NOISE, noise.numpy())
    if observed.projection is not None:
        np.save(folder / files.PROJECTION, observed.projection)

    report("writing the manifest")
    first = plan.entries[0]
    manifest = Manifest(
        schema=SCHEMA,
        model={
            "id": plan.checkpoint.id,
            "revision": plan.checkpoint.revision,
            "family": plan.family.name,
            "transformer": plan.family.transformer_class,
        },
        layer=plan.layer,
        layer_name=plan.family.blocks.describe(plan.layer),
        timestep=first.timestep,
        prompt=first.prompt,
        class_label=first.class_label,
        guidance=plan.guidance,
        text_tokens=options.text_tokens if cut else None,
        seed=options.seed,
        ensemble=options.ensemble,
        noise=options.noise,
        size=plan.size,
        grid=plan.grid,
        channels=plan.channels,
        batch=options.batch,
        adaln=options.adaln,
        discard={
            "channels": list(observed.settings.channels),
            "stage": observed.settings.stage,
            "source": options.discard if isinstance(options.discard, str) else "given",
        },
        features_dtype="float16" if plan.output_dtype == torch.float16 else "float32",
        pca=observed.pca,
        vae=None if swap is None else {**plan.latents.identity(), "x_0": swap.agreement},
        precision=options.precision,
        recipe=written.recipe,
        parts=written.parts,
        removed=written.removed,
        opset=options.opset,
        conditioning=options.conditioning,
        conditions=[entry.to_json() for entry in plan.entries],
        tolerances=_tolerances(plan, written.rehearsal),
        rehearsal=written.rehearsal,
        golden=observed.golden,
        versions=tool_versions("ditf", "torch", "diffusers", "transformers", "onnx", "onnxscript"),
        command=options.command or f"ditf-export --model {shlex.quote(options.model)}",
        files={
            path.name: {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
            for path in sorted(folder.iterdir())
        },
    )
    (folder / NAME).write_text(manifest.to_json(), "utf-8")


@dataclass(frozen=True)
class _Written:
    """What features.onnx is, for the manifest; attributes as there."""

    recipe: dict[str, Any]
    parts: dict[str, Counts]
    removed: Counts
    rehearsal: dict[str, float]


def _write_graph(
    folder: Path,
    plan: Plan,
    entries: tuple[Entry, ...],
    noise: torch.Tensor,
    observed: _Observed,
    report: Report,
    progress: Progress,
) -> _Written:
    """features.onnx with its weights, trace.npz and conditions.npz."""
    report(f"reading and folding the weights of {plan.layer} blocks")
    made = specialise(plan, entries, noise, observed.settings, observed.projection)
    against = "the reference" if observed.golden else "nothing"
    report(f"rehearsing {plan.layer} blocks in {plan.precision.name} against {against}")
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
    return _Written(described, parts, removed_parts(plan, made), measured)


def _tolerances(plan: Plan, rehearsal: dict[str, float]) -> dict[str, float]:
    if not rehearsal:
        return {}
    short = plan.output_dtype == torch.float16
    return tolerances(plan.options.precision, rehearsal, plan.size[0] / plan.grid[0], short)


def _without_reference(plan: Plan, report: Report) -> _Observed:
    """What --golden none knows: what a calibration says, if one was given."""
    document = {} if plan.options.calibration is None else read_calibration(plan.options.calibration, plan)
    settings = _settings(plan, document)
    report(f"discarding channels {list(settings.channels) or 'none'}; no golden outputs")
    return _Observed(settings, {}, document, None, None, None)


def _settings(plan: Plan, document: dict[str, Any]) -> FeatureSettings:
    return FeatureSettings(
        channels=massive_channels(document) if plan.discard is None else list(plan.discard),
        stage=plan.options.discard_stage,
        adaln=plan.options.adaln,
    )


def _run_reference(
    folder: Path,
    plan: Plan,
    entries: tuple[Entry, ...],
    whole: Whole | None,
    noise: torch.Tensor,
    report: Report,
) -> _Observed:
    """Calibrate and write golden.npz with the unmodified model, which is freed on return."""
    options = plan.options
    reference = Reference(plan.checkpoint, plan.family, plan.layer, plan.size, noise, plan.latents)
    reference.under(entries[0].condition, entries[0].timestep)
    if options.calibration is not None:
        report(f"taking the calibration of {options.calibration}")
        document, found = read_calibration(options.calibration, plan), None
    else:
        report(f"calibrating on images with the unmodified {plan.family.transformer_class}")
        found = observe(plan, reference)
        document = found.document
    settings = _settings(plan, document)
    cases = [Case(index, entries[index]) for index in golden_cases(len(entries))]
    seen = Survey()
    if options.surveys:
        what = "measuring the range" if options.pca is None else f"learning {options.pca} channels"
        report(f"{what} of the unmodified model's features")
        seen = survey(plan, reference, settings, cases)
    report(f"discarding channels {list(settings.channels) or 'none'}; recording golden outputs")
    pair = golden_pair(plan.size)
    golden, cost = write_golden(
        folder / files.GOLDEN, reference, pair, settings, options.seed, cases, whole, seen.projection
    )
    pca = None if seen.document is None else {**seen.document, **cost}
    return _Observed(settings, golden, document, found, seen.projection, pca)


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
def _match_onnx(channels: int, grid: tuple[int, int], dtype: torch.dtype, opset: int) -> bytes:
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
    with tempfile.TemporaryDirectory(prefix="ditf-match-") as folder:
        path = Path(folder) / files.MATCH
        write_onnx(MatchGraph(), dict(zip(INPUTS, tensors, strict=True)), OUTPUTS, path, opset, shapes)
        return path.read_bytes()
