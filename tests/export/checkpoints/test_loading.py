"""Config against weights, versions of diffusers, and variants: what is refused and what is loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import FluxPipeline, PixArtAlphaPipeline, SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.opening import open_checkpoint
from ditf.export.checkpoints.text.pipeline import load_text_pipeline
from ditf.export.exporter import export_bundle
from ditf.export.families import family_of
from ditf.export.families.pixart import PixArt
from ditf.export.measure.reference_model import Reference
from ditf.export.planning.conditions import encode
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import make_plan
from ditf.runtime.bundles.manifest import read_manifest
from ditf.runtime.errors import InputError, MissingComponent
from tests.export.parity import module_parity

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tiny_pixart, tmp_path):
    return shutil.copytree(tiny_pixart, tmp_path / "checkpoint")


def rewrite(folder, change):
    path = folder / "transformer" / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def reconfigure(folder, component="transformer", **changes):
    path = folder / component / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def plan(folder, **options):
    return make_plan(ExportOptions(model=str(folder), **options), Checkpoint(folder, str(folder)))


def encode_default(folder):
    made = plan(folder)
    return encode(made.entries, made.family, made.checkpoint, None)


def test_a_tensor_too_few(copy):
    rewrite(copy, lambda tensors: tensors.pop("transformer_blocks.2.attn1.to_k.weight"))
    with pytest.raises(InputError, match=r"lack transformer_blocks\.2\.attn1\.to_k\.weight"):
        plan(copy)


def test_a_tensor_too_many(copy):
    rewrite(copy, lambda tensors: tensors.update({"transformer_blocks.9.ff.x": torch.zeros(1)}))
    with pytest.raises(InputError, match=r"have transformer_blocks\.9\.ff\.x, which the config does not"):
        plan(copy)


def test_a_tensor_of_another_shape(copy):
    rewrite(copy, lambda tensors: tensors.update({"proj_out.bias": torch.zeros(7)}))
    with pytest.raises(InputError, match=r"proj_out\.bias .* is \[7\], the config says \[32\]"):
        plan(copy)


def test_a_config_of_another_depth(copy):
    reconfigure(copy, num_layers=6)
    with pytest.raises(InputError, match=r"lack transformer_blocks\.4\."):
        plan(copy)


def test_a_config_no_model_can_be_made_of(copy):
    reconfigure(copy, norm_type="no_such_norm")
    with pytest.raises(InputError, match="cannot be made from its config"):
        plan(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["pos_embed.proj.weight", "transformer_blocks.3.ff.net.2.weight"])
def test_damaged_weights(copy, tmp_path, value, tensor):
    """A block that does not run is looked at too: the reference is the whole model."""
    rewrite(copy, lambda tensors: tensors[tensor].view(-1)[5:6].fill_(value))
    with pytest.raises(InputError, match=rf"{tensor}.* holds NaN or infinity"):
        export_bundle(ExportOptions(model=str(copy), layer="1", output=tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()


def test_a_damaged_text_encoder(copy, tmp_path):
    path = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.final_layer_norm.weight"].fill_(float("nan"))
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"encoder\.final_layer_norm\.weight .* holds NaN"):
        export_bundle(ExportOptions(model=str(copy), layer="1", output=tmp_path / "bundle"))


def test_a_vae_that_lacks_a_tensor(copy):
    path = copy / "vae" / WEIGHTS
    tensors = load_file(path)
    del tensors["encoder.conv_in.weight"]
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"the VAE of .* lack encoder\.conv_in\.weight"):
        plan(copy)


def test_a_vae_of_another_latent_space(copy):
    reconfigure(copy, "vae", latent_channels=16)
    with pytest.raises(InputError, match=r"VAE .* has 16 channels, its transformer takes 4"):
        plan(copy)


def test_an_incomplete_snapshot(copy):
    shutil.rmtree(copy / "text_encoder")

    with (
        pytest.raises(InputError, match="names text_encoder, which is not there"),
        open_checkpoint(str(copy)),
    ):
        pass


def test_a_config_of_a_newer_diffusers(copy):
    reconfigure(copy, _diffusers_version="99.0", sliding_window=4)
    with pytest.raises(MissingComponent, match=r"sliding_window=4, which diffusers .* not know") as caught:
        family_of(Checkpoint(copy, "x"))
    assert caught.value.fix == "run: pip install --upgrade diffusers"


def test_a_diffusers_without_the_class(copy, monkeypatch):
    """A class that a later diffusers may bring, in a family that this ditf knows."""
    monkeypatch.setattr(PixArt, "transformer_class", "PixArtTransformer3DModel")
    reconfigure(copy, _class_name="PixArtTransformer3DModel")
    with pytest.raises(MissingComponent, match="has no PixArtTransformer3DModel; run: pip install --upgrade"):
        family_of(Checkpoint(copy, "x"))


def test_a_diffusers_that_lays_the_model_out_otherwise(checkpoint, monkeypatch):
    made = plan(checkpoint("pixart"))
    monkeypatch.setattr(type(made.family), "attention_name", "self_attention")
    with pytest.raises(MissingComponent, match="names the modules of BasicTransformerBlock differently"):
        Reference(made.checkpoint, made.family, 1, made.size, made.noise())


@pytest.mark.parametrize(("name", "norm"), [("dit", "ada_norm_zero"), ("pixart", "ada_norm_single")])
def test_configs_of_early_checkpoints(checkpoint, tmp_path, name, norm):
    """They call both Transformer2DModel, have keys no class knows, and lack some of today's."""
    folder = shutil.copytree(checkpoint(name), tmp_path / name)
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    for key in ("norm_eps", "upcast_attention", "use_additional_conditions"):
        config.pop(key, None)
    config |= {"_class_name": "Transformer2DModel", "_diffusers_version": "0.22.0", "norm_type": norm}
    config |= {"double_self_attention": False, "use_linear_projection": False}
    path.write_text(json.dumps(config))
    assert module_parity(folder, "2", "bake", False)["cosine_p01"] > 0.99999


