"""Options that are rejected before a weight is read, and what options change in the bundle."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import ditf
from ditf.export.demo import PLANTED
from ditf.export.exporter import export_bundle
from ditf.export.options import ExportOptions
from ditf.runtime.errors import DitfError
from ditf.runtime.manifest import read_manifest


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
        ({"class_label": 7}, r"class label 7 is out of range; choose 0\.\.1"),
        ({"timestep": 1000}, r"choose 0\.\.999"),
        ({"opset": 17}, r"choose 18\.\.25"),
        ({"batch": 0}, "batch 0 is out of range"),
        ({"discard": (5, 192)}, r"--discard 192 is out of range; channels are 0\.\.191"),
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
    bundle = export_bundle(ExportOptions(model=str(tiny_pixart), output=tmp_path / "bundle"))
    assert read_manifest(bundle).layer == 2


def test_auto_discard_finds_the_planted_channels(demo_bundle):
    assert read_manifest(demo_bundle).discard["channels"] == sorted(PLANTED)
    calibration = json.loads((demo_bundle / "calibration.json").read_text())
    assert len(calibration["layers"]) == 10
    massive = calibration["layers"][9]["image"]["massive_channels"]
    assert [entry["channel"] for entry in massive] == sorted(PLANTED)
    assert all(entry["ratio"] > 10 for entry in massive)


def test_own_calibration_images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (300, 200), "red").save(folder / "a.png")
    (folder / "notes.txt").write_text("not an image")
    bundle = export_bundle(
        ExportOptions(layer="1", size=(64, 64), calibration_images=folder, output=tmp_path / "b")
    )
    calibration = json.loads((bundle / "calibration.json").read_text())
    assert calibration["layers"][1]["image"]["images"] == 1
    assert calibration["images"]["source"] == str(folder)
    assert calibration["images"]["names"] == ["a.png"]


def test_exporting_again_gives_the_same_bytes(demo_bundle, tmp_path):
    again = export_bundle(ExportOptions(layer="block.9", precision="float16", output=tmp_path / "again"))
    for name in ("features.onnx", "features.onnx.data", "match.onnx", "calibration.json"):
        assert (again / name).read_bytes() == (demo_bundle / name).read_bytes(), name


def test_the_seed_changes_the_noise_only(demo_bundle, tmp_path):
    other = export_bundle(ExportOptions(layer="9", precision="float16", seed=1, output=tmp_path / "other"))
    image = np.load(demo_bundle / "golden.npz")["images"][0]
    with ditf.load(demo_bundle) as a, ditf.load(other) as b:
        first, second = a.features(image).array, b.features(image).array
    assert not np.array_equal(first, second)
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.9


def test_the_demo_shows_what_the_discard_is_for(demo_bundle, tmp_path):
    """On the photograph pair of `make demo`: matches within 16 px of the truth, with and without."""
    import skimage.data

    left, right, disparity = skimage.data.stereo_motorcycle()
    y, x = (grid.ravel() for grid in np.mgrid[20:480:40, 80:720:40])
    truth = np.stack([x - disparity[y, x], y], axis=1)
    known = np.isfinite(truth).all(axis=1)
    kept = export_bundle(
        ExportOptions(layer="9", precision="float16", discard="none", output=tmp_path / "kept")
    )
    share = {}
    for name, bundle in (("discarded", demo_bundle), ("kept", kept)):
        with ditf.load(bundle) as model:
            found = model.match(model.features(left), model.features(right), np.stack([x, y], axis=1))
        errors = np.linalg.norm(found.points - truth, axis=1)[known]
        share[name] = (errors < 16).mean()
    assert share["discarded"] > 0.4
    assert share["discarded"] > 1.3 * share["kept"]
