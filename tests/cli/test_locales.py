"""Names and prompts that are not ASCII, in locales that are, and names that are not UTF-8."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from ditf.calib.images import golden_pair
from ditf.export.planning.export_options import ExportOptions
from ditf.runtime.errors import InputError
from ditf.runtime.store.feature_store import FeatureStore

ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
LATIN = {"PYTHONIOENCODING": "latin-1"}
BROKEN = os.fsdecode(b"bad\xff")  # a name of bytes that are not UTF-8
SHOWN = "bad\\udcff"


@pytest.fixture
def images(tmp_path):
    """Two names of images: one that is not ASCII, one that is not UTF-8."""
    (tmp_path / "ü日").mkdir()
    names = ["ü日/é.png", f"{BROKEN}.png"]
    for name, pixels in zip(names, golden_pair((90, 120)), strict=True):
        Image.fromarray(pixels).save(tmp_path / name)
    return names


def run(*arguments: object, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "ditf", *map(os.fsencode, arguments)]
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, timeout=300)


def strict_json(path: Path) -> dict:
    """A JSON document without lone surrogates, which many readers refuse."""
    document = json.loads(path.read_bytes())
    json.dumps(document, ensure_ascii=False).encode("utf-8")
    return document


@pytest.mark.parametrize("env", [ASCII, {}], ids=["ascii", "utf-8"])
def test_images_and_outputs(demo_bundle, images, tmp_path, env):
    outputs = ("--json", "ü日/é.json", "-o", f"{BROKEN}.drawn.png")
    done = run("match", demo_bundle, *images, "--points", "9,9", *outputs, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    document = strict_json(tmp_path / "ü日" / "é.json")
    assert (document["source"], document["target"]) == (images[0], f"{SHOWN}.png")
    with Image.open(tmp_path / f"{BROKEN}.drawn.png") as drawn:
        drawn.load()


def test_names_of_a_store(demo_bundle, images, tmp_path):
    done = run("features", demo_bundle, *images, "-o", "st", "--json", "f.json", cwd=tmp_path, env=ASCII)
    assert done.returncode == 1
    assert f"{SHOWN}.png: its name is not UTF-8; rename it".encode() in done.stdout
    assert done.stderr.splitlines()[-1].startswith(b"error: 1 of 2 images failed")
    assert FeatureStore(tmp_path / "st").names == (images[0],)
    assert list(strict_json(tmp_path / "f.json")["failed"]) == [f"{SHOWN}.png"]


def test_names_in_one_file(ditf, demo_bundle, images, tmp_path):
    done = ditf("features", demo_bundle, *images, "-o", "f.npz", "--json", "f.json")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "f.npz", allow_pickle=False) as arrays:
        assert list(arrays["names"]) == [images[0], f"{SHOWN}.png"]
    assert [one["image"] for one in strict_json(tmp_path / "f.json")["images"]] == [images[0], f"{SHOWN}.png"]
    rows = done.stdout.splitlines()
    assert len({row.index("128x12x12") for row in rows[1:]}) == 1  # the columns are in line


@pytest.mark.parametrize("env", [ASCII, LATIN], ids=["ascii", "latin-1"])
def test_what_the_terminal_cannot_show(demo_bundle, tmp_path, env):
    bundle = shutil.copytree(demo_bundle, tmp_path / "bundle")
    document = json.loads((bundle / "manifest.json").read_text())
    document["model"]["id"] = "modèle 🐱"
    (bundle / "manifest.json").write_text(json.dumps(document))
    done = run("inspect", "bundle", "--json", "i.json", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert strict_json(tmp_path / "i.json")["manifest"]["model"]["id"] == "modèle 🐱"
    if env is LATIN:
        assert "modèle \\U0001f431".encode("latin-1") in done.stdout


def test_a_prompt_in_an_ascii_locale(ditf, tiny_pixart, tmp_path):
    export = ("export", "--model", tiny_pixart, "--save-prompt-embeds")
    done = run(*export, "a.safetensors", "--prompt", "chat é", cwd=tmp_path, env=ASCII)
    assert done.returncode == 0, done.stderr
    ditf(*export, "b.safetensors", "--prompt", "chat é")
    first, second = (safe_open(tmp_path / f"{name}.safetensors", framework="np") for name in "ab")
    assert first.metadata() == second.metadata()  # which safetensors writes in any order
    assert first.keys() == second.keys()
    for name in first.keys():  # noqa: SIM118  (safe_open is no dict)
        assert np.array_equal(first.get_tensor(name), second.get_tensor(name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": f"a {BROKEN}"}, "--prompt 'a bad.udcff' is not UTF-8; type it in a terminal that uses"),
        ({"model": BROKEN}, "--model 'bad.udcff' is not UTF-8; rename it"),
        ({"vae": BROKEN}, "--vae 'bad.udcff' is not UTF-8; rename it"),
        ({"prompt_embeds": Path(BROKEN)}, "--prompt-embeds 'bad.udcff' is not UTF-8; rename it"),
    ],
)
def test_what_no_library_reads_is_refused_before_any_work(options, message):
    with pytest.raises(InputError, match=message):
        ExportOptions(layer="1", **options)


def test_it_is_one_line(ditf, tiny_pixart, tmp_path):
    done = ditf("export", "--model", tiny_pixart, "--layer", "1", "--prompt", f"a {BROKEN}")
    assert done.returncode == 2
    assert done.stderr == f"error: --prompt 'a {SHOWN}' is not UTF-8; type it in a terminal that uses UTF-8\n"
    assert not list(tmp_path.iterdir())


def test_the_command_in_a_manifest(demo_bundle):
    from dataclasses import replace

    from ditf.runtime.bundles.manifest import read_manifest

    manifest = replace(read_manifest(demo_bundle), command=f"ditf export --json {BROKEN}")
    assert json.loads(manifest.to_json())["command"] == f"ditf export --json {SHOWN}"
