"""What the unmodified model says of a plan: massive channels, golden outputs, the projection of --pca."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ditf.calib.images import golden_pair
from ditf.export.graph.features import FeatureSettings
from ditf.export.measure.calibrate import Observed, massive_channels, observe, read_calibration
from ditf.export.measure.feature_statistics import Survey, survey
from ditf.export.measure.golden import Case, Whole, golden_cases, write_golden
from ditf.export.measure.reference_model import Reference
from ditf.export.planning.conditions import Entry
from ditf.export.planning.plan import Plan
from ditf.runtime.bundles import bundle as files

Report = Callable[[str], None]
"""Takes a line for people at the start of each stage."""


@dataclass(frozen=True)
class Observation:
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


def run_reference(
    folder: Path,
    plan: Plan,
    entries: tuple[Entry, ...],
    whole: Whole | None,
    noise: torch.Tensor,
    report: Report,
) -> Observation:
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
    return Observation(settings, golden, document, found, seen.projection, pca)


def without_reference(plan: Plan, report: Report) -> Observation:
    """What --golden none knows: what a calibration says, if one was given."""
    document = {} if plan.options.calibration is None else read_calibration(plan.options.calibration, plan)
    settings = _settings(plan, document)
    report(f"discarding channels {list(settings.channels) or 'none'}; no golden outputs")
    return Observation(settings, {}, document, None, None, None)


def _settings(plan: Plan, document: dict[str, Any]) -> FeatureSettings:
    return FeatureSettings(
        channels=massive_channels(document) if plan.discard is None else list(plan.discard),
        stage=plan.options.discard_stage,
        adaln=plan.options.adaln,
    )
