"""The export, from options to a bundle on disk: the order of the work, and nothing else."""

from __future__ import annotations

import gc
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ditf.calib.channels import ChannelStatistics, measure
from ditf.calib.images import golden_pair, procedural_images
from ditf.calib.parity import tolerances
from ditf.export.checkpoint import DEMO, Checkpoint, open_checkpoint
from ditf.export.demo import DEMO_DEFAULTS
from ditf.export.families import family_of
from ditf.export.families.base import Condition, Family, TrunkSpec
from ditf.export.golden import write_golden
from ditf.export.graph.encoder import KLEncoder, PixelEncoder
from ditf.export.graph.features import FeaturesGraph
from ditf.export.graph.match import INPUTS, OUTPUTS, MatchGraph
from ditf.export.graph.precision import FLOAT16, FLOAT32, Precision
from ditf.export.latents import LatentSpace
from ditf.export.noise import NoiseLevel, draw_noise, noise_level
from ditf.export.onnx_file import check_opset, write_onnx
from ditf.export.options import ExportOptions
from ditf.export.parts import parameter_parts
from ditf.export.reference import FeatureSettings, Reference
from ditf.export.rehearsal import rehearse
from ditf.export.staging import staged
from ditf.runtime import bundle as files
from ditf.runtime.errors import InputError
from ditf.runtime.images import fit_image, list_images, open_image
from ditf.runtime.manifest import NAME, SCHEMA, Manifest, read_manifest, tool_versions

Report = Callable[[str], None]

STAGES = 8
"""Times that `export_bundle` reports a stage."""


