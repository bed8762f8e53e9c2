"""`ditf calibrate`: the table, the file, the picture, and what is refused."""

from __future__ import annotations

import json
import re
import signal
import sys

import pytest
from PIL import Image

from tests.checkpoints import planted, save_untrained
from tests.processes import started


def test_planted_channels_are_found_in_every_layer(ditf, checkpoint, tmp_path):
    model = ("--model", checkpoint("untrained"), "--layer", "2", "--size", "64x64", "--timestep", "10")
    done = ditf("calibrate", *model, "--plot", "c.png", "-o", "c.json", "--json", "j.json")
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


def test_an_interrupted_run_leaves_nothing(tmp_path):
    """test_termination.py has all signals."""
    command = [sys.executable, "-m", "ditf", "calibrate", "--layer", "9", "--plot", "c.png"]
    with started(command, cwd=tmp_path) as process:
        for line in process.stderr:
            if "image 2 of 6" in line:
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in rest
    assert not list(tmp_path.iterdir())


def test_what_fp16_would_do_is_said(ditf, tmp_path):
    save_untrained(tmp_path / "demo")
    biases = {"transformer_blocks.0.ff.net.2": 1e6, "transformer_blocks.1.attn1.to_q": 1e5}
    planted(tmp_path / "demo", tmp_path / "planted", "transformer", biases)
    done = ditf(
        "calibrate",
        "--model",
        "planted",
        "--layer",
        "2",
        "--size",
        "64x64",
        "-o",
        "c.json",
        "--json",
        "j.json",
    )
    assert done.returncode == 0, done.stderr
    assert "--fp16 makes exceptions:" in done.stdout
    assert re.search(r"transformer_blocks\.0\.ff\.net\.2: scaled by 2\*\*-\d; ", done.stdout)
    assert (
        "  transformer_blocks.1.attn1: float32; weight of transformer_blocks.1.attn1.to_q+to_k+to_v"
        in done.stdout
    )
    assert json.loads((tmp_path / "j.json").read_text())["float16"] == done.stdout.splitlines()[-3:]
