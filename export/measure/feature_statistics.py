"""Looking at the features themselves before the graph is made: what `--pca` learns, and float16's margin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ditf.calib.projection import SecondMoment
from ditf.calib.recipe import check_features
from ditf.export.graph.features import FeatureSettings
from ditf.export.measure.calibrate import calibration_images
from ditf.export.measure.golden import Case
from ditf.export.measure.reference_model import Reference
from ditf.export.planning.plan import Plan
from ditf.runtime.errors import InputError


@dataclass(frozen=True)
class Survey:
    """What was found.

    Attributes:
        projection: P of --pca, float32 [N, C].
        document: of the projection, for the manifest.
    """

    projection: np.ndarray | None = None
    document: dict[str, Any] | None = None


def survey(plan: Plan, reference: Reference, settings: FeatureSettings, cases: Sequence[Case]) -> Survey:
    """Run the unmodified model over the calibration images.

    Each image is seen under one condition, in turns; where there are more conditions than images, images
    are seen again.

    Raises:
        InputError: features that are not finite, or without margin where they are to be float16.
    """
    _, images = calibration_images(plan.options.calibration_images, plan.size)
    moment = None if plan.options.pca is None else SecondMoment(plan.family.channels)
    largest = 0.0
    for number in range(max(len(images), len(cases))):
        entry = cases[number % len(cases)].entry
        reference.under(entry.condition, entry.timestep)
        hidden_states = reference.hidden_states(images[number % len(images)])
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
        return Survey()
    assert plan.options.pca is not None
    learned = moment.projection(plan.options.pca)
    document = {
        "of": plan.family.channels,
        "images": len(images),
        "source": str(plan.options.calibration_images or "built-in procedural pictures"),
        "tokens": moment.tokens,
        "energy": learned.energy,
    }
    return Survey(learned.matrix, document)
