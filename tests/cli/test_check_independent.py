"""`ditf check --independent`: bundles against the pipelines of their checkpoints, run on this machine."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from ditf.export import independent
from tests.export.parity import photographs


@pytest.mark.parametrize(
    "name", ["bank_bundle", "live_bundle", "trimmed_bundle", "swapped_bundle", "pixart_bundle"]
)
def test_good_bundles(ditf, request, tmp_path, name):
    """Several prompts and timesteps, fewer text tokens, another VAE, an ensemble: all are judged."""
    bundle = request.getfixturevalue(name)
    done = ditf("check", bundle, "--independent", "--json", "check.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["independent"]["oracle"] == "independent"
    golden = json.loads((bundle / "manifest.json").read_text())["golden"]
    assert golden["oracle"] == "independent"
    assert {key: golden[key] for key in report["independent"]} == report["independent"]
    plain = ditf("check", bundle, "--json", "plain.json")
    assert plain.returncode == 0
    before = json.loads((tmp_path / "plain.json").read_text())["metrics"]
    # the golden data are the same pipeline's
    assert report["metrics"] == pytest.approx(before, rel=1e-4, abs=1e-6)


def test_photographs(ditf, demo_bundle, tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index, photo in enumerate(photographs((90, 120))):
        Image.fromarray(photo).save(folder / f"{index}.png")
        if index == 0:
            done = ditf("check", demo_bundle, "--independent", "--images", folder)
            assert done.returncode == 2
            assert "has one image; give two or more" in done.stderr
    done = ditf("check", demo_bundle, "--independent", "--images", folder, "--json", "check.json")
    assert done.returncode == 0, done.stderr
    assert "transformer: DiTPipeline.__call__; noise: FlowMatchEulerDiscreteScheduler" in done.stderr
    assert json.loads((tmp_path / "check.json").read_text())["metrics"]["cosine_mean"] > 0.999


def test_a_bundle_without_golden_data(ditf, tmp_path):
    bundle = tmp_path / "bundle"
    options = ("--layer", 1, "--size", "64x64", "--golden", "none", "--discard", "none", "-o", bundle)
    assert ditf("export", *options).returncode == 0
    done = ditf("check", bundle)
    assert done.returncode == 2
    assert "or add --independent where its model is" in done.stderr
    done = ditf("check", bundle, "--independent")
    assert done.returncode == 0, done.stderr
    assert "passed: " in done.stdout


def changed(bundle, folder, **changes):
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    return folder


def test_the_model_is_not_here(ditf, demo_bundle, tiny_pixart, tmp_path):
    manifest = json.loads((demo_bundle / "manifest.json").read_text())
    model = {**manifest["model"], "id": "models/gone away"}
    bundle = changed(demo_bundle, tmp_path / "bundle", model=model)
    done = ditf("check", bundle, "--independent")
    assert done.returncode == 2
    assert "the model of" in done.stderr
    assert "models/gone away: no such directory or file; name it with --model DIR|ID" in done.stderr
    done = ditf("check", bundle, "--independent", "--model", tiny_pixart)
    assert done.returncode == 2
    assert "is not the model of this bundle" in done.stderr
    assert ditf("check", bundle, "--independent", "--model", "demo").returncode == 0


def test_embeddings_of_no_known_prompt(ditf, pixart_bundle, tmp_path):
    conditions = [
        {"name": "mine", "prompt": None, "class_label": None, "timestep": 261, "prompt_embeds": "0" * 64}
    ]
    bundle = changed(pixart_bundle, tmp_path / "bundle", prompt=None, conditions=conditions)
    done = ditf("check", bundle, "--independent")
    assert done.returncode == 2
    assert "is of embeddings whose prompt is not known; give the file" in done.stderr


def test_too_little_memory(ditf, demo_bundle, monkeypatch):
    monkeypatch.setattr(independent, "available_bytes", lambda: 1000)
    done = ditf("check", demo_bundle, "--independent")
    assert done.returncode == 2
    assert "demo cannot be its own judge: the whole pipeline needs" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "demo"], "--model is for --independent"),
        (["--images", "photos"], "--images is for --independent"),
        (["--independent", "--ladder"], "--ladder reads the bundle's own golden data"),
    ],
)
def test_options_that_do_not_go_together(ditf, demo_bundle, arguments, message):
    done = ditf("check", demo_bundle, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
