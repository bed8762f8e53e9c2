"""A checkpoint and encoders that share its latent space, or do not: what --vae is given."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch.nn import functional

from ditf.calib.images import procedural_images
from tests.checkpoint_parts import seeded, tiny_vae

SIDE = 64
WIDTH = 16


@dataclass(frozen=True)
class Vaes:
    """Directories.

    Attributes:
        checkpoint: a PixArt whose x_0 has mean 0 and spread 1, as published ones nearly have.
        tiny: an AutoencoderTiny that agrees with its VAE; tuned: its VAE, every weight a little changed.
        other: an AutoencoderKL of another latent space, of as many channels.
    """

    checkpoint: Path
    tiny: Path
    tuned: Path
    other: Path

    @classmethod
    def under(cls, folder: Path) -> Vaes:
        """Those that `save_vaes` made there."""
        return cls(*(folder / name for name in ("checkpoint", "tiny", "tuned", "other")))


def save_vaes(folder: Path, pixart: Path) -> None:
    """Make them under `folder`; `pixart` is a tiny checkpoint."""
    made = Vaes.under(folder)
    shutil.copytree(pixart, made.checkpoint)
    own = learnable_vae(0)
    own.save_pretrained(made.checkpoint / "vae")
    fitted(own).save_pretrained(made.tiny)
    with torch.no_grad(), seeded():
        for parameter in own.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    own.save_pretrained(made.tuned)
    learnable_vae(1).save_pretrained(made.other)


def learnable_vae(seed: int) -> AutoencoderKL:
    """A random AutoencoderKL that a small network can imitate."""
    with seeded(seed):
        vae = tiny_vae().eval().requires_grad_(False)
    make_learnable(vae, pixels(16))
    return vae


def fitted(vae: AutoencoderKL) -> AutoencoderTiny:
    """An AutoencoderTiny that agrees with a VAE."""
    with seeded():
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(WIDTH,) * 3,
            decoder_block_out_channels=(WIDTH,) * 3,
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        )
        fit_tiny(tiny.eval(), vae, pixels(16))
    return tiny


@torch.no_grad()
def make_learnable(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Smooth kernels and small branches, in place, and an x_0 of mean 0 and spread 1 on the images."""
    for name, module in vae.encoder.named_modules():
        if name.endswith(("conv2", "to_out.0")):
            module.weight *= 0.3
        if name == "conv_in" or name.endswith("downsamplers.0.conv"):
            module.weight.copy_(3 * module.weight.mean((2, 3), keepdim=True).expand_as(module.weight))
    mean = torch.cat([vae.encode(image).latent_dist.mean for image in images.split(1)])
    vae.quant_conv.bias[: vae.config.latent_channels] -= mean.mean()  # no pipeline of PixArt has a shift
    vae.register_to_config(scaling_factor=float(1 / mean.std()))


@torch.no_grad()
def fit_tiny(tiny: AutoencoderTiny, vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Make a tiny encoder agree with a VAE, in place: ReLUs of random colours, averaged, then least squares.

    Args:
        images: in [-1, 1], [n, 3, H, W].
    """
    mean = torch.cat([vae.encode(image).latent_dist.mean for image in images.split(1)])
    x_0 = mean * vae.config.scaling_factor
    layers = tiny.encoder.layers
    first, *strided, last = (layer for layer in layers if isinstance(layer, torch.nn.Conv2d))
    width = len(first.weight)
    colour = 2 * torch.randn(width, 3)
    first.weight.copy_(colour[:, :, None, None].expand_as(first.weight) / 9)
    first.bias.copy_(0.5 * torch.randn(width) - colour.mean(1) * 1.5)
    for block in layers:
        if isinstance(block, AutoencoderTinyBlock):  # then it passes on what is positive
            block.conv[-1].weight.zero_()
            block.conv[-1].bias.zero_()
    for layer in strided:
        layer.weight.copy_(torch.eye(width)[:, :, None, None].expand_as(layer.weight) / 9)
    inside = functional.unfold(layers[:-1](images * 0.5 + 0.5), 3, padding=1).transpose(1, 2).flatten(0, 1)
    known = torch.cat([inside, torch.ones(len(inside), 1)], dim=1).double()
    products = known.T @ known
    products += 1e-4 * products.diagonal().mean() * torch.eye(len(products))
    target = x_0.flatten(2).transpose(1, 2).flatten(0, 1).double()
    solved = torch.linalg.solve(products, known.T @ target).float()
    last.weight.copy_(solved[:-1].T.reshape(last.weight.shape))
    last.bias.copy_(solved[-1])


def pixels(count: int, side: int = SIDE) -> torch.Tensor:
    """Procedural pictures in [-1, 1], [n, 3, side, side]."""
    pictures = np.stack(procedural_images((side, side), count))
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def copy_with_config(source: Path, folder: Path, **changes: object) -> Path:
    """A copy of a VAE's directory whose config says otherwise."""
    shutil.copytree(source, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder
