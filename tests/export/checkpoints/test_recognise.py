"""What people give as the model by mistake: each is named, with what to do, before any work.

The names of tensors are those of published files.
"""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditf.export.checkpoints.formats.file_kinds import check_weights_file
from ditf.export.checkpoints.hub import wanted_files
from ditf.export.checkpoints.opening import open_checkpoint
from ditf.export.checkpoints.recognise import listing_error
from ditf.runtime.errors import InputError
from tests.original_layouts import original_of

WEIGHTS = "diffusion_pytorch_model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 23802932552\n"

OTHERS = {
    "LoRA of diffusers": (
        ["transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight"],
        "a LoRA.*--lora",
    ),
    "LoRA of PEFT": (["base_model.model.transformer_blocks.0.attn.to_q.lora_B.weight"], "a LoRA.*--lora"),
    "LoRA of Kohya": (["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"], "a LoRA.*--lora"),
    "LoRA of ComfyUI": (["diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight"], "a LoRA.*--lora"),
    "LoKr": (["lycoris_transformer_blocks_0_attn_to_k.lokr_w1"], "a LoRA.*--lora"),
    "LoRA of XLabs": (["double_blocks.0.processor.proj_lora1.down.weight"], "a LoRA.*--lora"),
    "ControlNet 1.5": (["control_model.input_blocks.0.0.weight"], "a ControlNet.*--model"),
    "ControlNet of FLUX": (
        ["controlnet_x_embedder.weight", "transformer_blocks.0.norm1.linear.weight"],
        "a ControlNet",
    ),
    "IP-Adapter": (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "an image adapter"),
    "Redux": (["redux_up.weight", "redux_down.weight"], "an image adapter"),
    "SD 1.5": (
        ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight"],
        "a UNet.*SD3",
    ),
    "SDXL in diffusers": (["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"], "a UNet"),
    "Stable Cascade": (["clip_txt_mapper.weight"], "a Stable Cascade"),
    "Wan": (["head.modulation", "patch_embedding.weight"], "a Wan video model"),
    "HunyuanVideo": (
        [
            "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias",
            "double_blocks.0.img_mod.lin.weight",
        ],
        "a HunyuanVideo model",
    ),
    "Qwen-Image": (["transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"], "a Qwen-Image model"),
    "LTX-Video": (["model.diffusion_model.patchify_proj.weight"], "an LTX-Video model"),
    "Cosmos": (["net.blocks.block0.blocks.0.block.attn.to_q.0.weight"], "a Cosmos model"),
    "SANA": (
        ["attention_y_norm.weight", "t_block.1.weight", "blocks.0.cross_attn.q_linear.weight"],
        "a SANA model",
    ),
    "DiT": (
        ["y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight"],
        "a DiT in the layout.*facebook/DiT",
    ),
    "VAE of FLUX": (["encoder.conv_in.weight", "decoder.conv_in.weight"], "a VAE.*--vae"),
    "VAE of SD": (["first_stage_model.encoder.conv_in.weight"], "a VAE"),
    "CLIP": (["text_model.encoder.layers.0.mlp.fc1.weight"], "a text encoder.*--base"),
    "T5": (["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"], "a text encoder"),
    "Qwen3": (["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"], "a text encoder"),
    "embedding": (["emb_params"], "textual inversion"),
    "unknown": (
        ["my.weight"],
        r"no transformer that ditf knows: its first tensor is my\.weight; ditf exports PixArt",
    ),
}
"""Names of tensors, and the message."""


