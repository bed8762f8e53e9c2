"""x_0 in the graph: the VAE encoder's posterior mean, shifted and scaled, or the pixels themselves."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import nn

from ditf.export.graph.layers import constant
from ditf.export.graph.precision import Precision


class PixelEncoder(nn.Module):
    """For a model that works in pixels: x_0 is the normalised image."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels


class KLEncoder(nn.Module):
    """Encoder half of an AutoencoderKL, group norms in float32, the rest in the graph's precision.

    Args:
        vae: float32; its encoder is taken over and changed in place.
        shift, scale: x_0 = (mean - shift) * scale.
    """

    def __init__(self, vae: AutoencoderKL, shift: float, scale: float, precision: Precision) -> None:
        super().__init__()
        self.encoder = vae.encoder.to(precision.compute)
        self.quant_conv = None if vae.quant_conv is None else vae.quant_conv.to(precision.compute)
        self.channels = vae.config.latent_channels
        self.shift = shift
        self.scale = scale
        self.dtype = precision.compute
        if precision.compute != torch.float32:
            _keep_group_norms_float32(self.encoder)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        moments = self.encoder(pixels.to(self.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean = moments[:, : self.channels].to(torch.float32)
        return (mean - self.shift) * self.scale


class _Float32GroupNorm(nn.Module):
    """GroupNorm computed in float32 between tensors of another type."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups = norm.num_groups
        self.eps = norm.eps
        self.weight = constant(norm.weight.to(torch.float32))
        self.bias = constant(norm.bias.to(torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.group_norm(x.to(torch.float32), self.groups, self.weight, self.bias, self.eps)
        return y.to(x.dtype)


def _keep_group_norms_float32(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm):
            setattr(module, name, _Float32GroupNorm(child))
        else:
            _keep_group_norms_float32(child)
