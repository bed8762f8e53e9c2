"""Statistics of the unmodified model's features: the projection that `--pca` learns, and float16's margin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ditf.calib.projection import SecondMoment
from ditf.calib.recipe import check_features
from ditf.export.graph.features import FeatureSettings
from ditf.export.measure.golden import GoldenCase
from ditf.export.measure.images import CalibrationImages
from ditf.export.measure.reference_model import Reference
from ditf.export.planning.plan import Plan
from ditf.runtime.errors import InputError


@dataclass(frozen=True)
class FeatureStatistics:
    """What was learned from the features.

    Attributes:
        projection: P of --pca, float32 [N, C], or None without --pca.
        manifest: what the manifest says about the projection, or None.
    """

    projection: np.ndarray | None = None
    manifest: dict[str, Any] | None = None


def measure_features(
    plan: Plan,
    reference: Reference,
    settings: FeatureSettings,
    cases: Sequence[GoldenCase],
    images: CalibrationImages,
) -> FeatureStatistics:
    """Compute the unmodified model's features of the calibration images, and learn the projection from them.

    Each image is run under one condition, in turns. Where there are more conditions than images, images are
    used again.

    Raises:
        InputError: the features are not finite, or too large for the margin that float16 features keep.
    """
    moment = None if plan.options.pca is None else SecondMoment(plan.family.channels)
    largest = 0.0
    count = len(images.arrays)
    for number in range(max(count, len(cases))):
        entry = cases[number % len(cases)].entry
        reference.under(entry.condition, entry.timestep)
        hidden_states = reference.hidden_states(images.arrays[number % count])
        features = reference.features(hidden_states, settings)
        if not np.isfinite(features).all():
            raise InputError(
                "the features are not finite on the calibration images", "check the checkpoint's weights"
            )
        largest = max(largest, float(np.abs(features).max()))
        if moment is not None:
            moment.add(features)
    if plan.output_dtype == torch.float16:
        check_features(largest if moment is None else moment.largest)
    if moment is None:
        return FeatureStatistics()
    assert plan.options.pca is not None
    learned = moment.projection(plan.options.pca)
    manifest = {
        "of": plan.family.channels,
        "images": count,
        "source": images.source,
        "tokens": moment.tokens,
        "energy": learned.energy,
    }
    return FeatureStatistics(learned.matrix, manifest)
