"""The VAE encoders of the graph against the unmodified diffusers classes."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ditf.calib.recipe import Recipe, Scale
from ditf.export.graph import vae_encoders
from ditf.export.graph.precision import BFLOAT16, FLOAT16, FLOAT32, Precision
from ditf.export.graph.vae_encoders import KLEncoder, QueryChunks, TinyEncoder, attentions, scale_tiny_down
from ditf.export.onnx_writing.onnx_file import write_onnx
from tests.checkpoint_parts import TINY_VAE, seeded
from tests.engines.reports import report_of

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
    module.set_processor(QueryChunks(queries, logits=0))
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-6)  # another order of summation


@pytest.mark.parametrize(
    ("dtype", "side", "expected"), [("float16", 64, 1), ("float32", 64, 4), ("float16", 65, 5)]
)
def test_attention_is_in_chunks_only_where_the_logits_are_large(monkeypatch, dtype, side, expected):
    """512 px has a side of 64 latents, and 32 MiB of logits in float16."""
    chunks = []

    def attend(query, key, value):
        chunks.append(query.shape[2])
        return torch.empty_like(query)

    monkeypatch.setattr(vae_encoders.functional, "scaled_dot_product_attention", attend)
    with torch.device("meta"):
        module = Attention(8, heads=1, dim_head=8, bias=True, norm_num_groups=2, residual_connection=True)
        x = torch.empty((1, 8, side, side), dtype=getattr(torch, dtype))
    module.to(x.dtype).set_processor(QueryChunks())
    assert module(x).shape == x.shape
    assert len(chunks) == expected
    assert sum(chunks) == side**2


@pytest.mark.parametrize("config", [{}, {"use_quant_conv": False}, {"mid_block_add_attention": False}])
def test_the_full_encoder(config):
    with seeded():
        vae = AutoencoderKL(**TINY_VAE, **config).eval().requires_grad_(False)
    expected = (vae.encode(IMAGE).latent_dist.mean - 0.1) * 0.5
    encoder = KLEncoder(copy.deepcopy(vae), 0.1, 0.5, FLOAT32)
    torch.testing.assert_close(encoder(IMAGE), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", [FLOAT16, BFLOAT16], ids=["float16", "bfloat16"])
def test_norm_and_activation_are_float32_and_rounded_once(precision):
    with seeded():
        vae = AutoencoderKL(**TINY_VAE).eval().requires_grad_(False)
    norms = {name: module for name, module in vae.encoder.named_modules() if isinstance(module, nn.GroupNorm)}
    norms = copy.deepcopy(norms)
    encoder = KLEncoder(vae, 0.0, 1.0, precision)
    seen = {}
    for name, module in encoder.encoder.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0]}))
    encoder(IMAGE)
    following = {
        name: name.replace("norm", "conv") for name in norms if name.endswith((".norm1", ".norm2"))
    } | {"conv_norm_out": "conv_out"}
    assert len(following) == len(norms) - 1  # attention's norm has no activation
    for norm, convolution in following.items():
        expected = nn.functional.silu(norms[norm](seen[norm].to(torch.float32))).to(precision.compute)
        assert torch.equal(seen[convolution], expected), norm


@pytest.fixture(scope="module")
def encoder_onnx(tmp_path_factory):
    """The encoder of a VAE with real VAEs' 32 groups, of which TensorRT makes the kernels of a large one."""
    with seeded():
        vae = AutoencoderKL(block_out_channels=(64,), norm_num_groups=32, mid_block_add_attention=False)
    encoder = KLEncoder(vae.eval().requires_grad_(False), 0.0, 1.0, FLOAT16)
    path = tmp_path_factory.mktemp("encoder") / "encoder.onnx"
    write_onnx(encoder, {"pixels": torch.zeros(1, 3, 64, 64)}, ["x0"], path, 20)
    return path


@pytest.mark.parametrize("target", ["sm_86", "sm_89", "sm_120"])
def test_tensorrt_writes_no_feature_map_in_float32(encoder_onnx, target):
    """Group norm, activation and casts are one kernel, as the log of a real build shows."""
    layers = report_of(encoder_onnx, target).engine.layers
    large = [one for layer in layers for one in layer.outputs if len(one.shape) == 4 and one.shape[1] == 64]
    assert {one.dtype for one in large} == {"Half"}
    norms = [layer for layer in layers if any("InstanceNormalization" in name for name in layer.sources)]
    assert len([layer for layer in norms if layer.read]) == 7


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
