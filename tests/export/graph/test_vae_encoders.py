"""The VAE encoders of the graph against the unmodified diffusers classes."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.attention_processor import AttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st

from ditf.calib.recipe import Recipe, Scale
from ditf.export.graph.precision import FLOAT32, Precision
from ditf.export.graph.vae_encoders import KLEncoder, QueryChunks, TinyEncoder, attentions, scale_tiny_down
from tests.checkpoint_parts import TINY_VAE, seeded

IMAGE = torch.rand((1, 3, 48, 80), generator=torch.Generator().manual_seed(0)) * 2 - 1


@lru_cache
def attention():
    """The one of a VAE's middle block, and what goes through it: 12 x 20 tokens."""
    with seeded():
        vae = AutoencoderKL(**TINY_VAE).eval().requires_grad_(False)
        found = next(module for _, module in attentions(vae.encoder))
        return found, torch.randn(2, 16, 12, 20)


@settings(deadline=None, max_examples=25)
@given(queries=st.integers(1, 300))
def test_attention_in_chunks_of_any_size_is_attention(queries):
    module, x = attention()
    module.set_processor(AttnProcessor2_0())
    expected = module(x)
    module.set_processor(QueryChunks(queries))
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-6)  # another order of summation


@pytest.mark.parametrize("config", [{}, {"use_quant_conv": False}, {"mid_block_add_attention": False}])
def test_the_full_encoder(config):
    with seeded():
        vae = AutoencoderKL(**TINY_VAE, **config).eval().requires_grad_(False)
    expected = (vae.encode(IMAGE).latent_dist.mean - 0.1) * 0.5
    encoder = KLEncoder(copy.deepcopy(vae), 0.1, 0.5, FLOAT32)
    torch.testing.assert_close(encoder(IMAGE), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("exponent", [0, 3, 10])
def test_the_tiny_encoder(exponent):
    """Scaled down by a power of two and restored, nothing but subnormals could be lost."""
    with seeded():
        vae = AutoencoderTiny(encoder_block_out_channels=(16,) * 3, num_encoder_blocks=(1, 2, 1),
                              decoder_block_out_channels=(16,) * 3, num_decoder_blocks=(1, 1, 1))  # fmt: skip
    vae = vae.eval().requires_grad_(False)
    expected = (vae.encode(IMAGE).latents - 0.1) * 0.5
    recipe = Recipe(vae_residual=Scale(exponent, "planted"))
    precision = Precision("float32", torch.float32, torch.float32, recipe=recipe)
    encoder = TinyEncoder(copy.deepcopy(vae), 0.1, 0.5, precision)
    torch.testing.assert_close(encoder(IMAGE), expected, rtol=0, atol=1e-6)
    scaled = copy.deepcopy(vae.encoder)
    scale_tiny_down(scaled, exponent)
    inside = [encoder.layers[:2](IMAGE * 0.5 + 0.5).abs().max() for encoder in (scaled, vae.encoder)]
    assert inside[0] == inside[1] * 2.0**-exponent
