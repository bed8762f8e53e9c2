"""`ditf calibrate`: statistics of the unmodified model's activations, block by block, over images."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ditf.calib.blocks import BlockMeasurement, Entering, degenerate
from ditf.export.checkpoints.opening import open_checkpoint
from ditf.export.checkpoints.weight_spill import spilling
from ditf.export.measure.activation_ranges import measure_ranges
from ditf.export.measure.calibration import (
    Calibration,
    feature_settings,
    measured_for,
)
from ditf.export.measure.images import CalibrationImages, image_names
from ditf.export.measure.reference_model import Reference
from ditf.export.planning.conditions import Entry, encode, trim
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import Plan, make_plan
from ditf.export.planning.stages import Report, Stage, run_stages
from ditf.runtime.bundles.manifest import tool_versions


def calibration_stage_count(options: ExportOptions) -> int:
    """How often `calibrate` reports a stage.

    Raises:
        InputError: the folder of calibration images is no directory, or has no images.
    """
    return len(_CalibrationRun(options).stages())


def calibrate(
    options: ExportOptions, report: Report = lambda line: None, folder: Path | None = None
) -> Calibration:
    """Run the unmodified model over images and measure what enters blocks 0..k, and every value's range.

    Args:
        options: as for an export; `calibration_images` is a folder, the built-in pictures by default.
        report: called with a line for people at the start of each stage; every image is one.
        folder: has room for the graph's weights in float32; the system's temporary folder by default.

    Raises:
        DitfError: anything wrong with the options, the checkpoint or the images; or activations that are NaN
            or infinite, with the first block that has them.
    """
    with open_checkpoint(**options.opened) as checkpoint:
        run = _CalibrationRun(options, folder)
        run.plan = make_plan(options, checkpoint)
        run_stages(run.stages(), report)
        return run.calibration


class _CalibrationRun:
    """What one `calibrate` has found so far; each stage reads what earlier ones have set."""

    plan: Plan
    images: CalibrationImages
    entries: tuple[Entry, ...]
    noise: torch.Tensor
    observer: BlockObserver
    calibration: Calibration

    def __init__(self, options: ExportOptions, folder: Path | None = None) -> None:
        self._options = options
        self._folder = folder or Path(tempfile.gettempdir())

    def stages(self) -> list[Stage]:
        names = image_names(self._options.calibration_images)
        line = f"image {{}} of {len(names)}: {{}}".format
        return [
            Stage(self._loading_line, self._load),
            *(
                Stage(partial(line, index + 1, name), partial(self._observe, index))
                for index, name in enumerate(names)
            ),
            Stage(lambda: "measuring every value that float16 would hold", self._measure_ranges),
        ]

    def _loading_line(self) -> str:
        return f"{self.plan.family.blocks.describe(self.plan.layer)}; loading the unmodified model"

    def _load(self) -> None:
        plan = self.plan
        self.images = CalibrationImages(plan.options.calibration_images, plan.size)
        with torch.no_grad():
            encoded = encode(plan.entries, plan.family, plan.checkpoint, plan.guidance)
        live = plan.options.conditioning == "live"
        self.entries = trim(encoded, plan.family, live, plan.options.text_tokens)
        self.noise = plan.noise()
        reference = Reference(plan.checkpoint, plan.family, plan.layer, plan.size, self.noise, plan.latents)
        self.observer = BlockObserver(
            plan, reference.under(self.entries[0].condition, self.entries[0].timestep)
        )

    def _observe(self, index: int) -> None:
        self.observer.add(self.images.arrays[index])

    def _measure_ranges(self) -> None:
        observed = self.observer.finish(self.images)
        del self.observer  # frees the unmodified model
        with spilling(self._folder):
            self.calibration = measure_calibration(self.plan, observed, self.entries, self.noise, self.images)


@dataclass(frozen=True)
class ObservedBlocks:
    """What was seen of the unmodified model's blocks.

    Attributes:
        calibration: without ranges.
        hidden_states: [N, C] float32, what enters block k on the first image.
    """

    calibration: Calibration
    hidden_states: np.ndarray


def measure_calibration(
    plan: Plan,
    observed: ObservedBlocks,
    entries: Sequence[Entry],
    noise: torch.Tensor,
    images: CalibrationImages,
) -> Calibration:
    """The calibration with the ranges of every value of the plan's graph, measured on the same images.

    Raises:
        GateFailed: as `measure_ranges`.
    """
    settings = feature_settings(plan, observed.calibration)
    extents, maxima = measure_ranges(plan, entries, noise, images.arrays, observed.hidden_states, settings)
    return observed.calibration.with_ranges(settings, extents, maxima)


def observe_blocks(plan: Plan, reference: Reference, images: CalibrationImages) -> ObservedBlocks:
    """Run a reference, under the condition that it is set to, over all calibration images."""
    observer = BlockObserver(plan, reference)
    for image in images.arrays:
        observer.add(image)
    return observer.finish(images)


class BlockObserver:
    """Collects statistics of what enters each block of a reference, one image at a time."""

    def __init__(self, plan: Plan, reference: Reference) -> None:
        blocks = plan.family.blocks
        self._plan = plan
        self._reference = reference
        self._measurement = BlockMeasurement(
            [".".join(map(str, blocks.locate(index))) for index in range(plan.layer + 1)],
            centred=not plan.family.rms_norms,
        )
        self._hidden_states: np.ndarray | None = None

    def add(self, image: np.ndarray) -> None:
        """Run one image, uint8 [H, W, 3] at the plan's size."""
        self._reference.trace(image, self._visit)

    def _visit(self, layer: int, entering: Entering) -> None:
        self._measurement.add(layer, entering)
        if layer == self._plan.layer and self._hidden_states is None:
            self._hidden_states = entering.image.copy()

    def finish(self, images: CalibrationImages) -> ObservedBlocks:
        """The statistics over the images that were added.

        Args:
            images: all of them, for the document.

        Raises:
            InputError: no image was added.
        """
        plan = self._plan
        published = plan.family.defaults.channels
        document = {
            "model": str(plan.checkpoint.transformer or plan.checkpoint.id),
            "base": None if plan.checkpoint.transformer is None else plan.checkpoint.id,
            "revision": plan.checkpoint.revision,
            **measured_for(plan),
            "images": {
                "count": len(images.arrays),
                "source": images.source,
                "names": image_names(images.folder),
                "warning": degenerate(images.arrays),
            },
            "published_channels": None if published is None else list(published),
            "layers": [
                {"module": plan.family.block_name(layer.layer), **layer.to_json()}
                for layer in self._measurement.finish()
            ],
            "versions": tool_versions("ditf", "torch", "diffusers", "transformers"),
        }
        assert self._hidden_states is not None
        return ObservedBlocks(Calibration(document), self._hidden_states)
