"""Encoders that compute x_0 in the graph: a VAE's latents, shifted and scaled, or the pixels themselves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Encoder, EncoderTiny
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import nn
from torch.nn import functional

from ditf.calib.recipe import Recipe, Scale
from ditf.export.graph.blocks.layers import constant
from ditf.export.graph.precision import Precision

_QUERIES = 1024
"""Queries in a chunk of attention: enough to fill a matrix product, few enough to need little memory."""

_LOGITS = 1 << 25
"""Bytes of logits up to which attention is computed at once: those of 4,096 tokens (512 px) in 16 bits. They
are smaller than the encoder's feature maps, so that chunks would add kernels and save no memory."""


class PixelEncoder(nn.Module):
    """The encoder of a model that works in pixels: x_0 is the normalised image."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels


class KLEncoder(nn.Module):
    """The encoder half of an AutoencoderKL, in the graph's precision.

    Group norms and the activations behind them are float32.

    Args:
        vae: in float32; its encoder is changed in place and becomes a part of this module.
        shift, scale: x_0 = (mean - shift) * scale, numbers or [c, 1, 1].
        patch: side of the square of the mean's pixels that becomes one pixel of x_0.
    """

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderKLFlux2,
        shift: torch.Tensor | float,
        scale: torch.Tensor | float,
        precision: Precision,
        patch: int = 1,
    ) -> None:
        super().__init__()
        scale_down(vae.encoder, precision.recipe)
        self.encoder = vae.encoder.to(precision.compute)
        self.quant_conv = None if vae.quant_conv is None else vae.quant_conv.to(precision.compute)
        self.channels = vae.config.latent_channels
        self.shift = constant(shift) if isinstance(shift, torch.Tensor) else shift
        self.scale = constant(scale) if isinstance(scale, torch.Tensor) else scale
        self.patch = patch
        self.dtype = precision.compute
        for _, attention in attentions(self.encoder):
            attention.set_processor(QueryChunks())
        if precision.compute != torch.float32:
            _keep_norms_float32(self.encoder, precision.compute)
            if precision.recipe.vae_attention_float32:
                for name, attention in list(attentions(self.encoder)):
                    parent, _, child = name.rpartition(".")
                    setattr(self.encoder.get_submodule(parent), child, _Float32Island(attention))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        moments = self.encoder(pixels.to(self.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean = moments[:, : self.channels].to(torch.float32)
        if self.patch > 1:
            mean = functional.pixel_unshuffle(mean, self.patch)
        return (mean - self.shift) * self.scale


class TinyEncoder(nn.Module):
    """The encoder half of an AutoencoderTiny (TAESD), all of it in the graph's precision: it has no norms.

    Pixels are mapped to [0, 1], and x_0 is shifted and scaled, in float32.

    Args:
        vae: in float32; its encoder is changed in place and becomes a part of this module.
        shift, scale: x_0 = (latents - shift) * scale.
    """

    def __init__(self, vae: AutoencoderTiny, shift: float, scale: float, precision: Precision) -> None:
        super().__init__()
        exponent = precision.recipe.vae_residual.exponent
        scale_tiny_down(vae.encoder, exponent)
        self.layers = vae.encoder.layers.to(precision.compute)
        self.restore = 2.0**exponent
        self.shift, self.scale = shift, scale
        self.dtype = precision.compute

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        latents: torch.Tensor = self.layers((pixels * 0.5 + 0.5).to(self.dtype)).to(torch.float32)
        return (latents * self.restore - self.shift) * self.scale


@torch.no_grad()
def scale_tiny_down(encoder: EncoderTiny, exponent: int) -> None:
    """Scale everything that an AutoencoderTiny's encoder computes by 2**-exponent, in place.

    ReLU passes a positive factor on, so it is enough to scale the first convolution's weights and every bias.

    Args:
        encoder: in float32; its activations are ReLUs.
    """
    for index, layer in enumerate(tiny_convolutions(encoder.layers).values()):
        if index == 0:
            layer.weight.mul_(2.0**-exponent)
        if layer.bias is not None:
            layer.bias.mul_(2.0**-exponent)


def tiny_convolutions(layers: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions of an `EncoderTiny`'s layers by name, in their order."""
    return {name: module for name, module in layers.named_modules() if isinstance(module, nn.Conv2d)}


def tiny_blocks(layers: nn.Module) -> Iterator[tuple[str, AutoencoderTinyBlock]]:
    """The residual blocks of an `EncoderTiny`'s layers by name."""
    return (
        (name, module) for name, module in layers.named_modules() if isinstance(module, AutoencoderTinyBlock)
    )


