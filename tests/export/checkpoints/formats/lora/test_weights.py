"""Weights with LoRAs folded in, against diffusers' pipelines and PEFT, which load and fuse the same files."""

from __future__ import annotations

import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from ditf.export.checkpoints.formats.lora.given import Lora
from ditf.export.checkpoints.layout import Checkpoint
from tests.export.checkpoints.formats.lora.lora_files import (
    CHROMA,
    DOTS,
    FLUX,
    FLUX2,
    FLUX_XLABS,
    KOHYA,
    PEFT,
    XLABS,
    ZIMAGE,
    factors,
    saved,
)

CLOSE = 3e-7  # a rounding of float32, of weights up to 3
SCALE = 0.7


def pipeline_of(folder: Path):
    """The checkpoint's pipeline with its transformer only."""
    index = Checkpoint(folder, "it").index()
    named = {name for name, entry in index.items() if isinstance(entry, list)}
    absent = dict.fromkeys(named - {"transformer", "scheduler"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return DiffusionPipeline.from_pretrained(folder, **absent)


def fused_by_pipeline(folder: Path, files, scale):
    """The transformer's tensors after diffusers has loaded and fused LoRA files."""
    pipeline = pipeline_of(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for index, file in enumerate(files):
            pipeline.load_lora_weights(str(file), adapter_name=f"lora{index}")
    pipeline.set_adapters([f"lora{index}" for index in range(len(files))])
    pipeline.fuse_lora(lora_scale=scale)
    return own_tensors(pipeline.transformer)


def own_tensors(model):
    state = model.state_dict()
    return {name.replace(".base_layer", ""): value for name, value in state.items() if ".lora_" not in name}


def trained(pipeline, folder: Path, **config) -> Path:
    """A LoRA file that diffusers writes, for a transformer with random factors."""
    torch.manual_seed(1)
    transformer = pipeline.transformer
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    given = {"r": 4, "lora_alpha": 2, "init_lora_weights": False, "target_modules": linears, **config}
    transformer.add_adapter(LoraConfig(**given))
    move_magnitudes(transformer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Adapter 'default'")  # a bias of B has one dimension
        layers = get_peft_model_state_dict(transformer)
    metadata = _collate_lora_metadata({"transformer": transformer})
    pipeline.save_lora_weights(folder, transformer_lora_layers=layers, **metadata)
    return folder / "pytorch_lora_weights.safetensors"


def move_magnitudes(model):
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1.3)


def check(folder: Path, loras, expected, changed=None, component="transformer"):
    """Compare all tensors; the LoRAs together have to change exactly those that differ in `expected`."""
    plain = Checkpoint(folder, "it").weights(component)
    weights = Checkpoint(folder, "it", loras=tuple(loras)).weights(component)
    assert weights.shapes.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (weights.tensor(name) - tensor).abs().max() < CLOSE, name
    moved = {name for name, tensor in expected.items() if not torch.equal(tensor, plain.tensor(name))}
    assert set().union(*weights.changed) == moved
    if changed is not None:
        assert len(moved) == changed


@pytest.mark.parametrize("name", ["flux", "sd35", "auraflow", "lumina2", "chroma", "zimage", "flux2"])
def test_a_file_that_diffusers_writes_is_folded_as_its_pipeline_fuses_it(checkpoint, name, tmp_path):
    folder = checkpoint(name)
    file = trained(pipeline_of(folder), tmp_path)
    check(folder, [Lora(file, SCALE)], fused_by_pipeline(folder, [file], SCALE))


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {
            "rank_pattern": {"to_q": 2, "transformer_blocks.0.attn.to_k": 8},
            "alpha_pattern": {"to_q": 7, "^transformer_blocks.0.attn.to_k": 3},
        },
        {"use_dora": True},
        {"lora_bias": True, "target_modules": ["to_q", "ff.net.2"]},
    ],
    ids=["root of the rank", "ranks and alphas of single modules", "DoRA", "bias"],
)
def test_the_kinds_of_lora_that_peft_trains(checkpoint, config, tmp_path):
    folder = checkpoint("flux")
    file = trained(pipeline_of(folder), tmp_path, **config)
    check(folder, [Lora(file, SCALE)], fused_by_pipeline(folder, [file], SCALE))


def test_a_convolution(checkpoint, tmp_path):
    folder = checkpoint("sd35")
    file = trained(pipeline_of(folder), tmp_path, target_modules=["pos_embed.proj", "to_q"])
    check(folder, [Lora(file, SCALE)], fused_by_pipeline(folder, [file], SCALE))


def test_several_loras_are_folded_in_their_order(checkpoint, tmp_path):
    """A DoRA after another LoRA scales rows by the lengths that they have without it, as in PEFT."""
    folder = checkpoint("flux")
    plain = saved(tmp_path / "plain.safetensors", factors(FLUX, "lora_unet_", KOHYA, alpha=9, joint="_"))
    dora = trained(pipeline_of(folder), tmp_path, use_dora=True)
    files = [plain, dora]
    check(folder, [Lora(file, SCALE) for file in files], fused_by_pipeline(folder, files, SCALE))
    a, b = (
        Checkpoint(folder, "it", loras=tuple(map(Lora, order))).weights("transformer")
        for order in (files, files[::-1])
    )
    name = "transformer_blocks.0.attn.to_q.weight"
    assert (a.tensor(name) - b.tensor(name)).abs().max() > 0.01


LAYOUTS = {
    "Kohya's FLUX": ("flux", 34, factors(FLUX, "lora_unet_", KOHYA, alpha=2, joint="_")),
    "ComfyUI's FLUX": ("flux", 34, factors(FLUX, "diffusion_model.", KOHYA, alpha=2)),
    "FLUX without alphas": ("flux", 34, factors(FLUX, "diffusion_model.", KOHYA)),
    "XLabs' FLUX": ("flux", 28, factors(FLUX_XLABS, "", XLABS)),
    "Kohya's Chroma": ("chroma", 27, factors(CHROMA, "lora_unet_", KOHYA, alpha=2, joint="_")),
    "Kohya's FLUX.2": ("flux2", 30, factors(FLUX2, "lora_unet_", KOHYA, alpha=2, joint="_")),
    "ai-toolkit's FLUX.2": ("flux2", 30, factors(FLUX2, "diffusion_model.", PEFT)),
    "PEFT's FLUX.2 with BFL's names": ("flux2", 30, factors(FLUX2, "base_model.model.", PEFT)),
    "Z-Image with the same change twice": (
        "zimage",
        12,
        factors(
            {f"layers.{block}.attention.qkv": (144, 48) for block in range(3)}, "lora_unet_", DOTS, joint="_"
        )
        | factors(
            {f"layers.{block}.attention.to_{one}": (48, 48) for block in range(3) for one in "qkv"}
            | {f"layers.{block}.attention.out": (48, 48) for block in range(3)},
            "lora_unet_",
            DOTS,
            joint="_",
        ),
    ),
    "Kohya's Z-Image": ("zimage", 18, factors(ZIMAGE, "lora_unet_", KOHYA, alpha=2, joint="_")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_other_trainers(checkpoint, layout, tmp_path):
    name, changed, tensors = LAYOUTS[layout]
    file = saved(tmp_path / "lora.safetensors", tensors)
    folder = checkpoint(name)
    check(folder, [Lora(file, SCALE)], fused_by_pipeline(folder, [file], SCALE), changed)


def test_modules_that_the_pipeline_drops_are_folded_too(checkpoint, tmp_path):
    """diffusers 0.42 gives img_in and the like of Kohya's FLUX no prefix, and then skips them."""
    modules = {"img_in": (48, 16), "txt_in": (48, 32), "time_in.in_layer": (48, 256)}
    tensors = factors(modules, "lora_unet_", KOHYA, alpha=2, joint="_")
    file = saved(tmp_path / "lora.safetensors", tensors)
    weights = Checkpoint(checkpoint("flux"), "it", loras=(Lora(file),)).weights("transformer")
    plain = Checkpoint(checkpoint("flux"), "it").weights("transformer")
    names = ("x_embedder", "context_embedder", "time_text_embed.timestep_embedder.linear_1")
    for module, name in zip(modules, names, strict=True):
        flat = f"lora_unet_{module.replace('.', '_')}"
        change = tensors[f"{flat}.lora_up.weight"] @ tensors[f"{flat}.lora_down.weight"] * 2 / 4
        expected = plain.tensor(f"{name}.weight") + change
        assert (weights.tensor(f"{name}.weight") - expected).abs().max() < CLOSE


@pytest.mark.parametrize("name", ["pixart", "dit"])
def test_a_folder_that_peft_writes_is_folded_as_peft_merges_it(checkpoint, name, tmp_path):
    """DiT and PixArt have no loader in diffusers; alpha is in adapter_config.json beside the file."""
    folder = checkpoint(name)
    model_class = getattr(diffusers, Checkpoint(folder, "it").config("transformer")["_class_name"])
    model = model_class.from_pretrained(folder / "transformer")
    wide = [n for n, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 7, "alpha_pattern": {"to_q": 3}, "use_dora": True}
    adapted = get_peft_model(model, LoraConfig(target_modules=wide, init_lora_weights=False, **settings))
    move_magnitudes(adapted)
    adapted.save_pretrained(tmp_path)
    merged = adapted.merge_and_unload().state_dict()
    check(folder, [Lora(tmp_path / "adapter_model.safetensors")], merged, len(wide))


def test_the_part_of_a_text_encoder(checkpoint, tmp_path):
    """Kohya's CLIP part of a FLUX LoRA. diffusers 0.42 drops its attention with transformers 5."""
    modules = {
        f"text_model.encoder.layers.{layer}.{module}": shape
        for layer in range(2)
        for module, shape in {"mlp.fc1": (32, 16), "mlp.fc2": (16, 32)}.items()
    }
    tensors = factors(modules, "lora_te1_", KOHYA, alpha=3, joint="_")
    file = saved(tmp_path / "lora.safetensors", tensors)
    folder = checkpoint("flux")
    pipeline = diffusers.FluxPipeline.from_pretrained(folder, vae=None)
    pipeline.load_lora_weights(str(file))
    pipeline.fuse_lora(["text_encoder"], lora_scale=SCALE)
    check(folder, [Lora(file, SCALE)], own_tensors(pipeline.text_encoder), 4, "text_encoder")
    t5 = Checkpoint(folder, "it", loras=(Lora(file),)).weights("text_encoder_2")
    assert t5.changed == [set()]


def test_differences_are_added_as_they_are(checkpoint, tmp_path):
    difference, bias = torch.randn(48, 48), torch.randn(3 * 48)
    tensors = {
        "diffusion_model.double_blocks.0.img_attn.proj.diff": difference,
        "diffusion_model.double_blocks.0.img_attn.qkv.diff_b": bias,
    }
    file = saved(tmp_path / "lora.safetensors", tensors)
    plain = Checkpoint(checkpoint("flux"), "it").weights("transformer")
    weights = Checkpoint(checkpoint("flux"), "it", loras=(Lora(file, 0.5),)).weights("transformer")
    changes = {
        "to_out.0.weight": difference,
        **dict(zip(("to_q.bias", "to_k.bias", "to_v.bias"), bias.split(48), strict=True)),
    }
    for name, change in changes.items():
        name = f"transformer_blocks.0.attn.{name}"
        torch.testing.assert_close(weights.tensor(name), plain.tensor(name) + 0.5 * change)
    assert len(weights.changed[0]) == 4


def test_the_fingerprint_follows_file_and_scale_but_not_the_place(checkpoint, tmp_path):
    folder = checkpoint("flux")
    tensors = factors(FLUX, "lora_unet_", KOHYA, alpha=2, joint="_")
    a, same = (saved(tmp_path / place / "lora.safetensors", tensors) for place in ("a", "b"))
    tensors["lora_unet_double_blocks_0_img_mlp_0.lora_up.weight"][100] += 1
    other = saved(tmp_path / "other.safetensors", tensors)
    prints = [
        Checkpoint(folder, "it", loras=loras).weights("transformer").fingerprint()
        for loras in ((), (Lora(a),), (Lora(a, 0.5),), (Lora(other),), (Lora(a), Lora(other)))
    ]
    assert len(set(prints)) == len(prints)
    assert Checkpoint(folder, "it", loras=(Lora(same),)).weights("transformer").fingerprint() == prints[1]
    assert Checkpoint(folder, "it", loras=(Lora(a),)).weights("vae").fingerprint() == (
        Checkpoint(folder, "it").weights("vae").fingerprint()
    )
