"""Banks and live bundles on the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ditf.calib.images import golden_pair


@pytest.fixture
def pictures(tmp_path):
    for name, array in zip(("left.png", "right.png"), golden_pair((60, 90)), strict=True):
        Image.fromarray(array).save(tmp_path / name)


@pytest.mark.parametrize("fixture", ["bank_bundle", "live_bundle", "trimmed_bundle"])
def test_check_and_inspect(ditf, request, fixture, tmp_path):
    bundle = request.getfixturevalue(fixture)
    done = ditf("check", bundle, "--json", "check.json")
    assert done.returncode == 0, done.stderr
    shown = ditf("inspect", bundle)
    assert shown.returncode == 0, shown.stderr
    assert "left out of the checkpoint" in shown.stdout
    assert ("inputs beside the image" in shown.stdout) == (fixture != "trimmed_bundle")
    metrics = json.loads((tmp_path / "check.json").read_text())["metrics"]
    assert ("whole_cosine_mean" in metrics) == (fixture == "trimmed_bundle")


def test_what_trimming_the_text_costs(ditf, trimmed_bundle, tmp_path):
    """The graph is the model with the text it was given; what the cut costs is told apart, and not gated."""
    done = ditf("check", trimmed_bundle, "--json", "check.json")
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["metrics"]["cosine_min"] > 0.9999
    assert report["metrics"]["whole_cosine_min"] < 0.999
    assert not any(gate["name"].startswith("whole_") for gate in report["gates"])
    assert "this bundle keeps 16 T5 tokens" in done.stdout
    assert "cut to 16 T5 tokens" in ditf("inspect", trimmed_bundle).stdout


def test_a_condition_by_name(ditf, pictures, bank_bundle, tmp_path):
    for number, name in enumerate(("cat@90", "dog@260")):
        done = ditf("features", bank_bundle, "left.png", "-o", f"{number}.npz", "--prompt", name)
        assert done.returncode == 0, done.stderr
    first, second = (np.load(tmp_path / f"{number}.npz")["features_0"] for number in (0, 1))
    assert np.abs(first.astype(np.float32) - second).max() > 1e-2
    done = ditf("match", bank_bundle, "left.png", "right.png", "--points", "9,9", "--prompt", "dog@90")
    assert done.returncode == 0, done.stderr


def test_an_unknown_condition(ditf, pictures, bank_bundle):
    done = ditf("match", bank_bundle, "left.png", "right.png", "--points", "9,9", "--prompt", "bird", "-q")
    assert done.returncode == 2
    assert done.stderr == (
        "error: this bundle has no condition 'bird'; choose one of 'cat@90', 'cat@260', 'dog@90', 'dog@260'\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--conditioning", "baked"], "--conditioning baked: input should be 'bake', 'bank' or 'live'"),
        (["--prompt", "a cat"], "takes no prompt; use --class-label"),
        (["--class-label", "9"], "class label 9 is out of range"),
        (["--class-label", "cat"], "no class is called 'cat'"),
        (["--class-label", "0", "--class-label", "1"], "add --conditioning bank"),
        (["--timestep", "5", "--timestep", "6"], "add --conditioning bank"),
        (["--guidance", "nan"], "--guidance nan:"),
        (["--text-tokens", "0"], "--text-tokens 0:"),
        (["--text-tokens", "5"], "reads no text"),
        (["--revision", "main"], "--revision is for hub ids"),
        (["--discard", "published"], "no massive channels are published"),
    ],
)
def test_errors_are_one_line(ditf, tmp_path, arguments, message):
    done = ditf("export", *arguments, "--quiet")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "bundles").exists()
