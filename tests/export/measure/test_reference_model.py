"""The reference against the formula in docs/design.md, computed by hand from the unmodified model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, PixArtTransformer2DModel

from ditf.calib.images import procedural_image
from ditf.export.checkpoints.noise_schedule import draw_noise
from ditf.export.checkpoints.opening import open_checkpoint
from ditf.export.families import family_of
from ditf.export.graph.features import FeatureSettings
from ditf.export.measure.reference_model import Reference

LAYER, TIMESTEP, SIZE = 2, 300, (64, 48)


@pytest.fixture(scope="module")
def by_hand(tiny_pixart):
    """x_k [E, N, C] and block k's shift and scale, without ditf."""
    transformer = PixArtTransformer2DModel.from_pretrained(tiny_pixart / "transformer")
    vae = AutoencoderKL.from_pretrained(tiny_pixart / "vae")
    image = torch.from_numpy(procedural_image(SIZE, 5).copy())
    pixels = image.permute(2, 0, 1)[None] / 127.5 - 1
    eps = torch.randn((2, 4, 16, 12), generator=torch.Generator().manual_seed(1))
    with open_checkpoint(str(tiny_pixart)) as checkpoint, torch.no_grad():
        condition = family_of(checkpoint).encode_conditions(checkpoint, ["a cat"], None)[0]
        x_0 = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
        x_t = DDPMScheduler(beta_schedule="linear").add_noise(x_0.repeat(2, 1, 1, 1), eps, torch.tensor(300))
        seen = {}
        block = transformer.transformer_blocks[LAYER]
        block.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(x=args[0], t=kwargs["timestep"]), with_kwargs=True
        )
        transformer(
            x_t,
            encoder_hidden_states=condition["prompt_embeds"].repeat(2, 1, 1),
            encoder_attention_mask=condition["prompt_attention_mask"].repeat(2, 1),
            timestep=torch.tensor([TIMESTEP, TIMESTEP]),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        )
        table = block.scale_shift_table + seen["t"][0].reshape(6, -1)
    return seen["x"], table[0], table[1]


@pytest.fixture(scope="module")
def reference(tiny_pixart):
    with open_checkpoint(str(tiny_pixart)) as checkpoint:
        family = family_of(checkpoint)
        condition = family.encode_conditions(checkpoint, ["a cat"], None)[0]
        noise = draw_noise(2, (4, 16, 12), 1)
        return Reference(checkpoint, family, LAYER, SIZE, noise).under(condition, TIMESTEP)


@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize("adaln", [True, False])
def test_features_follow_the_definition(by_hand, reference, stage, adaln):
    x, shift, scale = by_hand
    z = x.mean(0)
    if stage == "before":
        z[:, [3, 7]] = 0
    if adaln:
        z = torch.nn.functional.layer_norm(z, z.shape[-1:], eps=1e-6) * (1 + scale) + shift
    if stage == "after":
        z[:, [3, 7]] = 0
    expected = z.T.reshape(-1, 8, 6).numpy()
    actual = reference.features(
        reference.hidden_states(procedural_image(SIZE, 5)), FeatureSettings((3, 7), stage, adaln)
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)  # another order of summation


def test_features_do_not_change_the_hidden_states(reference):
    hidden = reference.hidden_states(procedural_image(SIZE, 5))
    before = hidden.copy()
    reference.features(hidden, FeatureSettings((0,), "before", False))
    reference.features(hidden, FeatureSettings((0,), "after", False))
    np.testing.assert_array_equal(hidden, before)
