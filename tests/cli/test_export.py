"""`ditf export` as a process: output, exit codes, and what a killed export leaves."""

from __future__ import annotations

import hashlib
import json
import re
import resource
import shutil
import signal
import sys

import pytest

from ditf.runtime.bundles.manifest import read_manifest
from tests.checkpoints import planted, save_untrained
from tests.processes import started

FEED_FORWARD = "transformer_blocks.0.ff.net.2"


def test_the_first_command(ditf, tmp_path):
    done = ditf("export", "--layer", "1", "--fp16", "--size", "64x64", "--json", "export.json")
    assert done.returncode == 0, done.stderr
    assert "layer 1 = block.1 of 12" in done.stdout
    assert "[12/12" in done.stderr  # plain lines in a log
    bundle = tmp_path / "bundles" / "demo-l1-fp16"
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["command"] == "ditf export --layer 1 --fp16 --size 64x64 --json export.json"
    report = json.loads((tmp_path / "export.json").read_text())
    assert report["ok"] is True
    assert report["schema"] == 1
    listed = {*manifest["files"], "manifest.json"}
    assert {path.name for path in bundle.iterdir()} == listed


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--layer", "99"], 2, "layers 0..11, or block.0..block.11"),
        (["--size", "100x100"], 2, "nearest are 96x96 and 104x104"),
        (["--size", "large"], 2, "is not HxW"),
        (["--discard", "many"], 2, "is not auto, published, none or channels"),
        (["--batch", "some"], 2, "is not a number or dynamic"),
        (["--noise", "pink"], 2, "--noise pink"),
        (["--ensemble", "0"], 2, "--ensemble 0"),
        (["--model", "absent"], 2, "no such directory"),
        (["--fp17"], 2, "No such option"),
        (["--discard", "-1"], 2, "channels are 0..127"),
        (["--pca", "0"], 2, "--pca 0: "),
        (["--pca", "129"], 2, "choose 1..128"),
        (["--features-dtype", "float8"], 2, "--features-dtype float8: "),
        (["--opset", "26"], 2, "choose 18..25"),
        (["--output", "/proc/bundle"], 2, "cannot be written"),
        (["--json", "absent/file.json"], 2, "is not a directory"),
        (["--build", "--target", "sm_89,sm_99"], 2, "unknown target 'sm_99'"),
    ],
)
def test_errors_are_one_line(ditf, tmp_path, arguments, code, message):
    done = ditf("export", *arguments, "--quiet")
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not done.stdout
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_encoder_of_another_latent_space(ditf, tmp_path, vaes):
    arguments = ("--model", vaes.checkpoint, "--vae", vaes.other, "--size", "64x64", "--quiet")
    done = ditf("export", *arguments)
    assert done.returncode == 2
    assert "does not encode into the latent space of this model" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_another_encoder_is_named(ditf, vaes):
    arguments = ("--model", vaes.checkpoint, "--vae", vaes.tiny, "--layer", "1", "--size", "64x64")
    done = ditf("export", *arguments, "--json", "export.json")
    assert done.returncode == 0, done.stderr
    assert "bundles/checkpoint-l1-fp32-tiny: layer 1" in done.stdout
    assert "x_0 off by 0." in done.stdout
    assert "[11/11" in done.stderr


def test_verbose_shows_the_traceback(ditf):
    done = ditf("export", "--layer", "99", "--verbose")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("place", ["/", ".", "..", "model"])
def test_places_that_must_not_be_replaced(ditf, tmp_path, place):
    """One line before anything is loaded; even where a manifest would let it be replaced."""
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "model").mkdir()
    done = ditf("export", "--model", "model", "--layer", "1", "--output", place)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {place} ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "model"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_leaves_nothing(tmp_path, number):
    command = [sys.executable, "-m", "ditf", "export", "--layer", "9"]
    with started(command, cwd=tmp_path) as process:
        for line in process.stderr:  # wait until it works in its temporary directory
            if "calibrating" in line:
                break
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == 128 + number
    assert "Traceback" not in rest
    assert rest.splitlines()[-1].endswith("nothing was left half-written")
    assert not list((tmp_path / "bundles").iterdir())


