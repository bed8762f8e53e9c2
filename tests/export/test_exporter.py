"""Options that are rejected before a weight is read, and what options change in the bundle."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import ditf
from ditf.calib.images import golden_pair
from ditf.export.assemble.features_graph import assemble
from ditf.export.checkpoints import offload, weight_spill
from ditf.export.checkpoints.opening import DEMO_CHECKPOINT, open_checkpoint
from ditf.export.exporter import export_bundle, stage_count
from ditf.export.graph.features import FeatureSettings
from ditf.export.measure import images
from ditf.export.planning.conditions import trim
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import make_plan
from ditf.runtime.bundles.manifest import read_manifest
from ditf.runtime.errors import DitfError
from ditf.runtime.images import open_image
from tests.checkpoints import UNTRAINED_MASSIVE
from tests.export.parity import planned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layer": "12"},
            r"layer 12 is out of range; this model has layers 0\.\.11, or block\.0\.\.block\.11",
        ),
        ({"size": (60, 64)}, r"size 60x64 is not a multiple of 8 .*nearest are 56x64 and 64x64"),
        ({"size": (1, 1)}, r"nearest are 8x8 and 8x8"),
        ({"prompt": "a cat"}, "takes no prompt; use --class-label"),
        ({"class_label": 9}, r"class label 9 is out of range; choose 0\.\.8"),
        ({"timestep": 1000}, r"choose 0\.\.999"),
        ({"opset": 17}, r"choose 18\.\.25"),
        ({"batch": 0}, "batch 0 is out of range"),
        ({"discard": (5, 128)}, r"--discard 128 is out of range; channels are 0\.\.127"),
        ({"model": "no-such-directory"}, "no such directory"),
        ({"calibration_images": "no-such-directory"}, "not a directory of images"),
    ],
)
def test_bad_options_leave_nothing(tmp_path, options, message):
    with pytest.raises(DitfError, match=message) as caught:
        export_bundle(ExportOptions(output=tmp_path / "bundle", **options))
    assert caught.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_class_label_on_a_text_model(tiny_pixart, tmp_path):
    options = ExportOptions(model=str(tiny_pixart), layer="0", class_label=1, output=tmp_path / "b")
    with pytest.raises(DitfError, match="takes no class label; use --prompt"):
        export_bundle(options)


def test_the_default_layer_is_half_of_the_depth(tiny_pixart, tmp_path):
    with open_checkpoint(str(tiny_pixart), None, None) as checkpoint:
        plan = make_plan(ExportOptions(model=str(tiny_pixart), output=tmp_path / "bundle"), checkpoint)
    assert plan.layer == 2


def test_auto_discard_finds_the_planted_channels(checkpoint, tmp_path):
    options = ExportOptions(
        model=str(checkpoint("untrained")), layer="2", size=(64, 64), timestep=10, output=tmp_path / "b"
    )
    bundle = export_bundle(options)
    assert read_manifest(bundle).discard["channels"] == sorted(UNTRAINED_MASSIVE)
    calibration = json.loads((bundle / "calibration.json").read_text())
    assert len(calibration["layers"]) == 3
    massive = calibration["layers"][2]["image"]["massive_channels"]
    assert [entry["channel"] for entry in massive] == sorted(UNTRAINED_MASSIVE)
    assert all(entry["ratio"] > 10 for entry in massive)


def test_the_demo_model_grew_massive_channels(demo_bundle):
    calibration = json.loads((demo_bundle / "calibration.json").read_text())
    massive = calibration["layers"][9]["image"]["massive_channels"]
    assert [entry["channel"] for entry in massive] == read_manifest(demo_bundle).discard["channels"] != []


def test_own_calibration_images_are_read_once(tmp_path, monkeypatch):
    """Three stages use them: the blocks, the features and the ranges are measured on them."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (300, 200), "red").save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("not an image")
    read = []
    monkeypatch.setattr(images, "open_image", lambda path: read.append(path.name) or open_image(path))
    bundle = export_bundle(
        ExportOptions(
            layer="1",
            size=(64, 64),
            precision="float16",
            pca=4,
            calibration_images=folder,
            output=tmp_path / "b",
        )
    )
    assert read == ["a.png", "b.png"]
    calibration = json.loads((bundle / "calibration.json").read_text())
    assert calibration["layers"][1]["image"]["images"] == 2
    assert calibration["images"]["source"] == str(folder)
    assert calibration["images"]["names"] == ["a.png", "b.png"]


