"""The program itself: version, help, and the verbs that only report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import ditf as package


@pytest.mark.parametrize("program", ["ditf", "ditf-export"])
def test_version(program):
    script = Path(sys.executable).with_name(program)
    done = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"ditf {package.__version__}\n")


@pytest.mark.parametrize("verb", ["export", "check", "match", "features", "inspect", "doctor"])
def test_help_of_every_verb(ditf, verb):
    done = ditf(verb, "--help")
    assert done.returncode == 0
    assert "--json" in done.stdout
    assert "--quiet" in done.stdout


def test_no_arguments_show_the_help(ditf):
    done = ditf()
    assert done.returncode == 0
    assert "doctor" in done.stdout


@pytest.mark.parametrize("verb", ["inspect", "check"])
def test_a_reader_that_leaves(demo_bundle, verb):
    """Exit code 1 means a failed gate: a closed pipe is none."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ditf", verb, demo_bundle, "--quiet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 0


def test_a_reader_of_messages_that_leaves(demo_bundle, tmp_path):
    Image.new("RGB", (20, 20), "teal").save(tmp_path / "a.png")
    process = subprocess.Popen(
        [sys.executable, "-m", "ditf", "match", demo_bundle, "a.png", "a.png", "9,9", "--json", "m.json"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stderr.close()
    assert process.stdout.read().startswith(b"source")
    process.stdout.close()
    assert process.wait(60) == 0
    assert json.loads((tmp_path / "m.json").read_text())["ok"]


ESCAPES = "\x1b[2J\x1b]0;owned\x07"


def test_escapes_of_a_manifest_reach_no_terminal(ditf, demo_bundle, tmp_path):
    bundle = shutil.copytree(demo_bundle, tmp_path / "bundle")
    document = json.loads((bundle / "manifest.json").read_text())
    document["model"]["id"] = document["layer_name"] = document["prompt"] = f"a{ESCAPES}"
    document["versions"]["torch"] = document["command"] = f"b{ESCAPES}"
    (bundle / "manifest.json").write_text(json.dumps(document))
    for verb, *more in (["inspect"], ["check", "--verbose"], ["bench", "--seconds", "0.1"]):
        done = ditf(verb, bundle, *more)
        assert "\x1b" not in done.stdout + done.stderr, verb
        assert "\x07" not in done.stdout + done.stderr, verb
    assert "a\\x1b[2J\\x1b]0;owned\\x07" in ditf("inspect", bundle).stdout


def test_escapes_of_a_file_name_reach_no_terminal(ditf, demo_bundle, tmp_path):
    (tmp_path / f"{ESCAPES}.png").write_bytes(b"no picture")
    for arguments in (
        ("inspect", tmp_path / f"none{ESCAPES}"),
        ("match", demo_bundle, f"{ESCAPES}.png", f"{ESCAPES}.png", "--points", "1,1", "--verbose"),
        ("match", demo_bundle, "left.png", f"--{ESCAPES}"),
        (f"verb{ESCAPES}",),
    ):
        done = ditf(*arguments)
        assert done.returncode == 2, done.stderr
        assert "\x1b" not in done.stderr
        assert "\\x1b[2J" in done.stderr


def test_no_such_verb(ditf):
    done = ditf("compile")
    assert done.returncode == 2
    assert done.stderr == "error: No such command 'compile'.\n"


def test_inspect(ditf, pixart_bundle, tmp_path):
    done = ditf("inspect", pixart_bundle, "--json", "inspect.json")
    assert done.returncode == 0, done.stderr
    for text in ("layer 2 = block.2 of 4", "features.onnx.data", "VAE encoder", "float16", "residual"):
        assert text in done.stdout
    manifest = json.loads((tmp_path / "inspect.json").read_text())["manifest"]
    assert manifest["batch"] == "dynamic"


def test_inspect_of_what_is_no_bundle(ditf, tmp_path):
    done = ditf("inspect", tmp_path)
    assert done.returncode == 2
    assert "is not a bundle" in done.stderr
    assert ditf("inspect", "absent").returncode == 2


def test_doctor(ditf, tmp_path):
    done = ditf("doctor", "--json", "doctor.json")
    assert done.returncode == 0, done.stderr
    assert "onnxruntime: opens" in done.stdout
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert report["backends"]["onnxruntime"]["available"] is True


def test_json_into_a_fifo(ditf, demo_bundle, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with subprocess.Popen(["cat", tmp_path / "fifo"], stdout=subprocess.PIPE, text=True) as reader:
        done = ditf("inspect", demo_bundle, "--json", "fifo")
        text = reader.stdout.read()
    assert done.returncode == 0, done.stderr
    assert json.loads(text)["ok"]
    assert (tmp_path / "fifo").is_fifo()


def test_json_into_a_link_of_a_folder_that_is_not_there(ditf, demo_bundle, tmp_path):
    (tmp_path / "link").symlink_to("absent/file")
    done = ditf("inspect", demo_bundle, "--json", "link")
    assert done.returncode == 2
    assert "absent is not a directory; make it first" in done.stderr


@pytest.mark.parametrize(
    "arguments", [("inspect", "--json", "loop"), ("export-triton", "--repository", "loop")]
)
def test_links_in_a_circle(ditf, demo_bundle, tmp_path, arguments):
    (tmp_path / "loop").symlink_to("other")
    (tmp_path / "other").symlink_to("loop")
    verb, *rest = arguments
    done = ditf(verb, demo_bundle, *rest)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "loop" in done.stderr