@pytest.mark.parametrize("model", ["tiny_pixart", "demo"])
def test_a_full_disk_leaves_nothing(request, ditf, tmp_path, model):
    """A limit on file size stands in for a full disk: both fail in the middle of writing a file."""
    model = model if model == "demo" else request.getfixturevalue(model)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # Python ignores the signal of it
    try:
        done = ditf("export", "--model", model, "--layer", "2", "--size", "64x64", "-q", "-o", "bundle")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_bfloat16_bundle(ditf, bfloat16_bundle):
    """Its features are float16; a CPU has no kernels for it, and says so."""
    manifest = read_manifest(bfloat16_bundle)
    assert manifest.precision == "bfloat16"
    assert manifest.rehearsal["cosine_p01"] > 0.999
    assert "bfloat16" in manifest.parts["feed-forward"]
    done = ditf("check", bfloat16_bundle)
    assert done.returncode == 3
    assert "has no kernel on CPUExecutionProvider" in done.stderr
    assert "--precision fp16" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "fp8"], "--precision 'fp8' is not fp32, fp16, bf16, int8"),
        (["--precision", "bf16", "--fp16"], "contradict"),
    ],
)
def test_precisions_that_are_not(ditf, arguments, message):
    done = ditf("export", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_exceptions_are_printed_and_inspected(ditf, tmp_path):
    save_untrained(tmp_path / "demo")
    planted(tmp_path / "demo", tmp_path / "planted", "transformer", {FEED_FORWARD: 1e6})
    done = ditf("export", "--model", "planted", "--layer", "2", "--fp16", "--size", "64x64", "-o", "b")
    assert done.returncode == 0, done.stderr
    assert re.search(rf"recipe: .*{FEED_FORWARD} scaled by 2\*\*-\d", done.stderr)
    shown = ditf("inspect", "b").stdout
    assert re.search(
        rf"{FEED_FORWARD} +scaled by 2\*\*-\d +scaled weight of {FEED_FORWARD} reaches 1e\+06", shown
    )


def test_embeddings_go_from_one_machine_to_another(ditf, checkpoint, tmp_path):
    """Where they go there are no encoders, and here no reference either: then nothing can be checked."""
    model = checkpoint("flux")
    done = ditf("export", "--model", model, "--prompt", "a cat", "--save-prompt-embeds", "cat.safetensors")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "cat.safetensors: embeddings of 'a cat'\n"
    assert [path.name for path in tmp_path.iterdir()] == ["cat.safetensors"]
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("text_encoder*", "tokenizer*"))
    arguments = ["--model", bare, "--layer", "0", "--size", "48x80", "--prompt-embeds", "cat.safetensors"]
    done = ditf("export", *arguments, "--golden", "none", "--discard", "none", "-o", "b")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "b")
    sha256 = hashlib.sha256((tmp_path / "cat.safetensors").read_bytes()).hexdigest()
    assert manifest.prompt == "a cat"
    assert manifest.conditions[0]["prompt_embeds"] == sha256
    for flags in ([], ["--ranges"], ["--ladder"], ["--bisect"]):
        done = ditf("check", "b", *flags)
        assert done.returncode == 2
        assert "exported with --golden none: there is nothing to compare it with; export it" in done.stderr
        assert not done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--golden", "maybe"], "--golden maybe: "),
        (["--golden", "none"], "--discard auto measures"),
        (["--prompt-embeds", "absent.safetensors"], "dit reads no text"),
        (["--save-prompt-embeds", "x.safetensors"], "dit reads no text"),
        (["--save-prompt-embeds", "absent/x.safetensors"], "is not a directory"),
    ],
)
def test_flags_of_large_models(ditf, tmp_path, arguments, message):
    done = ditf("export", *arguments, "-q")
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
