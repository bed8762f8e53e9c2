"""--vae: which encoders are taken, which are refused, and that the graph is the model with that encoder."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

import ditf
from ditf.calib.images import golden_pair
from ditf.calib.latents import same_space
from ditf.calib.parity import feature_parity
from ditf.calib.recipe import VAE_RESIDUAL, choose_recipe
from ditf.cli.check import golden_metrics
from ditf.export.checkpoints.opening import DEMO_CHECKPOINT, open_checkpoint
from ditf.export.exporter import export_bundle, stage_count
from ditf.export.graph.features import FeatureSettings
from ditf.export.measure.calibration import measured_for
from ditf.export.measure.images import CalibrationImages
from ditf.export.measure.reference_model import Reference
from ditf.export.measure.torch_baseline import torch_baseline
from ditf.export.measure.vae_compatibility import compare_vaes
from ditf.export.planning.conditions import encode
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import make_plan
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.errors import InputError
from tests.checkpoints import planted, save_tiny_pixart
from tests.engines.rtx import build_engine
from tests.export.measure.test_activation_ranges import Measured
from tests.vaes import copy_with_config

SIZE = (64, 64)


def plan_of(model, vae=None, **options):
    options = {"size": SIZE, "layer": "2", **options}
    given = ExportOptions(model=str(model), vae=None if vae is None else str(vae), **options)
    with open_checkpoint(str(model)) as checkpoint:
        return make_plan(given, checkpoint)


def compared(plan):
    return compare_vaes(plan, golden_pair(plan.size), CalibrationImages(None, plan.size))


def test_encoders_of_the_same_space_are_taken(vaes):
    own = compared(plan_of(vaes.checkpoint, vaes.checkpoint)).agreement
    assert own["relative_error"] == 0
    assert own["correlation_min"] == pytest.approx(1)
    tuned = compared(plan_of(vaes.checkpoint, vaes.tuned)).agreement
    tiny = compared(plan_of(vaes.checkpoint, vaes.tiny)).agreement
    assert 0 < tuned["relative_error"] < 0.2
    assert 0.05 < tiny["relative_error"] < 0.6
    assert tiny["correlation_min"] > 0.6


def test_an_encoder_of_another_space_is_refused(vaes, tmp_path):
    """As many channels, the same stride: only x_0 tells."""
    with pytest.raises(InputError, match=r"latent space of this model.*off by \d\.\d\d of its spread"):
        compared(plan_of(vaes.checkpoint, vaes.other))
    wrong = copy_with_config(vaes.checkpoint / "vae", tmp_path / "wrong", scaling_factor=0.18215)
    with pytest.raises(InputError, match=r"it is 0\.\d+ times as large: its config's scaling_factor"):
        compared(plan_of(vaes.checkpoint, wrong))


@pytest.mark.parametrize("change", ["swap", "negate"])
def test_channels_in_another_order_or_sign_are_refused(vaes, tmp_path, change):
    vae = AutoencoderTiny.from_pretrained(vaes.tiny)
    last = vae.encoder.layers[-1]
    with torch.no_grad():
        for parameter in (last.weight, last.bias):
            parameter.copy_(parameter[[1, 0, 2, 3]] if change == "swap" else parameter * -1)
    vae.save_pretrained(tmp_path / "changed")
    with pytest.raises(InputError, match="latent space"):
        compared(plan_of(vaes.checkpoint, tmp_path / "changed"))


def test_it_is_refused_before_the_work(vaes, tmp_path):
    stages = []
    options = ExportOptions(
        model=str(vaes.checkpoint), vae=str(vaes.other), size=SIZE, output=tmp_path / "bundle"
    )
    with pytest.raises(InputError, match="latent space"):
        export_bundle(options, stages.append)
    assert len(stages) == 2
    assert stages[1].startswith("comparing the encoder of")
    assert not list(tmp_path.iterdir())
    assert stage_count(options) == 11


@pytest.mark.parametrize(
    ("model", "vae", "message"),
    [
        ("demo", "tiny", "works in pixels and has no VAE; leave --vae out"),
        ("flux2", "tiny", "packed and normed by its own batch norm"),
        ("pixart", "flux2", "is an AutoencoderKLFlux2; choose an AutoencoderKL or AutoencoderTiny"),
        ("pixart", "demo", "of class DiTTransformer2DModel, which is not supported"),
        ("pixart", "nowhere", "no such directory"),
        ("pixart", "", "--vae is empty"),
    ],
)
def test_what_cannot_be_swapped(checkpoint, vaes, model, vae, message):
    places = {"demo": DEMO_CHECKPOINT / "transformer", "flux2": checkpoint("flux2"), "tiny": vaes.tiny}
    vae = places.get(vae, vae)
    with pytest.raises(InputError, match=message):
        plan_of(model if model == "demo" else checkpoint(model), vae, layer="1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": 16}, "has 16 channels at a stride of 4, the model's own VAE 4 at 4"),
        ({"encoder_block_out_channels": [16] * 4}, "has 4 channels at a stride of 8, the model's own VAE"),
        ({"encoder_block_out_channels": [16, 16, 32]}, "they have to be equal"),
        ({"encoder_block_out_channels": []}, r"has block_out_channels=\[\]"),
        ({"act_fn": "silu"}, "has act_fn='silu'; supported: relu"),
        ({"in_channels": 1}, "encodes 1 channels, not RGB"),
        ({"scaling_factor": 0.0}, r"scaling_factor=0\.0"),
        ({"_class_name": "AutoencoderDC"}, "is of class AutoencoderDC, which is not supported"),
        ({"latent_channels": "four"}, "latent_channels='four', which is no int"),
    ],
)
def test_configs_that_do_not_fit(vaes, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        plan_of(vaes.checkpoint, copy_with_config(vaes.tiny, tmp_path / "vae", **changes))


def test_damaged_weights(vaes, tmp_path):
    broken = shutil.copytree(vaes.tiny, tmp_path / "broken")
    (broken / "diffusion_pytorch_model.safetensors").write_bytes(b"garbage")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        compared(plan_of(vaes.checkpoint, broken))
    (broken / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="no safetensors weights"):
        compared(plan_of(vaes.checkpoint, broken))
    blocks = copy_with_config(vaes.tiny, tmp_path / "blocks", num_encoder_blocks=[1, 2, 1])
    with pytest.raises(InputError, match=r"the VAE of .* lack encoder"):
        compared(plan_of(vaes.checkpoint, blocks))


def test_a_whole_checkpoint_and_copies_of_other_programs(vaes, tmp_path):
    """vae/ of a pipeline; and a repository whose top holds a second copy under another name."""
    other = shutil.copytree(vaes.tuned, tmp_path / "repository")
    (other / "sdxl.vae.safetensors").write_bytes(b"of another program")
    plan = plan_of(vaes.checkpoint, other)
    assert compared(plan).agreement["relative_error"] < 0.2
    assert plan.latents.source.weights().shapes
    assert plan_of(vaes.checkpoint, vaes.checkpoint).latents.source.name == "vae"


def test_a_bundle_beside_the_plain_one(vaes):
    assert plan_of(vaes.checkpoint, vaes.tiny).output.name == "checkpoint-l2-fp32-tiny"
    assert plan_of(vaes.checkpoint).output.name == "checkpoint-l2-fp32"
    with pytest.raises(InputError, match="--vae-revision is for hub ids"):
        plan_of(vaes.checkpoint, vaes.tiny, vae_revision="main")
    with pytest.raises(InputError, match="--vae-revision requires --vae"):
        plan_of(vaes.checkpoint, vae_revision="main")


def test_a_calibration_is_of_its_encoder(vaes):
    plain, swapped = (measured_for(plan_of(vaes.checkpoint, vae)) for vae in (None, vaes.tiny))
    assert plain.pop("vae") != swapped.pop("vae")
    assert plain == swapped


@pytest.mark.parametrize(
    ("encoder", "fp16", "changes"),
    [
        ("tiny", False, {"ensemble": 2, "batch": "dynamic"}),
        ("tiny", True, {"size": (48, 80)}),
        ("tuned", True, {"ensemble": 2}),
    ],
)
def test_the_graph_is_the_model_with_that_encoder(vaes, tmp_path, encoder, fp16, changes):
    """And the choice's parity is against the model with its own; RTX compiles it with no GPU."""
    options = ExportOptions(
        model=str(vaes.checkpoint),
        vae=str(getattr(vaes, encoder)),
        layer="2",
        precision="float16" if fp16 else "float32",
        discard=(3,),
        output=tmp_path / "bundle",
        **{"size": SIZE, **changes},
    )
    bundle = export_bundle(options)
    with open_checkpoint(options.model) as checkpoint:
        plan = make_plan(options, checkpoint)
    entry = encode(plan.entries, plan.family, plan.checkpoint, plan.guidance)[0]
    images = golden_pair(plan.size)
    expected = {}
    for name, latents in (("graph", plan.latents), ("choice", plan.own_latents)):
        reference = Reference(plan.checkpoint, plan.family, plan.layer, plan.size, plan.noise(), latents)
        reference.under(entry.condition, entry.timestep)
        settings = FeatureSettings(channels=(3,))
        expected[name] = np.stack(
            [reference.features(reference.hidden_states(image), settings) for image in images]
        )
    with ditf.load(bundle) as model:
        actual = model.run(images)
        metrics = golden_metrics(model, model.bundle.read_arrays("golden.npz"))[0]
    parity = feature_parity(actual.transpose(0, 2, 3, 1), expected["graph"].transpose(0, 2, 3, 1))
    assert parity["relative_error"] < (2e-3 if fp16 else 1e-5)  # rounding alone
    with np.load(bundle / "golden.npz") as golden:
        tokens = expected["choice"].reshape(2, plan.channels, -1).transpose(0, 2, 1)
        whole = np.take_along_axis(tokens, golden["rows"][:, :, None], axis=1)
        np.testing.assert_allclose(golden["whole_features"], whole, atol=1e-5)  # another order of summation
    assert metrics["whole_relative_error"] > 5 * metrics["relative_error"]
    assert metrics["whole_cosine_mean"] > 0.5
    assert 0 <= metrics["whole_matches_within_1px"] <= metrics["whole_matches_within_patch"] <= 1
    profile = {"image": tuple((n, *plan.size, 3) for n in (1, 2, 4))} if "batch" in changes else None
    build_engine(bundle / "features.onnx", "sm_89", profile)