class QueryChunks:
    """A processor that computes the attention of a diffusers `Encoder` in chunks of queries, to save memory.

    The logits of all pairs of tokens are N^2 numbers, which take 0.8 GB in float32 at 960 px; those of a
    chunk stay in the processor's caches. On ONNX Runtime every bit of the result is the same (docs/vae.md).

    Args:
        queries: number of queries in a chunk; the last chunk may have fewer.
        logits: bytes of an image's logits up to which there are no chunks.
    """

    def __init__(self, queries: int = _QUERIES, logits: int = _LOGITS) -> None:
        self._queries = queries
        self._logits = logits

    def __call__(
        self,
        attention: Attention,
        x: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: None = None,
    ) -> torch.Tensor:
        """[B, C, h, w] -> [B, C, h, w]. diffusers passes the last three arguments; they are not used."""
        tokens = attention.group_norm(x).to(x.dtype).flatten(2).transpose(1, 2)
        query, key, value = (
            part(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for part in (attention.to_q, attention.to_k, attention.to_v)
        )
        count = query.shape[2]
        at_once = attention.heads * count**2 * query.element_size() <= self._logits
        chunks = query.split(count if at_once else self._queries, dim=2)
        attended = torch.cat(
            [functional.scaled_dot_product_attention(chunk, key, value) for chunk in chunks], dim=2
        )
        y = attention.to_out[0](attended.transpose(1, 2).flatten(2))
        y = y.transpose(1, 2).unflatten(2, x.shape[2:])
        return (y + x if attention.residual_connection else y) / attention.rescale_output_factor


def residual_writers(encoder: Encoder) -> Iterator[tuple[str, nn.Module, bool]]:
    """The layers that add to the residual of a diffusers `Encoder`: (name, layer, reads the residual itself).

    A layer that reads the residual without a norm (a shortcut, a downsampling convolution) passes a factor
    on. In the others, weight and bias have to carry the factor.
    """
    yield "conv_in", encoder.conv_in, False
    for name, module in encoder.named_modules():
        if isinstance(module, ResnetBlock2D):
            yield f"{name}.conv2", module.conv2, False
            if module.conv_shortcut is not None:
                yield f"{name}.conv_shortcut", module.conv_shortcut, True
        elif isinstance(module, Downsample2D) and isinstance(module.conv, nn.Conv2d):
            yield f"{name}.conv", module.conv, True
        elif isinstance(module, Attention):
            yield f"{name}.to_out.0", module.to_out[0], False


def attentions(encoder: Encoder) -> Iterator[tuple[str, Attention]]:
    """The attentions of a diffusers `Encoder`, by name."""
    return ((name, module) for name, module in encoder.named_modules() if isinstance(module, Attention))


@torch.no_grad()
def scale_down(encoder: Encoder, recipe: Recipe) -> None:
    """Scale the encoder's values by the recipe's powers of two, in place; x_0 stays as it is.

    A factor on the input of a group norm does not change its output if the square of the factor is on its
    epsilon. Everything between the residual's start and the last norm is linear in the factor, or behind such
    a norm.

    Args:
        encoder: the encoder of an AutoencoderKL, in float32.
    """
    factor = 2.0**-recipe.vae_residual.exponent
    if recipe.vae_residual.exponent:
        for _, layer, reads_residual in residual_writers(encoder):
            for kind, parameter in layer.named_parameters():
                if kind == "bias" or not reads_residual:
                    parameter.mul_(factor)
        encoder.conv_norm_out.eps *= factor**2
    for name, module in encoder.named_modules():
        if isinstance(module, Attention):
            module.group_norm.eps *= factor**2
        elif isinstance(module, ResnetBlock2D):
            module.norm1.eps *= factor**2
            inner = 2.0 ** -recipe.vae_inner.get(f"vae.{name}.conv1", Scale()).exponent
            for parameter in module.conv1.parameters():
                parameter.mul_(inner)
            module.norm2.eps *= inner**2


class _Float32GroupNorm(nn.Module):
    """A GroupNorm that computes in float32 and returns float32."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups = norm.num_groups
        self.eps = norm.eps
        self.weight = constant(norm.weight.to(torch.float32))
        self.bias = constant(norm.bias.to(torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.group_norm(x.to(torch.float32), self.groups, self.weight, self.bias, self.eps)


class _Rounded(nn.Module):
    """A module whose result is rounded to another type."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = inner
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        return y.to(self.dtype)


class _Float32Island(nn.Module):
    """A module that computes in float32 between tensors of another type."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.to(torch.float32)

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        y: torch.Tensor = self.inner(x.to(torch.float32), *args, **kwargs)
        return y.to(x.dtype)


def _keep_norms_float32(encoder: Encoder, dtype: torch.dtype) -> None:
    """Compute group norms and the activations behind them in float32, between tensors of another type.

    The rounding comes behind the activation, because TensorRT then has one kernel for norm, scale, shift,
    activation and casts, and what it writes is 16-bit. A cast between norm and activation splits it in two,
    with the whole feature map in float32 between them (docs/vae.md).
    """
    for module in list(encoder.modules()):
        if isinstance(module, ResnetBlock2D):
            module.norm1, module.norm2 = _Float32GroupNorm(module.norm1), _Float32GroupNorm(module.norm2)
            module.nonlinearity = _Rounded(module.nonlinearity, dtype)
        elif isinstance(module, Attention):
            module.group_norm = _Float32GroupNorm(module.group_norm)  # `QueryChunks` rounds
    encoder.conv_norm_out = _Float32GroupNorm(encoder.conv_norm_out)
    encoder.conv_act = _Rounded(encoder.conv_act, dtype)
