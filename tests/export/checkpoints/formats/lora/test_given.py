"""--lora FILE=SCALE, and exports with it."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ditf.calib.parity import feature_parity
from ditf.export.checkpoints.formats.lora.given import Lora, parse_lora
from ditf.export.checkpoints.formats.lora.weights import changes_text
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.exporter import export_bundle
from ditf.export.measure.calibration import measured_for
from ditf.export.planning.conditions import encode
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import make_plan
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.errors import InputError
from ditf.runtime.files.hashed import sha256
from ditf.runtime.model import Model
from tests.export.checkpoints.formats.lora.lora_files import KOHYA, PEFT, factors, saved
from tests.export.parity import SETTINGS, expected, photographs


def test_what_follows_the_last_equals_sign_is_a_scale_if_it_is_a_number(tmp_path, monkeypatch):
    for name in ("a.safetensors", "a=b.safetensors", "c.safetensors=2"):
        (tmp_path / name).touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_lora(f"{tmp_path}/a.safetensors") == Lora(tmp_path / "a.safetensors", 1)
    assert parse_lora(f"{tmp_path}/a.safetensors=0.5") == Lora(tmp_path / "a.safetensors", 0.5)
    assert parse_lora("~/a.safetensors=-1e-1") == Lora(tmp_path / "a.safetensors", -0.1)
    assert parse_lora(f"{tmp_path}/a=b.safetensors") == Lora(tmp_path / "a=b.safetensors", 1)
    assert parse_lora(f"{tmp_path}/a=b.safetensors=3") == Lora(tmp_path / "a=b.safetensors", 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("absent.safetensors", "no such file"),
        ("a.safetensors=nan", "a scale of nan"),
        ("a.safetensors=0", "a scale of 0"),
        ("a.safetensors=x", "no such file"),
        ("a.bin", "not a safetensors file.*pickles"),
        (".", r"is a directory.*--lora \S*a.safetensors"),
    ],
)
def test_what_is_no_lora_file_is_refused_when_the_options_are_made(text, message, tmp_path):
    for name in ("a.safetensors", "a.bin"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=message):
        ExportOptions(lora=(f"{tmp_path}/{text}",))


def test_the_bundle_is_named_after_the_loras_and_they_are_inputs(checkpoint, tmp_path):
    file = saved(
        tmp_path / "style.v2.safetensors", factors({"transformer_blocks.0.attn1.to_q": (48, 48)}, "", PEFT)
    )
    options = ExportOptions(model=str(checkpoint("dit")), lora=(str(file), f"{file}=0.5"))
    plan = make_plan(options, Checkpoint(checkpoint("dit"), "it"))
    assert plan.output.name.endswith("-fp32-style.v2-style.v2-0.5")
    assert file in options.inputs
    assert measured_for(plan) != measured_for(make_plan(replace(options, lora=()), plan.checkpoint))


def test_the_command_line_takes_several_files(ditf, tmp_path):
    (tmp_path / "a.safetensors").touch()
    done = ditf("export", "--lora", "a.safetensors=0.5", "--lora", "b.safetensors=2")
    assert done.returncode == 2
    assert "--lora b.safetensors: no such file" in done.stderr
    done = ditf("export", "--lora", "a.safetensors=0.5")
    assert done.returncode == 2
    assert "a.safetensors is not a readable safetensors file" in done.stderr


def test_an_export_has_the_features_of_the_changed_model(checkpoint, ditf, tmp_path):
    """The expected features are those of a checkpoint whose weights were changed here and saved."""
    modules = {
        f"transformer_blocks.{block}.attn1.{one}": (48, 48) for block in range(3) for one in ("to_q", "to_v")
    }
    modules |= {"transformer_blocks.0.ff.net.2": (48, 192)}
    tensors = factors(modules, "base_model.model.", PEFT)
    late = saved(tmp_path / "late.safetensors", factors({"proj_out_1": (96, 48)}, "", KOHYA))
    file = saved(tmp_path / "lora.safetensors", tensors)
    fused = shutil.copytree(checkpoint("dit"), tmp_path / "fused")
    path = fused / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for module in modules:
        down, up = (tensors[f"base_model.model.{module}.{one}.weight"] for one in PEFT)
        weights[f"{module}.weight"] += 1.5 * up @ down
    save_file(weights, path, {"format": "pt"})
    size = (64, 64)
    lines: list[str] = []
    options = ExportOptions(
        model=str(checkpoint("dit")),
        lora=(f"{file}=1.5", str(late)),
        layer="2",
        size=size,
        class_label=("7",),
        discard=SETTINGS.channels,
        golden="none",
        output=tmp_path / "bundle",
    )
    bundle = export_bundle(options, lines.append)
    assert (
        "lora.safetensors changes 5 tensors of transformer; late.safetensors changes nothing up to layer 2:"
        " the features are those without it"
    ) in lines
    assert Bundle.open(bundle).manifest.lora == [
        {"file": str(file), "sha256": sha256(file), "scale": 1.5, "tensors": {"transformer": 5}},
        {"file": str(late), "sha256": sha256(late), "scale": 1.0, "tensors": {}},
    ]
    assert f"{file}, 1.5 times" in ditf("inspect", str(bundle)).stdout
    image = photographs(size)[0]
    with Model(Bundle.open(bundle), "onnxruntime") as model:
        actual = np.asarray(model.run(image[None])[0])
    of_fused, of_plain = (expected(one, "2", size, 1, 1)[0] for one in (fused, checkpoint("dit")))
    assert feature_parity(actual.transpose(1, 2, 0), of_fused.transpose(1, 2, 0))["cosine_min"] > 1 - 1e-6
    assert feature_parity(actual.transpose(1, 2, 0), of_plain.transpose(1, 2, 0))["cosine_min"] < 0.99


def test_a_prompt_is_encoded_by_the_changed_text_encoder(checkpoint, tmp_path):
    modules = {f"encoder.layers.{layer}.mlp.fc1": (32, 16) for layer in range(2)}
    tensors = factors(modules, "lora_te1_", KOHYA, joint="_")
    file = saved(tmp_path / "lora.safetensors", tensors)
    encoders = Checkpoint(checkpoint("flux"), "it").text_encoders()
    assert changes_text(Lora(file), encoders)  # an export with --prompt-embeds warns
    fused = shutil.copytree(checkpoint("flux"), tmp_path / "fused")
    path = fused / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    for module in modules:
        down, up = (tensors[f"lora_te1_{module.replace('.', '_')}.{one}.weight"] for one in KOHYA)
        weights[f"{module}.weight"] += up @ down
    save_file(weights, path, {"format": "pt"})
    pooled, measured = {}, {}
    for name, folder, loras in (
        ("lora", checkpoint("flux"), (str(file),)),
        ("fused", fused, ()),
        ("plain", checkpoint("flux"), ()),
    ):
        options = ExportOptions(model=str(folder), lora=loras, size=(64, 64), prompt=("a cat",))
        plan = make_plan(options, Checkpoint(folder, "it"))
        with torch.no_grad():
            encoded = encode(plan.entries, plan.family, plan.checkpoint, plan.guidance)
        pooled[name] = encoded[0].condition["pooled_prompt_embeds"]
        measured[name] = measured_for(plan)["weights"]
    torch.testing.assert_close(pooled["lora"], pooled["fused"], atol=1e-6, rtol=1e-6)
    assert (pooled["lora"] - pooled["plain"]).abs().max() > 0.01
    assert measured["fused"] == measured["plain"] != measured["lora"]
