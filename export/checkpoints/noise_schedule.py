"""The noise of x_t at every timestep, from the config of the checkpoint's own scheduler.

See docs/design.md, "The feature".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler

from ditf.export.checkpoints.loading import first_line
from ditf.runtime.errors import InputError


@dataclass(frozen=True)
class NoiseLevel:
    """x_t = signal * x_0 + noise * eps."""

    signal: float
    noise: float


def noise_level(scheduler: Mapping[str, Any], timestep: int) -> NoiseLevel:
    """The noise level at a timestep.

    Args:
        scheduler: the config of the checkpoint's scheduler.
        timestep: 0..999.

    Raises:
        InputError: the timestep is out of range, or the scheduler is not supported.
    """
    levels = noise_levels(scheduler)
    if not 0 <= timestep < len(levels):
        raise InputError(f"timestep {timestep} is out of range", f"choose 0..{len(levels) - 1}")
    signal, noise = levels[timestep].tolist()
    return NoiseLevel(signal, noise)


def noise_levels(scheduler: Mapping[str, Any]) -> torch.Tensor:
    """Signal and noise of every timestep, float64 [T, 2]: x_t = signal * x_0 + noise * eps.

    With flow matching they are linear in t. A scheduler with betas is DDPM: they are sqrt(abar_t) and
    sqrt(1 - abar_t). The graph and the plan take the schedule from here. The reference model
    (`ditf.export.measure.reference_model`) adds noise by itself, so that it can check this.

    Raises:
        InputError: the scheduler is of neither kind.
    """
    name = str(scheduler.get("_class_name"))
    steps = scheduler.get("num_train_timesteps", 1000)
    if steps != 1000:  # every published model was trained with 1000, and ditf's timesteps are 0..999
        raise InputError(f"a scheduler of {steps} timesteps is not supported", "supported: 1000")
    if name.startswith("FlowMatch"):
        noise = torch.arange(steps, dtype=torch.float64) / steps
        return torch.stack([1.0 - noise, noise], dim=1)
    if "beta_schedule" in scheduler:
        alpha_bar = ddpm_scheduler(scheduler).alphas_cumprod.to(torch.float64)
        return torch.stack([alpha_bar, 1.0 - alpha_bar], dim=1).sqrt()
    raise InputError(f"scheduler {name} is not supported", "supported: flow matching and DDPM-like")


def ddpm_scheduler(scheduler: Mapping[str, Any]) -> DDPMScheduler:
    """The DDPM forward process that a sampler such as DDIM or DPM-Solver inverts.

    Raises:
        InputError: the config's betas make no schedule of 1000 steps.
    """
    betas = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    try:
        made = DDPMScheduler(**{key: scheduler[key] for key in betas if key in scheduler})
        if made.alphas_cumprod.shape != (1000,) or not bool(made.alphas_cumprod.isfinite().all()):
            raise ValueError("its betas are not 1000 numbers")
        return made
    except Exception as error:  # a config can make a library raise anything
        raise InputError(
            f"the scheduler's config makes no noise schedule ({first_line(error)})",
            "download the checkpoint again",
        ) from error


def draw_noise(ensemble: int, shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    """eps, float32 [ensemble, c, h, w]; a seed gives the same noise on every machine."""
    return torch.randn((ensemble, *shape), generator=torch.Generator().manual_seed(seed))