def refused(message, *given, **options):
    """Check that `open_checkpoint` refuses its arguments with a message."""
    with pytest.raises(InputError, match=message), open_checkpoint(*given, **options):
        pass


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_that_is_no_transformer(tiny_pixart, tmp_path, name):
    names, message = OTHERS[name]
    file = tmp_path / "file.safetensors"
    save_file({tensor: torch.zeros(2, 2) for tensor in names}, file)
    refused(message, str(file))
    refused(message, str(file), base=str(tiny_pixart))
    refused(message, str(tiny_pixart), transformer=str(file))


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("flux", "black-forest-labs/FLUX.1-dev"),
        ("schnell", "black-forest-labs/FLUX.1-schnell"),
        ("sd3", "stabilityai/stable-diffusion-3-medium-diffusers"),
        ("sd35", "stabilityai/stable-diffusion-3.5-medium"),
        ("sd35-large", "stabilityai/stable-diffusion-3.5-large"),
        ("pixart-1024", "PixArt-alpha/PixArt-XL-2-1024-MS"),
        ("auraflow", "fal/AuraFlow"),
        ("lumina2", "Alpha-VLLM/Lumina-Image-2.0"),
        ("zimage", "Tongyi-MAI/Z-Image-Turbo"),
        ("chroma", "lodestones/Chroma1-HD"),
        ("flux2", "black-forest-labs/FLUX.2-dev"),
    ],
)
def test_a_transformers_file_alone_names_its_base(checkpoint, tmp_path, name, base):
    folder = checkpoint(name)
    class_name = json.loads((folder / "transformer/config.json").read_text())["_class_name"]
    save_file(original_of(folder, class_name), tmp_path / "original.safetensors")
    shutil.copy(folder / "transformer" / WEIGHTS, tmp_path)
    for file in (tmp_path / "original.safetensors", tmp_path / WEIGHTS):
        refused(f"; add --base {base}, or the directory", str(file))


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        ("ckpt", b"PK\x03\x04", "is a pickle.*never opened; look for a .safetensors"),
        ("pt", b"", "is a pickle"),
        ("bin", b"\x80\x02}", "is a pickle"),
        ("safetensors", b"PK\x03\x04data", "is a pickle.*; save it as safetensors"),
        ("safetensors", POINTER.encode(), "is a Git LFS pointer.*git lfs pull"),
        ("safetensors", b"<!doctype html><html>", "is a web page.*log in"),
        ("safetensors", b"", "it is empty.*; download it again"),
        ("safetensors.incomplete", b"", "has not finished"),
    ],
)
def test_a_file_that_is_not_safetensors(tiny_pixart, tmp_path, suffix, content, message):
    file = tmp_path / f"model.{suffix}"
    file.write_bytes(content)
    for given in ({}, {"base": str(tiny_pixart)}):
        refused(message, str(file), **given)


@pytest.mark.parametrize("length", [0x3C20, 0x0280], ids=["as a page starts", "as a pickle starts"])
def test_a_header_whose_length_reads_as_something_else(tiny_pixart, tmp_path, length):
    """The first bytes of a file are the length of its header."""
    content = (tiny_pixart / "transformer" / WEIGHTS).read_bytes()
    own = int.from_bytes(content[:8], "little")
    tensors = load_file(tiny_pixart / "transformer" / WEIGHTS)
    if length < own:  # fewer tensors have a shorter header
        tensors = {name: tensors[name] for name in sorted(tensors)[:3]}
    save_file(tensors, tmp_path / "short.safetensors")
    content = (tmp_path / "short.safetensors").read_bytes()
    own = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + own].ljust(length)
    file = tmp_path / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + header + content[8 + own :])
    assert load_file(file).keys() == tensors.keys()
    check_weights_file(file)


def test_what_a_whole_checkpoint_holds_beside_the_transformer_is_named(tiny_pixart, tmp_path, caplog):
    tensors = load_file(tiny_pixart / "transformer" / WEIGHTS)
    named = {f"model.diffusion_model.{name}": value for name, value in tensors.items()}
    file = tmp_path / "model.safetensors"
    save_file({**named, "first_stage_model.encoder.conv_in.weight": torch.ones(2)}, file)
    with caplog.at_level(logging.WARNING), open_checkpoint(str(file), base=str(tiny_pixart)):
        pass
    assert "also holds first_stage_model, which are not read" in caplog.text


