"""The built-in demo model: a small untrained DiT with seeded weights and two planted massive channels.

It shows the toolchain, not good features: a later version is trained.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from safetensors import SafetensorError

from ditf.export.families.base import Defaults
from ditf.runtime.errors import InputError

PLANTED = {5: (60.0, 1), 41: (-40.0, 2)}
"""Massive channels: {channel: (value, period in pixels of the texture that perturbs it)}."""

DEMO_DEFAULTS = Defaults(
    layer=9,
    timestep=10,
    source="an untrained model cannot denoise: the noise is kept far below the image",
)
_PERTURBATION = 100.0
_SEED = 20260


def write_demo_checkpoint(folder: Path) -> None:
    """Write the demo checkpoint in diffusers' layout: transformer/ and scheduler/, no VAE.

    12 blocks of width 192 over 8-pixel patches of 256 px images. Like massive activations in trained
    models, the planted channels are large in every token and tell nothing of the place: here they
    follow the finest texture, which does not repeat between two photographs. Unless they are
    discarded they drown the other channels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = DiTTransformer2DModel(
            num_attention_heads=6,
            attention_head_dim=32,
            in_channels=3,
            out_channels=3,
            num_layers=12,
            sample_size=256,
            patch_size=8,
            num_embeds_ada_norm=1,
        )
    projection = model.pos_embed.proj
    with torch.no_grad():
        projection.weight *= 6.0  # the image above the position embedding
        for channel, (value, period) in PLANTED.items():
            steps = torch.arange(8) // period
            checkerboard = (steps[:, None] + steps) % 2 * 2.0 - 1.0
            filter_size = projection.weight[channel].numel()
            projection.weight[channel] = _PERTURBATION * value * checkerboard / filter_size
            projection.bias[channel] = value
    try:
        model.save_pretrained(folder / "transformer")
        DDPMScheduler(beta_schedule="linear").save_pretrained(folder / "scheduler")
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"the demo model cannot be written to {folder} ({error})", "free some space, or set TMPDIR"
        ) from error
