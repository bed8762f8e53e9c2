"""Noise levels, against diffusers' own schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from ditf.export.checkpoints.noise_schedule import draw_noise, noise_level
from ditf.runtime.errors import InputError


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("timestep", [0, 261, 999])
def test_ddpm_levels_are_those_of_add_noise(schedule, timestep):
    scheduler = DDPMScheduler(beta_schedule=schedule)
    config = {**DPMSolverMultistepScheduler(beta_schedule=schedule).config}
    config["_class_name"] = "DPMSolverMultistepScheduler"
    x_0, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = scheduler.add_noise(x_0, eps, torch.tensor([timestep]))
    level = noise_level(config, timestep)
    torch.testing.assert_close(level.signal * x_0 + level.noise * eps, expected)


def test_flow_matching_is_linear_in_t():
    config = {**FlowMatchEulerDiscreteScheduler().config, "_class_name": "FlowMatchEulerDiscreteScheduler"}
    level = noise_level(config, 260)
    assert (level.signal, level.noise) == pytest.approx((0.74, 0.26))


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_a_timestep_out_of_range(timestep):
    with pytest.raises(InputError, match=r"choose 0\.\.999"):
        noise_level({"_class_name": "DDPMScheduler", "beta_schedule": "linear"}, timestep)


def test_an_unknown_scheduler():
    with pytest.raises(InputError, match="LCM"):
        noise_level({"_class_name": "LCM"}, 0)


def test_noise_is_the_contracts():
    expected = torch.randn((3, 4, 8, 6), generator=torch.Generator().manual_seed(7))
    assert torch.equal(draw_noise(3, (4, 8, 6), 7), expected)


@pytest.mark.parametrize("betas", [0.5, 2**63, [0.1, 0.2], [float("nan")] * 1000, "betas"])
def test_trained_betas_that_are_no_schedule(betas):
    config = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "trained_betas": betas}
    with pytest.raises(InputError, match="makes no noise schedule"):
        noise_level(config, 261)