def test_a_torn_file_says_how_much_is_missing(tiny_pixart, tmp_path):
    whole = (tiny_pixart / "transformer" / WEIGHTS).read_bytes()
    file = tmp_path / "model.safetensors"
    file.write_bytes(whole[: len(whole) // 2])
    message = f"promises {len(whole):,} bytes and it has {len(whole) // 2:,}.*; download it again"
    refused(message, str(file), base=str(tiny_pixart))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_pointer_in_a_component(tiny_pixart, tmp_path, part):
    folder = shutil.copytree(tiny_pixart, tmp_path / "model")
    (file,) = (folder / part).glob("*.safetensors")
    file.write_text(POINTER)
    with (
        open_checkpoint(str(folder)) as checkpoint,
        pytest.raises(InputError, match=r"LFS pointer.*git lfs pull"),
    ):
        checkpoint.weights(part)


def test_a_pointer_for_a_config(tiny_pixart, tmp_path):
    folder = shutil.copytree(tiny_pixart, tmp_path / "model")
    (folder / "transformer/config.json").write_text(POINTER)
    refused(r"LFS pointer.*git lfs pull", str(folder))


@pytest.mark.parametrize(("channels", "kind"), [(96, "FLUX.1 Fill"), (32, "FLUX.1 Canny or Depth")])
def test_a_flux_that_reads_a_second_image(checkpoint, tmp_path, channels, kind):
    """As files, and as folders by their config."""
    folder = checkpoint("flux")
    tensors = original_of(folder, "FluxTransformer2DModel")
    tensors["img_in.weight"] = torch.zeros(48, channels)
    save_file(tensors, tmp_path / "fill.safetensors")
    message = f"takes {channels} channels and gives 16, as {kind} does"
    refused(message, str(tmp_path / "fill.safetensors"))
    copy = shutil.copytree(folder, tmp_path / "fill")
    path = copy / "transformer/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "in_channels": channels, "out_channels": 16}))
    refused(message, str(copy))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_component_names_its_parent(tiny_pixart, part):
    refused(f"is one component .*; pass its parent, {tiny_pixart}", str(tiny_pixart / part))


def test_folders_that_are_no_checkpoint(tiny_pixart, tmp_path):
    alone = shutil.copytree(tiny_pixart / "transformer", tmp_path / "alone")
    vae = shutil.copytree(tiny_pixart / "vae", tmp_path / "vae")
    lora = tmp_path / "lora"
    peft = tmp_path / "peft"
    unet = tmp_path / "sdxl"
    comfy = tmp_path / "checkpoints"
    control = tmp_path / "control"
    cache = tmp_path / "models--PixArt-alpha--PixArt-XL-2-512x512"
    for folder in (lora, peft, unet / "unet", comfy, control, cache / "snapshots/0a1b"):
        folder.mkdir(parents=True)
    (lora / "pytorch_lora_weights.safetensors").write_bytes(b"")
    (peft / "adapter_config.json").write_text("{}")
    (unet / "model_index.json").write_text("{}")
    (comfy / "flux1-dev.safetensors").write_bytes(b"")
    (control / "config.json").write_text('{"_class_name": "FluxControlNetModel"}')
    (cache / "snapshots/0a1b/model_index.json").write_text("{}")
    expected = {
        alone: f"is only a transformer .*--model BASE --transformer {alone}",
        vae: "is a VAE.*--vae",
        lora: f"is a LoRA.*--lora {lora}/pytorch_lora_weights.safetensors",
        peft: f"is a LoRA.*--lora {peft}/adapter_model.safetensors",
        unet: "has a UNet .* and no transformer",
        comfy: r"holds flux1-dev\.safetensors; pass the file itself with --model, .*--base",
        control: "is a ControlNet",
        cache: "hub's cache of a model; pass .*snapshots/0a1b",
    }
    for folder, message in expected.items():
        refused(message, str(folder))


def test_repositories_that_are_no_checkpoint():
    assert "--lora some/lora" in str(
        listing_error("some/lora", ["README.md", "pytorch_lora_weights.safetensors"])
    )
    assert "UNet" in str(listing_error("some/sdxl", ["unet/config.json", "sd_xl.safetensors"]))
    for file in ("flux1-dev-fp8.safetensors", "split_files/diffusion_models/flux1-dev.safetensors"):
        assert f"it holds {file}; pass the file itself with --model" in str(
            listing_error("Comfy-Org/x", [file])
        )
    assert listing_error("some/vae", ["config.json", WEIGHTS]) is None


def test_a_lora_that_lies_in_the_folder_is_mentioned(tiny_pixart, tmp_path, caplog):
    folder = shutil.copytree(tiny_pixart, tmp_path / "model")
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"")
    with caplog.at_level(logging.WARNING), open_checkpoint(str(folder)):
        pass
    assert "is applied only with --lora" in caplog.text
    caplog.clear()
    with open_checkpoint(str(tiny_pixart)):
        pass
    assert not caplog.text


def test_the_base_has_to_be_of_the_same_model(checkpoint, tmp_path):
    """Of another class, or of another model of the class: the first tensor that does not fit."""
    from ditf.export.planning.export_options import ExportOptions
    from ditf.export.planning.plan import make_plan

    schnell, dev = checkpoint("schnell"), checkpoint("flux")
    medium, sd3 = checkpoint("sd35"), checkpoint("sd3")
    file = tmp_path / "model.safetensors"
    shutil.copy(schnell / "transformer" / WEIGHTS, file)
    refused(r"is a Flux.*, and the transformer of .* is a SD3", str(file), base=str(sd3))
    for own, other, message in (
        (schnell, dev, r"lack time_text_embed\.guidance_embedder"),
        (medium, sd3, r"have transformer_blocks\.0\.attn\.norm_added_k\.weight"),
    ):
        shutil.copy(own / "transformer" / WEIGHTS, file)
        options = ExportOptions(model=str(file), base=str(other), layer="2")
        with open_checkpoint(**options.opened) as opened, pytest.raises(InputError, match=message) as caught:
            make_plan(options, opened)
        assert f"is {other} the model that model.safetensors was made from?" in str(caught.value)


def test_a_transformer_beside_a_pipeline(tiny_pixart, tmp_path):
    """As a file, as a component's folder and as one that has it; the base may lack its own weights."""
    tuned = shutil.copytree(tiny_pixart / "transformer", tmp_path / "tuned/transformer")
    tensors = load_file(tuned / WEIGHTS)
    save_file({name: value + 1 for name, value in tensors.items()}, tuned / WEIGHTS)
    expected = tensors["proj_out.bias"] + 1
    base = shutil.copytree(tiny_pixart, tmp_path / "base")
    (base / "transformer" / WEIGHTS).unlink()
    short = tuned.parent / "model.sft"
    shutil.copy(tuned / WEIGHTS, short)
    for given in (tuned / WEIGHTS, short, tuned, tuned.parent):
        for options in (
            {"model": str(base), "transformer": str(given)},
            {"model": str(given), "base": str(base)},
        ):
            with open_checkpoint(**options) as opened:
                assert torch.equal(opened.weights("transformer").tensor("proj_out.bias"), expected)
                assert opened.id == str(base)
    refused("--base and --transformer exclude each other", str(base), base=str(base), transformer=str(tuned))
    refused(
        "--transformer absent.safetensors: no such file; check", str(base), transformer="absent.safetensors"
    )
    refused("--transformer 'absent': no such file or directory", str(base), transformer="absent")
    refused(f"--base {tuned / WEIGHTS} is a file", str(tuned), base=str(tuned / WEIGHTS))


def test_a_class_of_a_trainers_own(checkpoint, tmp_path):
    """SimpleTuner saves FluxTransformer2DModelWithMasking, whose tensors are those of the usual class."""
    base = checkpoint("flux")
    folder = shutil.copytree(base / "transformer", tmp_path / "transformer")
    config = json.loads((folder / "config.json").read_text())
    config["_class_name"] += "WithMasking"
    (folder / "config.json").write_text(json.dumps(config))
    refused(
        "is a FluxTransformer2DModelWithMasking, .*; .* pass its file", str(base), transformer=str(folder)
    )
    with open_checkpoint(str(base), transformer=str(folder / WEIGHTS)) as opened:
        assert opened.config("transformer")["_class_name"] == "FluxTransformer2DModel"


def test_a_model_with_a_lora_that_is_not_fused(checkpoint, tmp_path):
    folder = checkpoint("flux")
    tensors = original_of(folder, "FluxTransformer2DModel")
    file = tmp_path / "merged.safetensors"
    for name in ("double_blocks.0.processor.proj_lora1.down.weight", "img_in.lora_A.default.weight"):
        save_file({**tensors, name: torch.zeros(2, 2)}, file)
        refused("is a model with a LoRA that is not fused; fuse", str(file), base=str(folder))


def test_the_transformer_of_a_base_is_not_downloaded():
    files = ["model_index.json", "transformer/config.json", f"transformer/{WEIGHTS}", f"vae/{WEIGHTS}"]
    assert wanted_files(files, None, ("transformer",)) == [files[0], files[1], files[3]]


@pytest.mark.parametrize("start", ["", "https://huggingface.co/", "https://huggingface.co/blob"])
def test_a_file_on_the_hub(tiny_pixart, start):
    """It has to be downloaded: nothing asks the hub for a model of this name."""
    blob = "blob/main/" if start.endswith("blob") else ""
    given = f"{start.removesuffix('blob')}black-forest-labs/FLUX.1-dev/{blob}flux1-dev.safetensors"
    message = r"run: hf download black-forest-labs/FLUX\.1-dev flux1-dev\.safetensors --local-dir DIR"
    refused(message, given)
    refused(message, given, base=str(tiny_pixart))
    for here in ("models/flux1-dev.safetensors", "./models/unet/x.safetensors", f"{tiny_pixart}/a/x.ckpt"):
        refused(f"{here}: no such file; check the path", here)
