"""`ditf calibrate`: the table, the file, the picture, and what is refused."""

from __future__ import annotations

import json

import pytest
from PIL import Image


def test_the_demo_model(ditf, tmp_path):
    done = ditf(
        "calibrate", "--layer", "2", "--size", "64x64", "--plot", "c.png", "-o", "c.json", "--json", "j.json"
    )
    assert done.returncode == 0, done.stderr
    assert "2 (block.2)" in done.stdout
    assert "[7/8" in done.stderr
    assert "image 6 of 6" in done.stderr
    layers = json.loads((tmp_path / "j.json").read_text())["layers"]
    assert [layer["massive_channels"] for layer in layers] == [[5, 41]] * 3
    assert json.loads((tmp_path / "c.json").read_text())["layer"] == 2
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.size[0] > 800


def test_images_that_are_all_black(ditf, tmp_path):
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("RGB", (64, 64)).save(tmp_path / "images" / f"{name}.png")
    done = ditf("calibrate", "--layer", "1", "--size", "64x64", "--images", "images")
    assert done.returncode == 0, done.stderr
    assert "warning: every image is of one colour" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "c.gif"], "is no PNG, SVG or PDF"),
        (["--layer", "99"], "out of range"),
        (["--images", "absent"], "not a directory of images"),
        (["--ensemble", "0"], "--ensemble 0:"),
        (["-o", "no/such/folder/c.json"], "no/such/folder"),
    ],
)
def test_errors_are_one_line(ditf, tmp_path, arguments, message):
    done = ditf("calibrate", "--quiet", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "calibration.json").exists()