@dataclass(frozen=True)
class _Plan:
    """Everything decided before a weight is read."""

    options: ExportOptions
    checkpoint: Checkpoint
    family: Family
    latents: LatentSpace
    layer: int
    timestep: int
    prompt: str | None
    size: tuple[int, int]
    level: NoiseLevel
    precision: Precision

    @property
    def grid(self) -> tuple[int, int]:
        cell = self.latents.stride * self.family.patch_size
        return (self.size[0] // cell, self.size[1] // cell)

    @property
    def output(self) -> Path:
        if self.options.output is not None:
            return self.options.output
        name = Path(self.options.model.rstrip("/")).name
        suffix = "fp16" if self.options.fp16 else "fp32"
        return Path("bundles") / f"{name}-l{self.layer}-{suffix}"


def export_bundle(options: ExportOptions, report: Report = lambda stage: None) -> Path:
    """Export a checkpoint up to a layer.

    Args:
        options: what to export.
        report: called with a line for people at the start of each of `STAGES` stages.

    Returns:
        The bundle's directory. It is written beside its place and renamed when complete.

    Raises:
        DitfError: anything wrong with the options, the checkpoint or the disk.
    """
    check_opset(options.opset)
    report(f"opening {options.model}")
    with open_checkpoint(options.model) as checkpoint:
        plan = _plan(options, checkpoint)
        with staged(plan.output) as folder:
            report(f"{plan.family.blocks.describe(plan.layer)}; encoding the condition")
            with torch.no_grad():
                condition = plan.family.encode_condition(checkpoint, plan.prompt, options.class_label)
                _write_bundle(folder, plan, condition, report)
            read_manifest(folder)
    return plan.output


def _plan(options: ExportOptions, checkpoint: Checkpoint) -> _Plan:
    family = family_of(checkpoint)
    if options.prompt is not None and not family.takes_prompt:
        raise InputError(f"{family.name} is class-conditional and takes no prompt", "use --class-label")
    if options.class_label is not None and family.takes_prompt:
        raise InputError(f"{family.name} is text-conditional and takes no class label", "use --prompt")
    if options.batch != "dynamic" and options.batch < 1:
        raise InputError(f"batch {options.batch} is out of range", "choose 1 or more, or dynamic")
    defaults = DEMO_DEFAULTS if options.model == DEMO else family.defaults
    middle = family.blocks.count // 2
    default_layer = middle if defaults.layer is None else defaults.layer
    layer = family.blocks.resolve(options.layer or str(default_layer))
    _check_discard(options, family.channels)
    if options.calibration_images is not None:
        list_images(options.calibration_images)
    timestep = defaults.timestep if options.timestep is None else options.timestep
    latents = LatentSpace.of(checkpoint)
    return _Plan(
        options=options,
        checkpoint=checkpoint,
        family=family,
        latents=latents,
        layer=layer,
        timestep=timestep,
        prompt=options.prompt if options.prompt is not None else defaults.prompt,
        size=_check_size(options.size, family, latents),
        level=noise_level(checkpoint.config("scheduler"), timestep),
        precision=FLOAT16 if options.fp16 else FLOAT32,
    )


def _check_discard(options: ExportOptions, channels: int) -> None:
    if not isinstance(options.discard, str):
        for channel in options.discard:
            if not 0 <= channel < channels:
                raise InputError(f"--discard {channel} is out of range", f"channels are 0..{channels - 1}")


def _check_size(size: tuple[int, int] | None, family: Family, latents: LatentSpace) -> tuple[int, int]:
    cell = latents.stride * family.patch_size
    if size is None:
        side = family.sample_size * latents.stride
        return (side, side)
    if all(length >= cell and length % cell == 0 for length in size):
        return size
    below = [max(cell, length // cell * cell) for length in size]
    above = [-(-max(length, 1) // cell) * cell for length in size]
    raise InputError(
        f"size {size[0]}x{size[1]} is not a multiple of {cell} (patch {family.patch_size} x VAE stride"
        f" {latents.stride})",
        f"the nearest are {below[0]}x{below[1]} and {above[0]}x{above[1]}",
    )


def _write_bundle(folder: Path, plan: _Plan, condition: Condition, report: Report) -> None:
    options = plan.options
    shape = (plan.latents.channels, *(length // plan.latents.stride for length in plan.size))
    noise = draw_noise(options.ensemble, shape, options.seed)  # type: ignore[arg-type]
    settings, golden = _run_reference(folder, plan, condition, noise, report)

    graph = _features_graph(plan, condition, noise, settings)
    report(f"rehearsing {plan.layer} blocks in {plan.precision.name} against the reference")
    measured = rehearse(graph, noise, folder / files.GOLDEN, options.precision)
    report(f"tracing {plan.layer} blocks in {plan.precision.name}")
    parts = parameter_parts(graph)
    channels = len(graph.trunk.output_norm.weight)
    _write_features(folder / files.FEATURES, plan, graph, noise)
    del graph
    gc.collect()
    report("tracing the matcher")
    _write_match(folder / files.MATCH, plan, channels)
    if options.noise == "input":
        np.save(folder / files.NOISE, noise.numpy())

    report("writing the manifest")
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
        timestep=plan.timestep,
        prompt=plan.prompt,
        class_label=options.class_label,
        seed=options.seed,
        ensemble=options.ensemble,
        noise=options.noise,
        size=plan.size,
        grid=plan.grid,
        channels=channels,
        batch=options.batch,
        adaln=options.adaln,
        discard={
            "channels": list(settings.channels),
            "stage": settings.stage,
            "source": options.discard if isinstance(options.discard, str) else "given",
        },
        precision=options.precision,
        recipe=plan.precision.recipe,
        parts=parts,
        opset=options.opset,
        conditioning="bake",
        tolerances=tolerances(options.precision, measured),
        rehearsal=measured,
        golden=golden,
        versions=tool_versions("ditf", "torch", "diffusers", "transformers", "onnx", "onnxscript"),
        command=options.command or f"ditf-export --model {shlex.quote(options.model)}",
        files={
            path.name: {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
            for path in sorted(folder.iterdir())
        },
    )
    (folder / NAME).write_text(manifest.to_json(), "utf-8")


def _run_reference(
    folder: Path, plan: _Plan, condition: Condition, noise: torch.Tensor, report: Report
) -> tuple[FeatureSettings, dict[str, Any]]:
    """Calibrate and write golden.npz with the unmodified model, which is freed on return."""
    options = plan.options
    images = _calibration_images(options.calibration_images, plan.size)
    report(f"calibrating on {len(images)} images with the unmodified {plan.family.transformer_class}")
    reference = Reference(
        plan.checkpoint, plan.family, plan.layer, condition, plan.timestep, plan.size, noise
    )
    statistics = measure(reference, images)
    settings = FeatureSettings(
        channels=_discarded(options, statistics), stage=options.discard_stage, adaln=options.adaln
    )
    calibration = {
        "schema": SCHEMA,
        "model": plan.checkpoint.id,
        "layer": plan.layer,
        "timestep": plan.timestep,
        "size": plan.size,
        "image_source": str(options.calibration_images or "built-in procedural pictures"),
        "hidden_states": statistics.to_json(),
    }
    (folder / files.CALIBRATION).write_text(json.dumps(calibration, indent=1) + "\n", "utf-8")
    report(f"discarding channels {list(settings.channels) or 'none'}; recording golden outputs")
    golden = write_golden(folder / files.GOLDEN, reference, golden_pair(plan.size), settings, options.seed)
    return settings, golden


def _calibration_images(folder: Path | None, size: tuple[int, int]) -> list[np.ndarray]:
    if folder is None:
        return procedural_images(size)
    return [fit_image(open_image(path), size)[0] for path in list_images(folder)]


def _discarded(options: ExportOptions, statistics: ChannelStatistics) -> list[int]:
    if options.discard == "auto":
        return statistics.massive
    if options.discard == "none":
        return []
    return sorted(set(options.discard))


def _features_graph(
    plan: _Plan, condition: Condition, noise: torch.Tensor, settings: FeatureSettings
) -> FeaturesGraph:
    weights = plan.checkpoint.weights("transformer")
    spec = TrunkSpec(plan.layer, condition, plan.timestep, plan.size, plan.grid, plan.precision)
    trunk = plan.family.build_trunk(weights, spec)
    latents = plan.latents
    encoder = (
        PixelEncoder()
        if latents.vae is None
        else KLEncoder(latents.load_vae(), latents.shift, latents.scale, plan.precision)
    )
    # Without the norm the hidden states keep their massive values, which float16 may not hold.
    output = plan.precision.output if settings.adaln else torch.float32
    bake = plan.options.noise == "baked"
    return FeaturesGraph(encoder, trunk, plan.level, noise, bake, settings, plan.grid, output)


def _write_features(path: Path, plan: _Plan, graph: FeaturesGraph, noise: torch.Tensor) -> None:
    # torch.export would specialise a dynamic dimension of 1.
    batch = 2 if plan.options.batch == "dynamic" else plan.options.batch
    inputs = {"image": torch.zeros((batch, *plan.size, 3), dtype=torch.uint8)}
    if plan.options.noise == "input":
        inputs["noise"] = noise
    dynamic: dict[str, Any] | None = None
    if plan.options.batch == "dynamic":
        dynamic = {name: {} for name in inputs} | {"image": {0: torch.export.Dim("batch")}}
    write_onnx(graph, inputs, ["features"], path, plan.options.opset, dynamic)


def _write_match(path: Path, plan: _Plan, channels: int) -> None:
    h, w = plan.grid
    dtype = plan.precision.output if plan.options.adaln else torch.float32
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
    write_onnx(
        MatchGraph(), dict(zip(INPUTS, tensors, strict=True)), OUTPUTS, path, plan.options.opset, shapes
    )
