"""The unmodified models are made of what `Checkpoint.weights` gives, and of nothing else."""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny
from safetensors.torch import load_file, save_file

from ditf.export.checkpoints import offload
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.loading import load_model
from ditf.export.checkpoints.weights import Weights
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import make_plan
from ditf.runtime.errors import InputError

WEIGHTS = "diffusion_pytorch_model.safetensors"
FORMER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def changed(folder, target, component, change):
    copy = shutil.copytree(folder, target)
    path = copy / component / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return copy


def plan(folder, **options):
    return make_plan(ExportOptions(model=str(folder), size=(32, 32), **options), Checkpoint(folder, "x"))


def same(model, expected):
    state = expected.state_dict()
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor, state[name]), name


def as_int8(name):
    return lambda tensors: tensors.update({name: tensors[name].to(torch.int8)})


@pytest.mark.parametrize(
    ("component", "change", "message"),
    [
        ("transformer", as_int8("proj_out.weight"), r"proj_out\.weight of .* stored as I8 without"),
        ("transformer", lambda t: t.update({"proj_out.scale": torch.ones(32)}), r"proj_out\.scale"),
        (
            "transformer",
            lambda t: [t.update({f"_orig_mod.{name}": t.pop(name)}) for name in list(t)],
            r"saved from inside torch\.compile: they have _orig_mod\.",
        ),
        (
            "transformer",
            lambda t: t.update({"proj_out.base_layer.weight": t.pop("proj_out.weight")}),
            r"an adapter.*proj_out\.base_layer\.weight",
        ),
        ("vae", as_int8("encoder.conv_in.weight"), r"encoder\.conv_in\.weight of .*vae.* stored as I8"),
        ("vae", lambda t: t.pop("encoder.conv_in.bias"), r"the VAE of x .* lack encoder\.conv_in\.bias"),
        ("vae", lambda t: t.update({"model_ema.decay": torch.ones(1)}), r"VAE of x .* have model_ema\.decay"),
        (
            "vae",
            lambda t: t.update({"encoder.conv_in.bias": torch.ones(9)}),
            r"encoder\.conv_in\.bias of the VAE of x .* is \[9\], the config says \[8\]",
        ),
    ],
)
def test_what_is_refused_when_an_export_is_planned(checkpoint, tmp_path, component, change, message):
    copy = changed(checkpoint("pixart"), tmp_path / "copy", component, change)
    with pytest.raises(InputError, match=message):
        plan(copy)


def test_another_vae_is_compared_with_its_config(checkpoint, tmp_path):
    widths, blocks = (8, 8, 8), (1, 1, 1)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    )
    tiny.save_pretrained(tmp_path / "tiny")
    path = tmp_path / "tiny" / WEIGHTS
    tensors = load_file(path)
    tensors.pop("encoder.layers.0.weight")
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"the VAE of .*/tiny \(AutoencoderTiny\) lack encoder\.layers\.0\."):
        plan(checkpoint("pixart"), vae=str(tmp_path / "tiny"))


def test_a_vae_with_the_names_of_early_versions(checkpoint, tmp_path):
    """As the VAEs of Stable Diffusion 1 are stored, which PixArt and DiT were trained with."""

    def rename(tensors):
        for name in list(tensors):
            for new, old in FORMER.items():
                if f".attentions.0.{new}." in name:
                    tensors[name.replace(new, old)] = tensors.pop(name)
        assert any(".proj_attn." in name for name in tensors)

    copy = changed(checkpoint("pixart"), tmp_path / "copy", "vae", rename)
    plan(copy)
    expected = AutoencoderKL.from_pretrained(checkpoint("pixart") / "vae")
    same(load_model(AutoencoderKL, Checkpoint(copy, "x"), "vae"), expected)


def test_a_count_keeps_its_type(checkpoint):
    """num_batches_tracked of FLUX.2's batch norm is a whole number."""
    folder = checkpoint("flux2")
    expected = AutoencoderKLFlux2.from_pretrained(folder / "vae")
    assert expected.bn.num_batches_tracked.dtype == torch.int64
    same(load_model(AutoencoderKLFlux2, Checkpoint(folder, "x"), "vae"), expected)


class _Doubled(Weights):
    """The tensors of a checkpoint times two, as a layer over the stored ones."""

    def __init__(self, stored):
        super().__init__(stored.shapes, stored.bytes_of, stored.dtypes)
        self._stored = stored

    def _load(self, name):
        return 2 * self._stored.tensor(name)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(
    ("name", "component"), [("pixart", "transformer"), ("flux", "transformer"), ("sd3", "vae")]
)
def test_models_are_made_of_the_weights_of_the_checkpoint(checkpoint, monkeypatch, name, component, resident):
    folder = checkpoint(name)
    config = json.loads((folder / component / "config.json").read_text())
    model_class = getattr(diffusers, config["_class_name"])
    expected = model_class.from_pretrained(folder / component)
    with torch.no_grad():
        for tensor in expected.parameters():
            tensor.mul_(2)
    weights = Checkpoint.weights
    monkeypatch.setattr(offload, "RESIDENT", 0)
    monkeypatch.setattr(Checkpoint, "weights", lambda self, component: _Doubled(weights(self, component)))
    model = load_model(model_class, Checkpoint(folder, "x"), component, resident)
    if resident:
        same(model, expected)
        return
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            given = torch.randn(1, module.in_features)
            torch.testing.assert_close(module(given), expected.get_submodule(name)(given))
            assert module.weight.is_meta


def test_a_config_of_a_quantiser_is_not_for_the_model(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint("pixart"), tmp_path / "copy")
    path = copy / "transformer" / "config.json"
    quantised = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    changes = {"_diffusers_version": "99.0", "quantization_config": quantised}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    expected = diffusers.PixArtTransformer2DModel.from_pretrained(checkpoint("pixart") / "transformer")
    plan(copy)
    same(load_model(diffusers.PixArtTransformer2DModel, Checkpoint(copy, "x"), "transformer"), expected)