def save_variant(folder, pipeline_class, variant):
    pipeline = pipeline_class.from_pretrained(folder)
    shutil.rmtree(folder)
    pipeline.to(torch.float16).save_pretrained(folder, variant=variant)


@pytest.mark.parametrize(("name", "pipeline"), [("pixart", PixArtAlphaPipeline), ("flux", FluxPipeline)])
def test_a_checkpoint_that_has_a_variant_only(checkpoint, tmp_path, name, pipeline):
    folder = shutil.copytree(checkpoint(name), tmp_path / name)
    save_variant(folder, pipeline, "fp16")
    assert not (folder / "transformer" / WEIGHTS).exists()
    assert module_parity(folder, "1", "bake", False)["cosine_p01"] > 0.99999


def test_a_variant_by_name(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("pixart"), tmp_path / "both")
    plain = load_file(folder / "transformer" / WEIGHTS)
    save_file(
        {name: tensor.half() * 2 for name, tensor in plain.items()},
        folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors",
    )
    name = "proj_out.bias"
    assert torch.equal(Checkpoint(folder, "x").weights("transformer").tensor(name), plain[name])
    chosen = Checkpoint(folder, "x", variant="fp16").weights("transformer").tensor(name)
    assert torch.equal(chosen, (plain[name].half() * 2).float())
    with pytest.raises(InputError, match="no weights of variant 'bf16'; leave --variant out"):
        Checkpoint(folder, "x", variant="bf16").weights("transformer")


def test_sharded_bfloat16_of_the_real_layout(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("sd35"), tmp_path / "sharded")
    model = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    shutil.rmtree(folder / "transformer")
    model.to(torch.bfloat16).save_pretrained(folder / "transformer", max_shard_size="200KB")
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 1
    assert module_parity(folder, "2", "bake", False)["cosine_p01"] > 0.99999
    next(iter((folder / "transformer").glob("*-00002-of-*"))).unlink()
    with pytest.raises(InputError, match=r"lacks diffusion_pytorch_model-00002-of"):
        plan(folder)


def test_sd3_without_its_t5(checkpoint, tmp_path):
    """Published checkpoints may be used without the third text encoder; its embeddings are zero then."""
    folder = shutil.copytree(checkpoint("sd3"), tmp_path / "two")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / name)
    assert module_parity(folder, "2", "bake", False)["cosine_p01"] > 0.99999


