"""Bundles of a transformer that is given apart from its pipeline."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file

from ditf.calib.images import golden_pair
from ditf.calib.parity import feature_parity
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.exporter import export_bundle
from ditf.export.measure.torch_baseline import torch_baseline
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import make_plan
from ditf.runtime.bundles.manifest import read_manifest
from tests.export.parity import PROMPTS, encoded
from tests.original_layouts import original_of

LAYER, SIZE, TIMESTEP = 2, (48, 80), 300
GIVEN = {"layer": "2", "size": SIZE, "timestep": TIMESTEP, "prompt": PROMPTS[0], "discard": "none"}


@pytest.fixture(scope="module")
def tuned(checkpoint, tmp_path_factory):
    """A fine-tuned SD3.5 in its original layout: every tensor is another than the base's."""
    file = tmp_path_factory.mktemp("tuned") / "sd3.5-tuned.safetensors"
    tensors = original_of(checkpoint("sd35"), "SD3Transformer2DModel")
    generator = torch.Generator().manual_seed(3)
    noisy = {name: t * (1 + 0.3 * torch.rand(t.shape, generator=generator)) for name, t in tensors.items()}
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in noisy.items()}, file)
    return file


@pytest.fixture(scope="module")
def bundle(checkpoint, tuned, tmp_path_factory):
    """The file exported with the checkpoint as its base."""
    output = tmp_path_factory.mktemp("bundle") / "bundle"
    return export_bundle(
        ExportOptions(model=str(tuned), base=str(checkpoint("sd35")), output=output, **GIVEN)
    )


@torch.no_grad()
def judged(folder, file):
    """What the model that diffusers itself makes of the file hands to attention at the layer."""
    model = SD3Transformer2DModel.from_single_file(str(file), config=str(folder / "transformer")).eval()
    options = ExportOptions(model=str(folder), **GIVEN)
    plan = make_plan(options, Checkpoint(folder, str(folder)))
    (entry,) = encoded(plan)
    pixels = torch.from_numpy(golden_pair(SIZE)[:1]).permute(0, 3, 1, 2) / 127.5 - 1
    vae = plan.latents.load_vae()
    x_0 = (vae.encode(pixels).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
    x_t = (1 - TIMESTEP / 1000) * x_0 + TIMESTEP / 1000 * plan.noise()
    seen = {}
    attention = model.transformer_blocks[LAYER].attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs, hidden_states=(*args, *kwargs.values())[0]),
        with_kwargs=True,
    )
    condition = entry.condition
    model(
        x_t,
        encoder_hidden_states=condition["prompt_embeds"],
        pooled_projections=condition["pooled_prompt_embeds"],
        timestep=torch.tensor([float(TIMESTEP)]),
    )
    return seen["hidden_states"][0].reshape(*plan.grid, -1).numpy()


def features_of(bundle):
    """What ONNX Runtime computes, [h, w, C]."""
    session = onnxruntime.InferenceSession(bundle / "features.onnx")
    (features,) = session.run(None, {"image": golden_pair(SIZE)[:1]})
    return features[0].transpose(1, 2, 0)


def test_parity_with_the_model_of_from_single_file(checkpoint, tuned, bundle):
    parity = feature_parity(features_of(bundle), judged(checkpoint("sd35"), tuned))
    assert parity["cosine_min"] > 0.999999, parity
    assert parity["relative_error"] < 1e-5, parity
    assert parity["channel_error"] < 1e-4, parity


def test_the_model_is_found_again_to_time_it(bundle):
    """The baseline of `ditf bench` opens the file and its base, which the manifest names."""
    with torch_baseline(read_manifest(bundle), "eager") as baseline:
        found = baseline.features(golden_pair(SIZE)[0])
        tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    assert tf32 == (False, False)  # the bundle is float32
    assert feature_parity(found.transpose(1, 2, 0), features_of(bundle))["cosine_min"] > 0.999


def test_the_manifest_says_what_the_bundle_was_made_of(checkpoint, tuned, bundle):
    model = read_manifest(bundle).model
    own = Checkpoint(checkpoint("sd35"), "").weights("transformer").fingerprint()
    assert model["id"] == str(tuned)
    assert model["base"] == str(checkpoint("sd35"))
    assert len(model["weights"]) == 16
    assert model["weights"] != own
