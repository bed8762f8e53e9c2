"""A checkpoint and encoders that share its latent space, or do not: what --vae is given."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from ditf.calib.images import procedural_images
from tests.checkpoints import seeded, tiny_vae

SIDE = 64
STEPS = 240
WIDTH = 16


@dataclass(frozen=True)
class Vaes:
    """Directories.

    Attributes:
        checkpoint: a PixArt whose x_0 has mean 0 and spread 1, as published ones nearly have.
        tiny: an AutoencoderTiny distilled from its VAE; tuned: its VAE, every weight a little changed.
        other: an AutoencoderKL of another latent space, of as many channels.
    """

    checkpoint: Path
    tiny: Path
    tuned: Path
    other: Path


def save_vaes(folder: Path, pixart: Path) -> Vaes:
    """Make them under `folder`; `pixart` is a tiny checkpoint."""
    made = Vaes(*(folder / name for name in ("checkpoint", "tiny", "tuned", "other")))
    shutil.copytree(pixart, made.checkpoint)
    own = learnable_vae(0)
    own.save_pretrained(made.checkpoint / "vae")
    distilled(own).save_pretrained(made.tiny)
    with torch.no_grad(), seeded():
        for parameter in own.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    own.save_pretrained(made.tuned)
    learnable_vae(1).save_pretrained(made.other)
    return made


def learnable_vae(seed: int) -> AutoencoderKL:
    """A random AutoencoderKL that a small network can imitate: smooth kernels, small branches."""
    with seeded(seed), torch.no_grad():
        vae = tiny_vae().eval().requires_grad_(False)
        for name, module in vae.encoder.named_modules():
            if name.endswith(("conv2", "to_out.0")):
                module.weight *= 0.3
            if name == "conv_in" or name.endswith("downsamplers.0.conv"):
                module.weight.copy_(3 * module.weight.mean((2, 3), keepdim=True).expand_as(module.weight))
        mean = vae.encode(pixels(16)).latent_dist.mean
    vae.register_to_config(shift_factor=float(mean.mean()), scaling_factor=float(1 / mean.std()))
    return vae


def distilled(vae: AutoencoderKL) -> AutoencoderTiny:
    """An AutoencoderTiny whose encoder learned x_0 of a VAE, by least squares."""
    images = pixels(16)
    with torch.no_grad():
        mean = vae.encode(images).latent_dist.mean
        x_0 = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    with seeded(), torch.enable_grad():
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(WIDTH,) * 3,
            decoder_block_out_channels=(WIDTH,) * 3,
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        )
        encoder = tiny.encoder
        encoder.layers[-1].bias.data.copy_(x_0.mean((0, 2, 3)))
        optimizer = torch.optim.Adam(encoder.parameters(), lr=5e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, STEPS)
        for _ in range(STEPS):
            batch = torch.randint(0, len(images), (4,))
            loss = (tiny.encode(images[batch]).latents - x_0[batch]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return tiny.eval().requires_grad_(False)


def pixels(count: int) -> torch.Tensor:
    """Procedural pictures in [-1, 1], [n, 3, SIDE, SIDE]."""
    pictures = np.stack(procedural_images((SIDE, SIDE), count))
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def copy_with_config(source: Path, folder: Path, **changes: object) -> Path:
    """A copy of a VAE's directory whose config says otherwise."""
    shutil.copytree(source, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder
