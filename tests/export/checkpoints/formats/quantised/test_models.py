"""Models of quantised files; the judge is `from_pretrained` of a checkpoint that is dequantised here."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import AutoencoderKL, PixArtAlphaPipeline
from safetensors.torch import load_file, save_file

from ditf.export.checkpoints import offload
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.loading import load_model
from ditf.export.families.pixart import PixArt
from tests.export.checkpoints.formats.quantised.quantised_files import quantised_copy

KINDS = ["int8", "comfy", "inv"]


def dequantised_twin(source, folder, component, quantised, names, kind):
    """A plain copy of a checkpoint, with the numbers that the quantised tensors stand for."""
    shutil.copytree(source, folder)
    path = next((folder / component).glob("*.safetensors"))
    plain, tensors = load_file(path), load_file(quantised / component / path.name)
    scale = {"int8": "SCB", "comfy": "scale_weight", "inv": "weight_scale_inv"}[kind]
    for name in names:
        factor = tensors[name.removesuffix("weight") + scale]
        plain[name] = tensors[name].float() * (factor[:, None] / 127 if kind == "int8" else factor)
    save_file(plain, path, {"format": "pt"})


@pytest.mark.parametrize("resident", [1 << 30, 0], ids=["resident", "streamed"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_text_encoders(tiny_pixart, tmp_path, monkeypatch, kind, resident):
    """Before, int8 gave a cosine of -0.07 and FP8 of 0.06 with the right embeddings, and no error."""
    names = quantised_copy(tiny_pixart, tmp_path / "q", "text_encoder", kind)
    dequantised_twin(tiny_pixart, tmp_path / "twin", "text_encoder", tmp_path / "q", names, kind)
    monkeypatch.setattr(offload, "RESIDENT", resident)
    family = PixArt(Checkpoint(tiny_pixart, "x").config("transformer"))
    found = family.encode_conditions(Checkpoint(tmp_path / "q", "q"), ["a photo"], None)[0]["prompt_embeds"]
    judge = PixArtAlphaPipeline.from_pretrained(tmp_path / "twin", transformer=None, vae=None)
    expected, mask, _, _ = judge.encode_prompt("a photo", do_classifier_free_guidance=False)
    tokens = int(mask.sum())
    torch.testing.assert_close(found[0, :tokens], expected[0, :tokens], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_vae(tiny_pixart, tmp_path, kind):
    names = quantised_copy(tiny_pixart, tmp_path / "q", "vae", kind)
    dequantised_twin(tiny_pixart, tmp_path / "twin", "vae", tmp_path / "q", names, kind)
    vae = load_model(AutoencoderKL, Checkpoint(tmp_path / "q", "q"), "vae")
    judge = AutoencoderKL.from_pretrained(tmp_path / "twin" / "vae")
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(vae.encode(pixels).latent_dist.mean, judge.encode(pixels).latent_dist.mean)
