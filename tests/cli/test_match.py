"""`ditf match` and `ditf features` as processes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import ditf as package
from ditf.calib.images import golden_pair
from ditf.runtime.matching.homography import cell_threshold, find_homography


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
        (["--grid", "2", "--method", "soft"], "choose one of argmax, window, kernel"),
        (["--grid", "2", "--max-matches", "5"], "--max-matches needs --mutual"),
        (["--grid", "2", "--ratio", "0.9"], "--ratio needs --mutual and no points"),
        (["--grid", "2", "--mutual", "--ratio", "0.9"], "--ratio needs --mutual and no points"),
        (["--mutual", "--ratio", "2"], "ratio is 2; it lies in (0, 1]"),
        (["--mutual", "--max-matches", "0"], "max_matches is 0"),
        (["--grid", "2", "--homography", "magic"], "choose one of usac, ransac, lmeds"),
        (["--grid", "1", "--homography", "usac"], "needs four matches, there are 1"),
        (["--flow", "flow.npz", "--homography", "usac"], "--homography needs matches"),
        (["--flow", "flow.npz", "--output", "match.png"], "--output needs matches"),
        (["--flow", "flow.png"], "flow.png is no .npz file"),
        (["--flow", "absent/flow.npz"], "not a directory"),
        (["--draw-flow", "flow.npz"], "does not name a picture format"),
        (["--heat-map", "heat.png"], "points are needed"),
        (["--grid", "2", "--heat-map", "heat.png"], "--heat-map needs a point"),
        (["--points", "1,1", "--heat-map", "heat"], "does not name a picture format"),
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
    with Image.open(tmp_path / "left.png") as left:
        left.convert("P").save(tmp_path / "moving.gif", save_all=True, append_images=[left.rotate(90)])
        Image.fromarray(np.asarray(left.convert("L")).astype(np.uint16) << 4).save(tmp_path / "camera12.png")
    for name in ("absent.png", "broken.png", "moving.gif holds 2 pictures", "camera12.png has values from"):
        done = ditf("match", demo_bundle, pair[0], name.split()[0], "--grid", "1")
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


@pytest.mark.parametrize("method", ["window", "kernel"])
def test_method(ditf, demo_bundle, pair, tmp_path, method):
    done = ditf("match", demo_bundle, *pair, "--grid", 3, "--method", method, "--json", "m.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "m.json").read_text())
    with package.load(demo_bundle) as model:
        maps = [model.features(tmp_path / name) for name in pair]
        expected = model.match(*maps, report["points"], method)
    np.testing.assert_array_equal(np.float32(report["matches"]), expected.points)
    assert report["method"] == method


def test_mutual(ditf, demo_bundle, pair, tmp_path):
    options = ("--mutual", "--max-matches", 50, "--ratio", 0.99, "--json", "m.json", "-o", "m.png")
    done = ditf("match", demo_bundle, *pair, *options)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "m.json").read_text())
    with package.load(demo_bundle) as model:
        maps = [model.features(tmp_path / name) for name in pair]
        expected = model.mutual(*maps, max_matches=50, ratio=0.99)
    assert len(expected) == 50
    np.testing.assert_array_equal(np.float32(report["points"]), expected.source_points)
    np.testing.assert_array_equal(np.float32(report["matches"]), expected.points)
    assert report["method"] == "cells"
    assert report["mutual"]
    lines = done.stdout.splitlines()
    assert len(lines) == 42  # a head, 40 of them and how many there are
    assert lines[-1] == "... 50 matches in all; --json has them"
    with Image.open(tmp_path / "m.png") as picture:
        assert picture.size == (252, 90)


def test_points_that_come_back(ditf, demo_bundle, pair, tmp_path):
    done = ditf("match", demo_bundle, *pair, "--grid", 5, "--mutual", "--json", "m.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "m.json").read_text())
    assert 0 < len(report["points"]) < 25
    assert done.stdout.splitlines()[-1] == f"{len(report['points'])} mutual matches"
    assert report["scores"] == sorted(report["scores"], reverse=True)


def test_homography(ditf, demo_bundle, pair, tmp_path):
    same = (pair[0], pair[0])
    done = ditf("match", demo_bundle, *same, "--mutual", "--homography", "ransac", "--json", "m.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "m.json").read_text())
    found = report["homography"]
    assert report["method"] == "window"
    assert found["method"] == "ransac"
    assert sum(found["inliers"]) > 0.5 * len(report["points"])
    with package.load(demo_bundle) as model:
        threshold = cell_threshold(model.features(tmp_path / pair[0]))
    expected = find_homography(np.array(report["points"]), np.array(report["matches"]), threshold, "ransac")
    np.testing.assert_array_equal(found["matrix"], expected.matrix)
    assert found["error_px"] == expected.error_px
    assert f"homography: {sum(found['inliers'])} of {len(report['points'])} matches agree" in done.stdout


def test_flow_and_heat_map(ditf, demo_bundle, pair, tmp_path):
    files = ("--flow", "flow.npz", "--draw-flow", "flow.png", "--heat-map", "heat.png", "--json", "m.json")
    done = ditf("match", demo_bundle, *pair, "--points", "20,30", "50,60", *files)
    assert done.returncode == 0, done.stderr
    with package.load(demo_bundle) as model:
        maps = [model.features(tmp_path / name) for name in pair]
        flow = model.flow(*maps)
        heat = model.heat_map(*maps, [20, 30])
    with np.load(tmp_path / "flow.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["field"], flow.field)
        np.testing.assert_array_equal(arrays["confidence"], flow.confidence)
    report = json.loads((tmp_path / "m.json").read_text())
    assert report["heat_map"] == pytest.approx({"min": float(heat.min()), "max": float(heat.max())})
    assert report["flow"]["max_px"] == pytest.approx(np.linalg.norm(flow.field, axis=2).max(), rel=1e-6)
    sizes = {}
    for name in ("flow.png", "heat.png"):
        with Image.open(tmp_path / name) as picture:
            sizes[name] = picture.size
    assert sizes == {"flow.png": (252, 192), "heat.png": (252, 90)}


def test_flow_alone(ditf, demo_bundle, pair, tmp_path):
    done = ditf("match", demo_bundle, *pair, "--flow", "flow.npz", "--method", "window")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("flow: ")
    with np.load(tmp_path / "flow.npz") as arrays:
        assert arrays["field"].shape == (90, 120, 2)
