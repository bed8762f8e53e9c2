"""The features' range is that of the feature that ships, with --no-adaln and --discard-stage after too."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from ditf.calib.recipe import FEATURES, LIMIT
from ditf.export.exporter import export_bundle, stage_count
from ditf.export.graph.features import FeatureSettings
from ditf.export.measure.calibrate import calibrate
from ditf.export.planning.export_options import ExportOptions
from ditf.runtime.bundles.manifest import read_manifest
from ditf.runtime.errors import InputError
from tests.checkpoints import planted
from tests.export.measure.test_activation_ranges import SIZE, Measured

LAYER = "2"
NORM = f"transformer_blocks.{LAYER}.norm1.linear"
"""The tiny DiT's AdaLN linear of block k. `planted` sets its shift of channels 3 and 5."""

CHANNELS = 48


@pytest.fixture(scope="module")
def shifted(checkpoint, tmp_path_factory):
    """Block k's norm shifts channels 3 and 5 by 1e5; the hidden states are of the order of ten."""
    folder = tmp_path_factory.mktemp("shifted") / "model"
    return planted(checkpoint("dit"), folder, "transformer", {NORM: 1e5})


@pytest.fixture(scope="module")
def cancelled(checkpoint, tmp_path_factory):
    """Channels 3 and 5 are massive, and so is block k's scale of channel 5.

    With channel 3 discarded before the norm, LayerNorm of channel 5 is -sqrt(C - 1), which the shift cancels.
    Discarded after the norm, channel 3 counts there: it is -sqrt(C / 2), and the feature is large.
    """
    folder = tmp_path_factory.mktemp("cancelled") / "model"
    planted(checkpoint("dit"), folder, "transformer", {"pos_embed.proj": 1e6})
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    bias = tensors[f"{NORM}.bias"]  # shift, scale and gate [C] of the attention, then of the feed-forward
    bias[CHANNELS + 5] = 2e4
    bias[5] = math.sqrt(CHANNELS - 1) * (1 + 2e4)
    save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("model", "settings", "fits"),
    [
        ("shifted", FeatureSettings((), "before", True), False),
        ("shifted", FeatureSettings((), "before", False), True),
        ("shifted", FeatureSettings((3, 5), "before", True), False),
        ("shifted", FeatureSettings((3, 5), "after", True), True),
        ("cancelled", FeatureSettings((3,), "before", True), True),
        ("cancelled", FeatureSettings((3,), "after", True), False),
        ("cancelled", FeatureSettings((), "before", False), False),
        ("cancelled", FeatureSettings((3, 5), "after", False), True),
    ],
)
def test_the_range_is_that_of_the_unmodified_model_s_feature(request, model, settings, fits):
    one = Measured(request.getfixturevalue(model), LAYER, settings=settings)
    (found,) = [extent for extent in one.ranges() if extent.kind == FEATURES]
    assert found.name == settings.name
    largest = max(
        np.abs(one.reference.features(one.reference.hidden_states(image), settings)).max()
        for image in one.images
    )
    assert found.max_abs == pytest.approx(largest, rel=2e-3)
    assert (found.max_abs <= LIMIT) == fits


def options_of(folder, output, **changes):
    same = {"layer": LAYER, "size": SIZE, "discard": "none", "output": output}
    return ExportOptions(model=str(folder), **same | changes)


def test_hidden_states_are_not_refused_for_what_the_norm_would_make(shifted, tmp_path):
    stages = []
    options = options_of(shifted, tmp_path / "b", precision="float16", adaln=False, features_dtype="float16")
    manifest = read_manifest(export_bundle(options, stages.append))
    assert manifest.features_dtype == "float16"
    assert len(stages) == stage_count(options)
    assert not any("range of the unmodified model's features" in stage for stage in stages)  # measured once


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_features_that_ship_without_margin_are_refused(cancelled, tmp_path, precision):
    options = options_of(cancelled, tmp_path / "b", precision=precision, discard=(3,), discard_stage="after")
    with pytest.raises(InputError, match=r"features reach [34]\.\d+e\+04.*--features-dtype float32"):
        export_bundle(options)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def calibrated(cancelled, tmp_path_factory):
    """The calibration of a feature that fits."""
    folder = tmp_path_factory.mktemp("calibrated")
    document = calibrate(options_of(cancelled, folder / "b", **FITS), folder=folder).to_json()
    path = folder / "calibration.json"
    path.write_text(json.dumps(document))
    return path


FITS = {"precision": "float16", "discard": (3,)}


@pytest.mark.parametrize(
    "changes",
    [
        {"discard": "none"},
        {"discard_stage": "after", "precision": "bfloat16"},
        {"discard": "none", "precision": "float32", "features_dtype": "float16"},
    ],
)
def test_a_calibration_has_the_range_of_its_own_feature(cancelled, calibrated, tmp_path, changes):
    """The range of another feature is measured, and without the reference the file is refused."""
    options = options_of(cancelled, tmp_path / "b", calibration=calibrated, **FITS | changes)
    stages = []
    with pytest.raises(InputError, match=r"features reach [34]\.\d+e\+04.*--features-dtype float32"):
        export_bundle(options, stages.append)
    assert stages[-1] == "measuring the range of the unmodified model's features"
    with pytest.raises(InputError, match="has the range of other features, and --golden none"):
        export_bundle(replace(options, golden="none"))
    assert not list(tmp_path.iterdir())


def test_features_that_a_calibration_knows_are_not_measured_again(cancelled, calibrated, tmp_path):
    options = options_of(cancelled, tmp_path / "b", calibration=calibrated, **FITS)
    stages = []
    assert export_bundle(replace(options, golden="none"), stages.append).exists()
    assert len(stages) == stage_count(replace(options, golden="none"))
    options = replace(options, output=tmp_path / "c")
    stages = []
    export_bundle(options, stages.append)
    assert "the calibration has the range of the features" in stages
    assert len(stages) == stage_count(options)


def test_hidden_states_do_not_make_fp16_refuse(ditf, shifted):
    """They are float32 features with --fp16, so their range is no reason."""
    same = ("--layer", LAYER, "--size", f"{SIZE[0]}x{SIZE[1]}", "--discard", "none", "-q")
    refused = ditf("calibrate", "--model", shifted, *same)
    assert "--fp16 would refuse: the features reach" in refused.stdout
    kept = ditf("calibrate", "--model", shifted, *same, "--no-adaln")
    assert kept.returncode == 0
    assert "would refuse" not in kept.stdout
