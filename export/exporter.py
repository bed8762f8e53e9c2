"""The export, from options to a bundle on disk: the order of the work, and nothing else."""

from __future__ import annotations

import gc
import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ditf.calib.parity import tolerances
from ditf.calib.recipe import FEATURES, decide
from ditf.export.bundle_graphs import match_onnx, write_graph
from ditf.export.checkpoints.opening import open_checkpoint
from ditf.export.checkpoints.weight_spill import spilling
from ditf.export.estimate.cost import bundle_bytes, written_bytes
from ditf.export.estimate.memory import check_memory
from ditf.export.measure.calibrate import ranges_of, read_calibration, read_extents, read_maxima
from ditf.export.measure.golden import Whole
from ditf.export.measure.run_reference import Report, run_reference, without_reference
from ditf.export.measure.vae_compatibility import Swap, judge_encoder
from ditf.export.onnx_writing.onnx_file import Progress
from ditf.export.planning.conditions import Entry, describe, encode, trim
from ditf.export.planning.options import ExportOptions, check_opset
from ditf.export.planning.plan import Plan, make_plan
from ditf.runtime.bundles import bundle as files
from ditf.runtime.bundles.manifest import MANIFEST, SCHEMA, Manifest, read_manifest, tool_versions
from ditf.runtime.bundles.staging import check_output, check_space, staged
from ditf.runtime.files.hashed import sha256

_STAGES = {"float32": 9, "bfloat16": 9, "float16": 10, "int8": 10}


def stage_count(options: ExportOptions) -> int:
    """Times that `export_bundle` reports a stage."""
    measured = options.precision != "float32" and options.calibration is None
    more = measured + options.surveys + (options.vae is not None)
    return _STAGES[options.precision] + more - (options.golden == "none")


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
        check_output(plan.output, options.inputs)
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
        observed = without_reference(plan, report)
    else:
        observed = run_reference(folder, plan, entries, exact, noise, report)
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
        written = write_graph(folder, plan, entries, noise, observed, report, progress)
    gc.collect()
    report("tracing the matcher")
    matcher = match_onnx(plan.channels, plan.grid, plan.output_dtype, options.opset)
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
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(folder.iterdir())
        },
    )
    (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")


def _tolerances(plan: Plan, rehearsal: dict[str, float]) -> dict[str, float]:
    if not rehearsal:
        return {}
    short = plan.output_dtype == torch.float16
    return tolerances(plan.options.precision, rehearsal, plan.size[0] / plan.grid[0], short)
