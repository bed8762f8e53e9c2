"""calibration.json: what was measured of the unmodified model, and the settings that it was measured for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ditf.calib.blocks import mismatches
from ditf.calib.recipe import FEATURES, Extent, check_features
from ditf.export.graph.features import FeatureSettings
from ditf.export.planning.plan import Plan
from ditf.runtime.errors import InputError
from ditf.runtime.files.json_file import read_json

CALIBRATION_SCHEMA = 2
"""Of what is measured in a graph. In 1, the values between the heads had their biases."""

_LARGEST = 128 << 20  # bytes of a calibration.json that is read


@dataclass(frozen=True)
class Calibration:
    """Statistics of the unmodified model's activations over the calibration images.

    Attributes:
        document: calibration.json without its keys `ranges` and `inputs`: the model, the settings it was
            measured for (`measured_for`), the images, for each of blocks 0..k the statistics of the tokens
            that enter it, and with `extents` the `feature` whose range is among them.
        extents: `ranges`, the largest |x| of every value that a 16-bit graph holds; None where they were not
            measured, which float32 graphs do not need.
        maxima: `inputs`, the largest |x| of every input channel of each linear, {module: float32 [C_in]},
            rounded to three digits; None with `extents`.
    """

    document: Mapping[str, Any]
    extents: tuple[Extent, ...] | None = None
    maxima: Mapping[str, torch.Tensor] | None = None

    @property
    def massive_channels(self) -> list[int]:
        """The massive channels of the image tokens that enter block k, ascending."""
        return [entry["channel"] for entry in self.document["layers"][-1]["image"]["massive_channels"]]

    def with_ranges(
        self, settings: FeatureSettings, extents: Iterable[Extent], maxima: Mapping[str, torch.Tensor]
    ) -> Calibration:
        """The same calibration with measured ranges.

        Args:
            settings: the feature whose range is among the extents.
            maxima: of any precision; they are rounded to the digits that the file keeps.
        """
        document = {**self.document, "feature": _describe(settings)}
        rounded = {name: torch.tensor(_three_digits(values)) for name, values in maxima.items()}
        return Calibration(document, tuple(extents), rounded)

    def range_of(self, settings: FeatureSettings) -> float | None:
        """The largest |x| of a feature; None if the calibration measured another feature, or none."""
        if self.document.get("feature") != _describe(settings):
            return None
        return next((one.max_abs for one in self.extents or () if one.kind == FEATURES), None)

    def to_json(self) -> dict[str, Any]:
        """The document of calibration.json."""
        if self.extents is None or self.maxima is None:
            return dict(self.document)
        return {
            **self.document,
            "ranges": [extent.to_json() for extent in self.extents],
            "inputs": {name: _three_digits(values) for name, values in self.maxima.items()},
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Calibration:
        """The calibration of a document that `to_json` made.

        Raises:
            KeyError, IndexError, TypeError, ValueError, AttributeError: the document is no calibration.
        """
        kept = {name: value for name, value in document.items() if name not in ("ranges", "inputs")}
        calibration = cls(kept)
        _ = calibration.massive_channels  # raises where there are none
        if "ranges" not in document:
            return calibration
        extents = tuple(Extent.from_json(entry) for entry in document["ranges"])
        inputs = document["inputs"].items()
        maxima = {name: torch.tensor(values, dtype=torch.float32) for name, values in inputs}
        return cls(kept, extents, maxima)


def _describe(settings: FeatureSettings) -> dict[str, Any]:
    """A feature as calibration.json has it; hidden states have no norm to discard before or after."""
    stage = settings.stage if settings.adaln else "before"
    return {"channels": list(settings.channels), "stage": stage, "adaln": settings.adaln}


def _three_digits(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.3g}") for value in values.tolist()]


def read_calibration(path: Path, plan: Plan) -> Calibration:
    """Read a file that `ditf calibrate` wrote with the settings of this export.

    Raises:
        InputError: the file cannot be read or is no calibration; it was measured on another model, layer,
            timestep, condition or size; it has not the features' range and nothing will measure it; or as
            for `check_feature_range`.
    """
    fix = "make one with ditf calibrate"
    try:
        calibration = Calibration.from_json(read_json(path, _LARGEST))
        if any(not 0 <= channel < plan.family.channels for channel in calibration.massive_channels):
            raise ValueError("channels the model does not have")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"--calibration {path} is no calibration ({error!r:.80})", fix) from error
    if plan.precision.compute != torch.float32 and calibration.extents is None:
        raise InputError(f"--calibration {path} has no ranges: it is a float32 bundle's", fix)
    wrong = mismatches(calibration.document, measured_for(plan))
    if wrong:
        raise InputError(f"--calibration {path} has {wrong[0]}", fix)
    lacks = plan.features_in_ranges and calibration.range_of(feature_settings(plan, calibration)) is None
    if lacks and plan.options.golden == "none":
        raise InputError(
            f"--calibration {path} has the range of other features, and --golden none measures nothing",
            "make it with ditf calibrate and this export's --discard, --discard-stage and --no-adaln",
        )
    check_feature_range(plan, calibration)
    return calibration


def measured_for(plan: Plan) -> dict[str, Any]:
    """The settings that a calibration and the export that uses it must share.

    The model is identified by a fingerprint of its weights, so it may lie elsewhere.
    """
    given = [entry.embeds for entry in plan.entries if entry.embeds is not None]
    vae = plan.latents.source
    return {
        "schema": CALIBRATION_SCHEMA,
        "weights": _fingerprint(plan),
        "vae": None if vae is None else vae.weights().fingerprint(),
        "guidance": plan.guidance,
        "layer": plan.layer,
        "timestep": plan.entries[0].timestep,
        "conditioning": plan.options.conditioning,
        "conditions": [entry.name for entry in plan.entries],
        "text_tokens": plan.options.text_tokens,
        "size": list(plan.size),
        **({"prompt_embeds": given} if given else {}),
        **({"text_padding": plan.family.text_padding} if plan.family.text_paddings else {}),
    }


def _fingerprint(plan: Plan) -> str:
    """The fingerprint of the transformer, and those of the text encoders that a LoRA changes."""
    checkpoint = plan.checkpoint
    encoders = () if plan.options.prompt_embeds else checkpoint.text_encoders()
    changed = [name for name in encoders if any(checkpoint.changed_by_loras(name))]
    return "-".join(checkpoint.weights(name).fingerprint() for name in ("transformer", *changed))


def feature_settings(plan: Plan, calibration: Calibration | None) -> FeatureSettings:
    """The feature that a plan exports; with `--discard auto` the calibration says which channels go.

    Args:
        calibration: None only where the plan names the channels itself.
    """
    channels = plan.discard
    if channels is None:
        assert calibration is not None
        channels = tuple(calibration.massive_channels)
    return FeatureSettings(list(channels), plan.options.discard_stage, plan.options.adaln)


def check_feature_range(plan: Plan, calibration: Calibration) -> None:
    """Check that the plan's features fit into float16, if they are float16 and the calibration has them.

    Raises:
        InputError: the features leave no margin to float16's largest number.
    """
    largest = calibration.range_of(feature_settings(plan, calibration))
    if plan.features_in_ranges and largest is not None:
        check_features(largest)
