"""The export, from options to a bundle on disk: the order of the work, and nothing else."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ditf.calib.images import golden_pair
from ditf.calib.memory import available_bytes
from ditf.calib.recipe import FEATURES, Recipe, choose_recipe
from ditf.export.assemble.features_graph import AssembledGraph, assemble
from ditf.export.assemble.lora_records import describe_loras
from ditf.export.bundle_graphs import FeaturesRecord, match_onnx, write_features
from ditf.export.bundle_manifest import make_manifest
from ditf.export.checkpoints.formats.lora.weights import changes_text
from ditf.export.checkpoints.opening import open_checkpoint
from ditf.export.checkpoints.weight_spill import spilling
from ditf.export.estimate.estimate import Estimate
from ditf.export.graph.features import FeatureSettings
from ditf.export.measure.backend_parity import fits_on_cpu, measure_on_cpu, runs_on_cpu
from ditf.export.measure.calibrate import ObservedBlocks, measure_calibration, observe_blocks
from ditf.export.measure.calibration import (
    Calibration,
    check_feature_range,
    feature_settings,
    read_calibration,
)
from ditf.export.measure.feature_statistics import FeatureStatistics, measure_features
from ditf.export.measure.golden import (
    GoldenCase,
    GoldenOutputs,
    Judge,
    Streamed,
    golden_cases,
    golden_outputs,
)
from ditf.export.measure.images import CalibrationImages
from ditf.export.measure.oracle.choice import PipelineFails, why_not
from ditf.export.measure.oracle.oracle import Oracle
from ditf.export.measure.oracle.own_pipeline import OwnPipeline
from ditf.export.measure.reference_model import Reference
from ditf.export.measure.vae_compatibility import VaeComparison, compare_vaes
from ditf.export.onnx_writing.emulation import (
    ExactFeatures,
    check_against_golden,
    check_finite,
    exact_features,
)
from ditf.export.onnx_writing.onnx_file import Progress
from ditf.export.planning.conditions import Entry, describe, encode, trim, warnings_of
from ditf.export.planning.export_options import ExportOptions, check_opset
from ditf.export.planning.plan import Plan, make_plan
from ditf.export.planning.stages import Report, Stage, Warn, run_stages
from ditf.runtime.bundles import bundle as files
from ditf.runtime.bundles.manifest import MANIFEST, read_manifest
from ditf.runtime.bundles.staging import check_output, check_space, staged
from ditf.runtime.files.json_file import json_text


def stage_count(options: ExportOptions) -> int:
    """How often `export_bundle` reports a stage."""
    return len(_Export(options).stages())


def export_bundle(
    options: ExportOptions,
    report: Report = lambda stage: None,
    progress: Progress = lambda done, total: None,
    warn: Warn = lambda line: None,
) -> Path:
    """Export a checkpoint up to a layer.

    Args:
        options: what to export.
        report: called with a line for people at the start of each of `stage_count(options)` stages.
        progress: called with bytes of weights, done and in all, while many are read or written.
        warn: called with a line for people for each prompt of which a text encoder reads only the start.

    Returns:
        The bundle's directory. It is written beside its place and renamed when complete.

    Raises:
        DitfError: anything wrong with the options, the checkpoint or the disk.
    """
    check_opset(options.opset)
    export = _Export(options, progress, warn)
    with export.resources, torch.no_grad():
        run_stages(export.stages(), report)
    return export.plan.output


class _Export:
    """One export. Each stage reads what earlier stages have set, and drops what no later stage needs."""

    plan: Plan
    bundle_bytes: int
    oracle_bytes: int
    images: CalibrationImages
    golden_images: np.ndarray
    folder: Path
    noise: torch.Tensor
    all_text: tuple[Entry, ...]
    entries: tuple[Entry, ...]
    observed: ObservedBlocks
    made: AssembledGraph
    features: FeaturesRecord

    def __init__(
        self,
        options: ExportOptions,
        progress: Progress = lambda done, total: None,
        warn: Warn = lambda line: None,
    ) -> None:
        self.options = options
        self.progress = progress
        self.warn = warn
        self.resources = ExitStack()  # what is open until the export ends: the checkpoint and the bundle
        self.spill = self.resources.enter_context(ExitStack())  # the file that the graph's weights are in
        self.calibration: Calibration | None = None
        self.vaes: VaeComparison | None = None
        self.statistics = FeatureStatistics()
        self.golden: GoldenOutputs | None = None
        self.emulated: dict[str, float] = {}
        self.exact: ExactFeatures | None = None

    def stages(self) -> list[Stage]:
        """The stages that these options ask for, in order."""
        options = self.options
        reference = options.golden == "reference"
        calibrates = reference and options.calibration is None
        measures = options.precision != "float32" and calibrates
        chooses = options.precision in ("float16", "int8")
        against = " against the reference" if reference else ""
        stages = [
            Stage(lambda: f"opening {options.model}", self.open),
            Stage(
                lambda: f"comparing the encoder of {options.vae} with the model's own",
                self.compare_vaes,
                runs=options.vae is not None,
            ),
            Stage(lambda: f"{self.layer_name}; encoding {describe(self.plan.entries)}", self.encode),
            Stage(
                lambda: f"calibrating on images with the unmodified {self.plan.family.transformer_class}",
                self.calibrate,
                runs=calibrates,
            ),
            Stage(
                lambda: f"taking the calibration of {options.calibration}",
                runs=reference and not calibrates,
            ),
            Stage(
                lambda: self.looking_at_features,
                self.measure_features,
                runs=reference and options.measures_features,
            ),
            Stage(
                lambda: f"{self.discarding}; recording golden outputs {self.judged}",
                self.record_golden,
                runs=reference,
            ),
            Stage(lambda: f"{self.discarding}; no golden outputs", runs=not reference),
            Stage(
                lambda: "measuring every value that a 16-bit graph would hold",
                self.measure_ranges,
                runs=measures,
            ),
            Stage(lambda: f"recipe: {self.recipe.summary()}", self.take_recipe, runs=chooses),
            Stage(lambda: f"reading and folding the weights of {self.blocks}", self.fold_weights),
            Stage(lambda: describe_loras(self.plan, self.made), runs=bool(options.lora)),
            Stage(lambda: f"rehearsing {self.blocks} in {options.precision}{against}", self.emulate),
            Stage(lambda: f"tracing {self.blocks} in {options.precision}", self.trace),
            Stage(lambda: "tracing the matcher", self.trace_matcher),
            Stage(lambda: "writing the manifest", self.write_manifest),
            Stage(
                lambda: self.running_the_file,
                self.measure_on_cpu,
                runs=reference and runs_on_cpu(options.precision),
            ),
        ]
        return [stage for stage in stages if stage.runs]

    def open(self) -> None:
        options = self.options
        opened = open_checkpoint(**options.opened)
        self.plan = plan = make_plan(options, self.resources.enter_context(opened))
        for line in warnings_of(plan.entries):
            self.warn(line)
        for lora in plan.checkpoint.loras if options.prompt_embeds else ():
            if changes_text(lora, plan.checkpoint.text_encoders()):
                self.warn(
                    f"warning: {lora.path.name} changes text encoders, and --prompt-embeds is taken as it is:"
                    " make it with the same --lora"
                )
        check_output(plan.output, options.inputs)
        estimate = Estimate(plan)
        check_space(plan.output, estimate.written_bytes)
        estimate.check_memory()
        self.bundle_bytes, self.oracle_bytes = estimate.bundle_bytes, estimate.oracle_bytes
        if options.calibration is not None:
            self.calibration = read_calibration(options.calibration, plan)
        self.images = CalibrationImages(options.calibration_images, plan.size)
        self.golden_images = golden_pair(plan.size)

    def compare_vaes(self) -> None:
        self.vaes = compare_vaes(self.plan, self.golden_images, self.images)

    def encode(self) -> None:
        plan, live = self.plan, self.options.conditioning == "live"
        self.folder = self.resources.enter_context(staged(plan.output))
        encoded = encode(plan.entries, plan.family, plan.checkpoint, plan.guidance)
        gc.collect()  # a pipeline refers to itself
        self.all_text = trim(encoded, plan.family, live)
        self.entries = trim(encoded, plan.family, live, self.options.text_tokens)
        self.noise = plan.noise()

    def calibrate(self) -> None:
        first = self.entries[0]
        reference = self.reference.under(first.condition, first.timestep)
        self.observed = observe_blocks(self.plan, reference, self.images)
        self.calibration = self.observed.calibration

    def measure_features(self) -> None:
        if self.range_is_calibrated:
            return  # and was checked when the calibration was read
        self.statistics = measure_features(self.plan, self.reference, self.settings, self.cases, self.images)

    def record_golden(self) -> None:
        reason = self.not_independent
        if reason is None:
            self.free_reference()
            try:
                own = OwnPipeline(self.plan, self.entries, chats_rendered=True)  # by `encode`
                self.golden = self.golden_by(Oracle(self.plan, own))
            except PipelineFails as error:
                reason = error.problem
                self.warn(f"golden outputs are those of the streamed model: {reason}")
        if reason is not None:
            own_x_0 = None if self.vaes is None else self.vaes.x_0
            self.golden = self.golden_by(Streamed(self.reference, reason, own_x_0))
        assert self.golden is not None
        np.savez_compressed(self.folder / files.GOLDEN, allow_pickle=False, **self.golden.arrays)
        self.free_reference()

    def golden_by(self, judge: Judge) -> GoldenOutputs:
        whole = self.all_text[0] if self.text_is_cut or self.vaes is not None else None
        return golden_outputs(
            judge,
            self.golden_images,
            self.settings,
            self.options.seed,
            self.cases,
            whole,
            self.statistics.projection,
        )

    def free_reference(self) -> None:
        self.__dict__.pop("reference", None)

    def measure_ranges(self) -> None:
        with spilling(self.folder):
            self.calibration = measure_calibration(
                self.plan, self.observed, self.entries, self.noise, self.images
            )
        check_feature_range(self.plan, self.calibration)
        gc.collect()

    def take_recipe(self) -> None:
        maxima = self.calibration.maxima if self.calibration and self.options.precision == "int8" else None
        precision = replace(self.plan.precision, recipe=self.recipe, maxima=maxima)
        self.plan = replace(self.plan, precision=precision)

    def fold_weights(self) -> None:
        del self.images  # a folder of them may be large
        folding = spilling(self.folder, lambda written: self.progress(written, self.bundle_bytes))
        self.spill.enter_context(folding)
        self.made = assemble(self.plan, self.entries, self.noise, self.settings, self.statistics.projection)

    def emulate(self) -> None:
        made, precision = self.made, self.options.precision
        if self.golden is None:
            check_finite(made.graph, made.feeds[0], self.golden_images[0], precision)
        else:
            self.emulated = check_against_golden(made.graph, made.feeds, self.golden.arrays, precision)
            if precision == "float16":
                self.exact = exact_features(made.graph, made.feeds[0], self.golden.arrays)

    def trace(self) -> None:
        self.features = write_features(
            self.folder, self.plan, self.made, self.golden, self.exact, self.progress
        )
        del self.made
        self.spill.close()
        gc.collect()

    def trace_matcher(self) -> None:
        plan = self.plan
        matcher = match_onnx(plan.channels, plan.grid, plan.output_dtype, plan.opset)
        (self.folder / files.MATCH).write_bytes(matcher)

    def write_manifest(self) -> None:
        folder = self.folder
        if self.calibration is not None:
            document = json_text(self.calibration.to_json(), indent=1)
            (folder / files.CALIBRATION).write_text(document, "utf-8")
        if self.options.noise == "input":
            np.save(folder / files.NOISE, self.noise.numpy())
        if self.statistics.projection is not None:
            np.save(folder / files.PROJECTION, self.statistics.projection)
        manifest = make_manifest(
            folder,
            self.plan,
            self.settings,
            self.features,
            self.golden,
            self.emulated,
            self.statistics,
            self.vaes,
            self.text_is_cut,
        )
        (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
        read_manifest(folder)

    def measure_on_cpu(self) -> None:
        if fits_on_cpu(self.folder):
            manifest = replace(read_manifest(self.folder), measured=measure_on_cpu(self.folder))
            (self.folder / MANIFEST).write_text(manifest.to_json(), "utf-8")

    @cached_property
    def reference(self) -> Reference:
        """The unmodified transformer, loaded when a stage first asks for it."""
        plan = self.plan
        return Reference(plan.checkpoint, plan.family, plan.layer, plan.size, self.noise, plan.latents)

    @cached_property
    def not_independent(self) -> str | None:
        """Why the checkpoint's own pipeline makes no golden outputs; None where it does."""
        return why_not(self.plan, self.oracle_bytes, available_bytes())

    @property
    def judged(self) -> str:
        if self.not_independent is None:
            return "with the checkpoint's own pipeline"
        return f"with the streamed model ({self.not_independent})"

    @property
    def settings(self) -> FeatureSettings:
        """The feature, once its channels are known."""
        return feature_settings(self.plan, self.calibration)

    @property
    def cases(self) -> list[GoldenCase]:
        return [GoldenCase(index, self.entries[index]) for index in golden_cases(len(self.entries))]

    @property
    def text_is_cut(self) -> bool:
        """Whether --text-tokens cuts text that matters."""
        kept, given = (
            self.plan.family.text_length(entries[0].condition) for entries in (self.entries, self.all_text)
        )
        return kept < given

    @cached_property
    def recipe(self) -> Recipe:
        """What the measured ranges ask for."""
        assert self.calibration is not None
        assert self.calibration.extents is not None
        return choose_recipe([extent for extent in self.calibration.extents if extent.kind != FEATURES])

    @property
    def range_is_calibrated(self) -> bool:
        """Whether the given calibration has all that is to be known of the features."""
        if self.calibration is None or self.options.calibration is None or self.options.pca is not None:
            return False
        return self.calibration.range_of(self.settings) is not None

    @property
    def looking_at_features(self) -> str:
        if self.range_is_calibrated:
            return "the calibration has the range of the features"
        what = "measuring the range" if self.options.pca is None else f"learning {self.options.pca} channels"
        return f"{what} of the unmodified model's features"

    @property
    def running_the_file(self) -> str:
        if fits_on_cpu(self.folder):
            return "running features.onnx on ONNX Runtime"
        return "features.onnx is too large for ONNX Runtime on this machine: its own parity is not measured"

    @property
    def layer_name(self) -> str:
        return self.plan.family.blocks.describe(self.plan.layer)

    @property
    def blocks(self) -> str:
        return f"{self.plan.layer} blocks"

    @property
    def discarding(self) -> str:
        return f"discarding channels {list(self.settings.channels) or 'none'}"