def test_the_manifest_says_which_encoder(swapped_bundle, vaes):
    manifest = Bundle.open(swapped_bundle).manifest
    assert manifest.vae["id"] == str(vaes.tiny)
    assert manifest.vae["class"] == "AutoencoderTiny"
    assert same_space(manifest.vae["x_0"])
    replaced = manifest.removed["VAE that --vae replaces"]["parameters"]
    own = sum(p.numel() for p in _parameters(vaes.checkpoint / "vae"))
    assert replaced == own
    encoder = sum(count["parameters"] for count in manifest.parts["VAE encoder"].values())
    tiny = AutoencoderTiny.from_pretrained(vaes.tiny)
    assert encoder == sum(p.numel() for p in tiny.encoder.parameters())
    assert manifest.removed["VAE decoder"]["parameters"] == sum(p.numel() for p in tiny.decoder.parameters())


def _parameters(folder):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder).parameters()


def test_the_baseline_has_the_bundles_encoder(swapped_bundle):
    manifest = Bundle.open(swapped_bundle).manifest
    with np.load(swapped_bundle / "golden.npz") as golden, torch_baseline(manifest, "eager") as baseline:
        features = baseline.features(golden["images"][0]).reshape(manifest.channels, -1).T
        np.testing.assert_allclose(features[golden["rows"][0]], golden["features"][0], atol=1e-5)


VALUES = [("encoder.layers.0", 1e5), ("encoder.layers.1.conv.0", 1e6), ("encoder.layers.5.conv.4", 1e6)]


@pytest.mark.parametrize(("where", "value"), VALUES)
def test_a_tiny_encoder_in_float16_survives_what_is_planted(tmp_path, vaes, where, value):
    """As the checkpoint's own encoder: what it computes is then all there is."""
    save_tiny_pixart(tmp_path / "made")
    shutil.rmtree(tmp_path / "made" / "vae")
    shutil.copytree(vaes.tiny, tmp_path / "made" / "vae")
    folder = planted(tmp_path / "made", tmp_path / "planted", "vae", {where: value})
    one = Measured(folder, "2")
    ranges = one.ranges()
    found = max(extent.max_abs for extent in ranges if extent.kind == VAE_RESIDUAL)
    assert found >= 0.5 * value
    recipe = choose_recipe(ranges)
    assert [entry["where"] for entry in recipe.exceptions()] == ["VAE residual"]
    assert one.parity(recipe)["cosine_p01"] > 0.9999
    assert not one.parity(choose_recipe([]))["cosine_p01"] > 0.999