def test_the_checkpoints_own_pipeline_is_used(checkpoint):
    folder = checkpoint("sigma")
    pipeline = load_text_pipeline(Checkpoint(folder, "x"), PixArt.pipelines, PixArt.text_classes)
    assert type(pipeline).__name__ == "PixArtSigmaPipeline"
    assert pipeline.transformer is None


def test_what_a_revision_is_for(tiny_pixart, tmp_path):
    options = ExportOptions(model=str(tiny_pixart), revision="main", output=tmp_path / "b")
    with pytest.raises(InputError, match="--revision is for hub ids"):
        export_bundle(options)


def test_the_manifest_says_what_was_left_out(checkpoint, tmp_path):
    options = ExportOptions(model=str(checkpoint("flux")), layer="2", size=(32, 32), output=tmp_path / "b")
    removed = read_manifest(export_bundle(options)).removed
    assert set(removed) == {
        "blocks 2.. and the final layer",
        "text stream of the last block, after it is read",
        "conditioning, now constants",
        "text encoders",
        "VAE decoder",
    }
    weights = load_file(checkpoint("flux") / "transformer" / WEIGHTS)
    text = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "ff_context")
    dead = [name for name in weights if name.startswith(tuple(f"transformer_blocks.1.{t}" for t in text))]
    step = removed["text stream of the last block, after it is read"]
    assert step["parameters"] == sum(weights[name].numel() for name in dead)
    assert step["bytes"] == 4 * step["parameters"]
    modulation = [n for n in weights if n.startswith(("time_text_embed", "context_embedder"))]
    norms = [f"transformer_blocks.{i}.{norm}" for i in (0, 1) for norm in ("norm1", "norm1_context")]
    norms.append("single_transformer_blocks.0.norm")
    modulation += [f"{norm}.linear.{part}" for norm in norms for part in ("weight", "bias")]
    expected = sum(weights[name].numel() for name in modulation)
    assert removed["conditioning, now constants"]["parameters"] == expected


@pytest.mark.parametrize(
    ("component", "changes"),
    [
        ("transformer", {"num_layers": None}),
        ("transformer", {"num_layers": 0}),
        ("transformer", {"num_layers": 100_000_000}),
        ("transformer", {"sample_size": [16, 16]}),
        ("transformer", {"sample_size": -16}),
        ("transformer", {"sample_size": 0}),
        ("transformer", {"attention_head_dim": 0}),
        ("transformer", {"norm_eps": "x"}),
        ("transformer", {"activation_fn": "zzz"}),
        ("transformer", {"num_attention_heads": True}),
        ("vae", {"block_out_channels": 8}),
        ("vae", {"block_out_channels": []}),
        ("vae", {"shift_factor": "x"}),
        ("vae", {"scaling_factor": 0}),
        ("vae", {"scaling_factor": None}),
        ("scheduler", {"num_train_timesteps": None}),
        ("scheduler", {"num_train_timesteps": "1000"}),
        ("scheduler", {"beta_schedule": "foo"}),
        ("scheduler", {"beta_start": "0.1"}),
        ("scheduler", {"trained_betas": "x"}),
    ],
    ids=str,
)
def test_configs_with_wrong_values(copy, component, changes):
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    path = copy / component / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(InputError) as caught:
        plan(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("text_encoder/model.safetensors", "cut short"),
        (
            "text_encoder/config.json",
            '{"architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": "32"}',
        ),
        ("tokenizer/tokenizer_config.json", '{"tokenizer_class": "T5Tokenizer", "model_max_length": "x"}'),
        ("model_index.json", '{"_class_name": "PixArtAlphaPipeline", "text_encoder": [null, null]}'),
        ("model_index.json", '{"_class_name": "PixArtAlphaPipeline"}'),
    ],
)
def test_damaged_text_encoders(copy, name, text):
    (copy / name).write_text(text)
    with pytest.raises(InputError, match=r"cannot load|fail|has no text_encoder|not a readable"):
        encode_default(copy)
