"""The checkpoint's own pipeline: how its parts are loaded, and every way in which a condition is given."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ditf.calib.parity import feature_parity
from ditf.export import exporter
from ditf.export.checkpoints.formats.lora.given import Lora
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.measure.golden import GoldenCase, golden_outputs
from ditf.export.measure.oracle import choice
from ditf.export.measure.oracle.choice import PipelineFails, why_not
from ditf.export.measure.oracle.oracle import Oracle
from ditf.export.measure.oracle.own_pipeline import OwnPipeline
from ditf.export.measure.oracle.parts import Parts
from ditf.export.planning.conditions import trim
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import make_plan
from ditf.runtime.errors import InputError
from tests.export.parity import PROMPTS, SETTINGS, photographs, plan_of, planned

SIZE = (48, 80)
TEXTS = ("pixart", "sd35", "flux", "flux2", "auraflow", "lumina2", "zimage", "chroma")


@pytest.mark.parametrize("name", TEXTS)
def test_embeddings_and_fewer_text_tokens(checkpoint, name):
    """Embeddings that are given are those of the prompt, whole and cut; fewer tokens are other features."""
    plan, entries = planned(checkpoint(name), "3", SIZE, 1, 2, "bank", False, text_tokens=32)
    oracle = Oracle(plan, OwnPipeline(plan, plan.entries))
    photo = photographs(SIZE)[:1]
    prompt = plan.entries[1]
    assert prompt.prompt == PROMPTS[1]
    maps = {}
    for whole in (True, False):
        text = trim(entries[1:], plan.family, tokens=None if whole else 32)[0]
        given = oracle.maps(replace(text, embeds="given"), photo, SETTINGS)[0]
        maps[whole] = oracle.maps(prompt, photo, SETTINGS, whole=whole)[0]
        assert feature_parity(given, maps[whole])["relative_error"] < 5e-6
    assert np.abs(maps[True] - maps[False]).max() > 1e-4


def test_embeddings_need_no_text_encoders(checkpoint, tmp_path):
    plan, entries = planned(checkpoint("flux"), "1", SIZE, 1, 2, "bank", False)
    folder = shutil.copytree(checkpoint("flux"), tmp_path / "flux")
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(folder / part)
    moved = replace(plan, checkpoint=Checkpoint(folder, "flux"))
    own = OwnPipeline(moved, [replace(entry, embeds="given") for entry in entries])
    assert own.record["text"] == "prompt embeds given"
    Oracle(moved, own).maps(replace(entries[0], embeds="given"), photographs(SIZE)[:1], SETTINGS)


def test_text_encoders_are_freed_before_the_transformer_is_loaded(checkpoint, monkeypatch):
    seen = []
    text, transformer = Parts.text, Parts.transformer

    def watched(self):
        found = text(self)
        seen.extend(weakref.ref(part) for name, part in found.items() if name.startswith("text"))
        return found

    def loading(self):
        assert len(seen) == 3
        assert not any(reference() for reference in seen)
        return transformer(self)

    monkeypatch.setattr(Parts, "text", watched)
    monkeypatch.setattr(Parts, "transformer", loading)
    plan = plan_of(checkpoint("sd3"), "1", SIZE, 1, 1, "bake", False)
    OwnPipeline(plan, plan.entries)


def changed(source, folder, part, change):
    """A copy of a checkpoint with other tensors in one part."""
    shutil.copytree(source, folder)
    path = next((folder / part).glob("*.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return folder


QUERY = "encoder.block.0.layer.0.SelfAttention.q"


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("text_encoder", lambda t: t.pop(f"{QUERY}.weight"), f"{QUERY}.weight random, because"),
        ("text_encoder", lambda t: t.update({f"{QUERY}.scale_weight": torch.ones(1)}), "scale_weight in the"),
        (
            "text_encoder",
            lambda t: t.update({f"{QUERY}.lora_A.default.weight": torch.ones(4, 32)}),
            "lora_A.default.weight in the file and not read",
        ),
        ("vae", lambda t: t.update({"encoder.conv_in.scale": torch.ones(1)}), "conv_in.scale in the file"),
    ],
    ids=["missing", "scale", "adapter", "vae"],
)
def test_a_loading_report_with_a_complaint(tiny_pixart, tmp_path, part, change, message):
    plan = plan_of(tiny_pixart, "1", SIZE, 1, 1, "bake", False)  # which may refuse the changed one
    folder = changed(tiny_pixart, tmp_path / "pixart", part, change)
    plan = replace(plan, checkpoint=Checkpoint(folder, "pixart"))
    with pytest.raises(InputError, match=f"plain .*from_pretrained leaves .*{message}"):
        OwnPipeline(plan, plan.entries)


def test_tensors_of_no_part_may_be_left_over(tiny_pixart, tmp_path):
    """Such as the rest of the model that an encoder was saved with."""

    def change(tensors):
        tensors.update({"decoder.block.0.weight": torch.ones(1), "lm_head.weight": torch.ones(1)})

    folder = changed(tiny_pixart, tmp_path / "pixart", "text_encoder", change)
    plan = plan_of(folder, "1", SIZE, 1, 1, "bake", False)
    OwnPipeline(plan, plan.entries)


def test_what_cannot_be_its_own_judge(tiny_pixart, tmp_path):
    plan = plan_of(tiny_pixart, "1", SIZE, 1, 1, "bake", False)
    assert why_not(plan, 10**9, 2 * 10**9) is None
    assert why_not(plan, 10**9, None) is None
    assert "needs 2.0 GB in float32, and 1.0 GB are available" in str(why_not(plan, 2 * 10**9, 10**9))
    assert "available memory is unknown" in str(why_not(plan, 10**11, None))
    folder = shutil.copytree(tiny_pixart, tmp_path / "pixart")
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    moved = replace(plan, checkpoint=Checkpoint(folder, "pixart"))
    assert "its text_encoder is quantised" in str(why_not(moved, 1, 2))


def test_what_plain_from_pretrained_does_not_read(tiny_pixart, tmp_path):
    """Whatever makes the tensors others than those that are stored."""
    plan = plan_of(tiny_pixart, "1", SIZE, 1, 1, "bake", False)
    file = tiny_pixart / "transformer" / "diffusion_pytorch_model.safetensors"

    def reason(**changes):
        return why_not(replace(plan, checkpoint=replace(plan.checkpoint, **changes)), 1, 2)

    assert reason() is None
    assert reason(transformer=tiny_pixart / "transformer") is None
    assert reason(transformer=file) == "plain from_pretrained reads no single file"
    assert reason(loras=(Lora(file),)) == "plain from_pretrained reads no LoRA"

    def as_fp8(tensors):
        name = "transformer_blocks.0.attn1.to_q.weight"
        tensors.update({name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(())})

    folder = changed(tiny_pixart, tmp_path / "fp8", "transformer", as_fp8)
    assert "its transformer is quantised" in str(reason(path=folder))


def test_a_pipeline_that_cannot_run(checkpoint, tmp_path):
    """PixArtAlphaPipeline makes micro-conditions for a sample size of 128 only."""
    folder = shutil.copytree(checkpoint("pixart-1024"), tmp_path / "pixart")
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "sample_size": 16, "use_additional_conditions": True}))
    plan = plan_of(folder, "1", SIZE, 1, 1, "bake", False)
    with pytest.raises(PipelineFails, match="PixArtAlphaPipeline cannot be run on this checkpoint"):
        Oracle(plan, OwnPipeline(plan, plan.entries)).maps(plan.entries[0], photographs(SIZE), SETTINGS)


@pytest.mark.parametrize("streamed", ["no memory", "fails"])
def test_an_export_says_why_it_is_streamed(checkpoint, monkeypatch, tmp_path, streamed):
    reasons = {"no memory": "the whole pipeline needs", "fails": "DiTPipeline cannot be run"}
    if streamed == "fails":

        def run(self, *_):
            raise choice.PipelineFails("DiTPipeline cannot be run")

        monkeypatch.setattr(OwnPipeline, "run", run)
    else:
        monkeypatch.setattr(exporter, "available_bytes", lambda: 1000)

    def trace(self):
        recorded.update(self.golden.manifest)
        raise InterruptedError

    recorded = {}
    monkeypatch.setattr(exporter._Export, "trace", trace)
    lines = []
    options = ExportOptions(
        model=str(checkpoint("dit")), layer="1", size=SIZE, discard="none", output=tmp_path / "bundle"
    )
    with pytest.raises(InterruptedError):
        exporter.export_bundle(options, lines.append)
    assert recorded["oracle"] == "streamed"
    assert recorded["reason"].startswith(reasons[streamed])
    told = next(line for line in lines if "golden" in line)
    assert ("with the streamed model (the whole pipeline needs" in told) == (streamed == "no memory")


def test_golden_arrays_name_their_oracle(checkpoint):
    plan = make_plan(
        ExportOptions(model=str(checkpoint("dit")), layer="1", size=SIZE, class_label=("7",)),
        Checkpoint(checkpoint("dit"), "dit"),
    )
    oracle = Oracle(plan, OwnPipeline(plan, plan.entries))
    found = golden_outputs(oracle, photographs(SIZE), SETTINGS, 0, [GoldenCase(0, plan.entries[0])])
    assert json.loads(str(found.arrays["oracle"])) == {
        "oracle": "independent",
        "transformer": "DiTPipeline.__call__",
        "noise": "DDIMScheduler.add_noise",
        "text": "no text",
        "vae": "AutoencoderKL: vae.encode, and the inverse of the pipeline's decoding",
    }
    assert found.manifest["oracle"] == "independent"
    assert found.arrays["hidden_states"].shape[0] == 2
    assert (np.diff(found.arrays["hidden_rows"]) > 0).all()
