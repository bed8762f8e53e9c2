from __future__ import annotations

import json
import shutil

import pytest

from ditf.export.estimate.devices import DEVICES


def test_a_directory_with_configs_and_no_weights(ditf, checkpoint, tmp_path):
    shutil.copytree(checkpoint("sd35"), tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    for folder in ("text_encoder", "tokenizer"):  # a plan needs none of them
        shutil.rmtree(tmp_path / "configs" / folder)
    arguments = ("--model", "configs", "--layer", "2", "--fp16", "--size", "48x80", "--json", "p.json")
    done = ditf("plan", *arguments)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "p.json").read_text())
    assert (document["schema"], document["ok"], document["layer"]) == (1, True, 2)
    assert document["size"] == [48, 80]
    assert set(document["devices"]) == set(DEVICES)
    assert all(device["fits"] for device in document["devices"].values())
    assert sum(work["flops"] for work in document["work"]) > 0
    for name in ("layer 2 = block.2 of 4", "VAE encoder", "attention", "orin-nano", "on disk"):
        assert name in done.stdout


def test_another_encoder(ditf, tmp_path):
    arguments = ("--model", "PixArt-XL/2 512", "--layer", "9", "--fp16")
    documents = []
    for vae in ([], ["--vae", "madebyollin/taesd"]):
        done = ditf("plan", *arguments, *vae, "--json", "p.json")
        assert done.returncode == 0, done.stderr
        documents.append(json.loads((tmp_path / "p.json").read_text()))
    assert "encoder: madebyollin/taesd (AutoencoderTiny)" in done.stdout
    assert [document["vae"] for document in documents] == [
        None,
        {"id": "madebyollin/taesd", "revision": None, "class": "AutoencoderTiny"},
    ]
    full, tiny = ({w["part"]: w["flops"] for w in document["work"]} for document in documents)
    assert full.pop("VAE encoder") > 9 * tiny.pop("VAE encoder")
    assert full == tiny


def test_what_does_not_fit_is_a_gate(ditf, tmp_path):
    arguments = ("--model", "fal/AuraFlow", "--layer", "14", "--device", "orin-nano", "--json", "p.json")
    done = ditf("plan", *arguments)
    assert done.returncode == 1
    assert "does not fit" in done.stdout
    assert "the Jetson Orin Nano 8 GB has 8.00 GB; what fits: --precision fp16" in done.stderr
    document = json.loads((tmp_path / "p.json").read_text())
    assert document["ok"] is document["gates"][0]["ok"] is False
    assert document["gates"][0]["value"] > document["gates"][0]["limit"] == 8e9
    assert "--precision fp16" in document["remedies"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "orin-9000"], "unknown device 'orin-9000'; choose orin-nano, orin-nano-super, orin-nx"),
        (["--model", "nobody/knows"], "is no directory, and no published model whose config is known"),
        (["--model", ""], "is no directory"),
        (["--layer", "12"], "layer 12 is out of range"),
        (["--size", "60x64"], "not a multiple of 8"),
        (["--batch", "0"], "batch 0 is out of range"),
        (["--ensemble", "0"], "--ensemble 0"),
        (["--precision", "fp4"], "'fp4' is not fp32, fp16, bf16, int8"),
        (["--text-tokens", "5"], "reads no text"),
        (["--device", "thor", "--precision", "int8"], "no int8 rate is published for the Jetson AGX Thor"),
        (["--vae", "madebyollin/taesd"], "works in pixels and has no VAE"),
        (["--vae", "nobody/knows"], "is no directory, and no published VAE whose config is known"),
        (["--json", "no/such/place.json"], "is not a directory"),
    ],
)
def test_bad_input(ditf, arguments, message):
    done = ditf("plan", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_an_empty_directory(ditf, tmp_path):
    (tmp_path / "empty").mkdir()
    done = ditf("plan", "--model", "empty")
    assert done.returncode == 2
    assert "it has no transformer/config.json" in done.stderr


def test_configs_that_make_no_model_that_runs(ditf, checkpoint, tmp_path):
    shutil.copytree(checkpoint("dit"), tmp_path / "odd")
    path = tmp_path / "odd" / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "down_block_types": []}))
    done = ditf("plan", "--model", "odd", "--layer", "1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "make no model that runs" in done.stderr
