"""`ditf match` and `ditf features` as processes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import ditf as package
from ditf.calib.images import golden_pair


@pytest.fixture
def pair(tmp_path):
    for name, array in zip(("left.png", "right.png"), golden_pair((90, 120)), strict=True):
        Image.fromarray(array).save(tmp_path / name)
    return "left.png", "right.png"


def test_points(ditf, demo_bundle, pair, tmp_path):
    files = ("--output", "match.png", "--json", "match.json")
    done = ditf("match", demo_bundle, *pair, "--points", "20,30", "40.5,50", "--points", "0,0", *files)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4
    report = json.loads((tmp_path / "match.json").read_text())
    assert report["points"] == [[20, 30], [0, 0], [40.5, 50]]
    with package.load(demo_bundle) as model:
        maps = [model.features(tmp_path / name) for name in pair]
        expected = model.match(*maps, report["points"])
    np.testing.assert_array_equal(np.float32(report["matches"]), expected.points)
    np.testing.assert_array_equal(np.float32(report["scores"]), expected.scores)
    with Image.open(tmp_path / "match.png") as picture:
        assert picture.size == (252, 90)


def test_grid(ditf, demo_bundle, pair):
    done = ditf("match", demo_bundle, *pair, "--grid", 3, "--fit", "pad")
    assert done.returncode == 0, done.stderr
    first_column = [line.split()[0] for line in done.stdout.splitlines()[1:]]
    assert first_column[:4] == ["20,15", "60,15", "100,15", "20,45"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "points are needed"),
        (["--points", "1,2", "--grid", "2"], "exclude each other"),
        (["--points", "1;2"], "is not x,y"),
        (["--points", "nan,2"], "outside"),
        (["--points", "120,0"], "x is 0..119, y is 0..89"),
        (["--points", "-1,0"], "outside"),
        (["--grid", "0"], "grid"),
        (["--grid", "2", "--fit", "crop"], "stretch, pad"),
        (["--grid", "2", "--output", "absent/match.png"], "not a directory"),
        (["--grid", "2", "--output", "match.xyz"], "match.xyz"),
        (["--grid", "2", "--output", "left.png"], "would overwrite"),
        (["--grid", "2", "--output", "same.png", "--json", "same.png"], "would overwrite"),
    ],
)
def test_bad_input_is_one_line(ditf, demo_bundle, pair, tmp_path, arguments, message):
    done = ditf("match", demo_bundle, *pair, *arguments, "--quiet")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["left.png", "right.png"]


def test_outputs_do_not_go_into_the_bundle(ditf, demo_bundle, pair):
    for verb in (("match", demo_bundle, *pair, "1,1"), ("features", demo_bundle, *pair)):
        done = ditf(*verb, "--output", demo_bundle / "features.png")
        assert done.returncode == 2
        assert "would overwrite" in done.stderr


def test_images_that_are_not(ditf, demo_bundle, pair, tmp_path):
    (tmp_path / "broken.png").write_bytes((tmp_path / "left.png").read_bytes()[:200])
    for name in ("absent.png", "broken.png"):
        done = ditf("match", demo_bundle, pair[0], name, "--grid", "1")
        assert done.returncode == 2
        assert name in done.stderr
        assert done.stderr.count("\n") == 1


def test_features(ditf, demo_bundle, pair, tmp_path):
    done = ditf("features", demo_bundle, *pair, "--output", "features.npz", "--json", "f.json")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "features.npz", allow_pickle=False) as arrays:
        assert list(arrays["names"]) == list(pair)
        assert arrays["features_1"].shape == (128, 12, 12)
        assert arrays["features_1"].dtype == np.float16
        assert list(arrays["image_size_0"]) == [90, 120]
    assert json.loads((tmp_path / "f.json").read_text())["images"][0]["shape"] == [128, 12, 12]