def test_the_seed_changes_the_noise_only(demo_bundle):
    settings = FeatureSettings(tuple(read_manifest(demo_bundle).discard["channels"]))
    image = torch.from_numpy(golden_pair((96, 96))[:1])
    maps = []
    for seed in (0, 1):
        plan, entries = planned(DEMO_CHECKPOINT, "9", (96, 96), 1, 1, "bake", False, seed=seed)
        made = assemble(plan, trim(entries, plan.family), plan.noise(), settings)
        with torch.no_grad():
            maps.append(made.graph(image, *made.feeds[0].values()).numpy())
    first, second = maps
    assert not np.array_equal(first, second)
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.9


def test_streaming_changes_no_byte(checkpoint, live_bundle, tmp_path, monkeypatch):
    """Everything from disk, reference, encoders and weights, as an export of a large model does."""
    monkeypatch.setattr(offload, "RESIDENT", 0)
    monkeypatch.setattr(weight_spill, "SMALLEST", 0)
    amounts = []
    options = ExportOptions(
        model=str(checkpoint("flux")),
        layer="2",
        precision="float16",
        size=(48, 80),
        conditioning="live",
        prompt=("a cat", "a dog"),
        output=tmp_path / "b",
    )
    stages = []
    bundle = export_bundle(options, stages.append, lambda done, total: amounts.append((done, total)))
    assert len(stages) == stage_count(options)
    for path in live_bundle.iterdir():
        if path.name != "manifest.json":
            assert (bundle / path.name).read_bytes() == path.read_bytes(), path.name
    written = (bundle / "features.onnx.data").stat().st_size
    assert amounts[-1][0] == amounts[-1][1] >= written
    assert {path.name for path in tmp_path.iterdir()} == {"b"}


def test_without_a_reference(checkpoint, tmp_path):
    options = ExportOptions(
        model=str(checkpoint("flux")),
        layer="1",
        size=(48, 80),
        golden="none",
        discard=(3,),
        output=tmp_path / "b",
    )
    stages = []
    manifest = read_manifest(export_bundle(options, stages.append))
    assert len(stages) == stage_count(options)
    assert (manifest.golden, manifest.rehearsal, manifest.tolerances) == ({}, {}, {})
    assert set(manifest.files) == {"features.onnx", "features.onnx.data", "match.onnx"}
    with ditf.load(tmp_path / "b") as model:
        assert np.isfinite(model.features(np.zeros((48, 80, 3), np.uint8)).array).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--discard auto measures, and --golden none measures nothing; add --calibration"),
        ({"discard": "none", "precision": "float16"}, "a float16 graph needs measured ranges"),
        ({"discard": "none", "precision": "int8"}, "a int8 graph needs measured ranges"),
        ({"discard": "none", "pca": 8}, "--pca is learned from the model"),
        ({"discard": "none", "features_dtype": "float16"}, "float16 features need their range"),
    ],
)
def test_what_needs_the_reference_is_refused_without(tmp_path, options, message):
    with pytest.raises(DitfError, match=message):
        export_bundle(ExportOptions(golden="none", output=tmp_path / "bundle", **options))
    assert not list(tmp_path.iterdir())


def test_float16_without_a_reference_takes_a_calibration(demo_bundle, tmp_path):
    """The graph is the one that the reference would have given."""
    options = ExportOptions(
        layer="9",
        precision="float16",
        golden="none",
        calibration=demo_bundle / "calibration.json",
        output=tmp_path / "b",
    )
    stages = []
    bundle = export_bundle(options, stages.append)
    assert len(stages) == stage_count(options)
    for name in ("features.onnx", "features.onnx.data", "calibration.json"):
        assert (bundle / name).read_bytes() == (demo_bundle / name).read_bytes(), name
