"""Noise levels, against the public methods of every scheduler of the installed diffusers."""

from __future__ import annotations

import copy
import inspect
import logging

import diffusers
import pytest
import torch
from diffusers import SchedulerMixin

from ditf.export.checkpoints.noise_schedule import SAMPLING, draw_noise, noise_level, noise_levels
from ditf.runtime.errors import InputError

FLOW = torch.arange(1000, dtype=torch.float64) / 1000
SCHEDULERS = sorted(
    name
    for name, found in ((name, getattr(diffusers, name, None)) for name in dir(diffusers.schedulers))
    if inspect.isclass(found) and issubclass(found, SchedulerMixin) and found is not SchedulerMixin
)
"""The classes that a checkpoint can name."""

REFUSED = {
    "AmusedScheduler": "mask_token_id",  # noise is masked tokens
    "BlockRefinementScheduler": "neither that of DDPM nor of flow",  # masked tokens
    "CMStochasticIterativeScheduler": "neither that of DDPM nor of flow",  # EDM: its time is log sigma
    "DDIMInverseScheduler": "neither add_noise nor scale_noise",
    "DDPMWuerstchenScheduler": "neither that of DDPM nor of flow",  # its time is 0..1
    "DiscreteDDIMScheduler": "neither add_noise nor scale_noise",  # tokens
    "EDMDPMSolverMultistepScheduler": "neither that of DDPM nor of flow",
    "EDMEulerScheduler": "neither that of DDPM nor of flow",
    "EntropyBoundScheduler": "neither add_noise nor scale_noise",  # tokens
    "HeliosDMDScheduler": "neither that of DDPM nor of flow",  # noise in several stages of resolution
    "HeliosScheduler": "neither add_noise nor scale_noise",
    "IPNDMScheduler": "neither add_noise nor scale_noise",
    "KarrasVeScheduler": "neither that of DDPM nor of flow",  # variance exploding
    "LTXEulerAncestralRFScheduler": "neither add_noise nor scale_noise",
    "MiniMaxH3Scheduler": "not 1000 timesteps",  # its time is 0..1 and runs from noise to image
    "PiflowScheduler": "neither add_noise nor scale_noise",
    "RFD4ProteinaScheduler": "schedule_mode",  # of proteins
    "RePaintScheduler": "add_noise",  # it raises NotImplementedError
    "SCMScheduler": "neither add_noise nor scale_noise",  # TrigFlow
    "ScoreSdeVeScheduler": "neither that of DDPM nor of flow",  # variance exploding
    "VQDiffusionScheduler": "num_vec_classes",  # tokens
}
"""Schedulers whose noise a model of one of ditf's families cannot have, and what the error says."""

VARIANTS = {
    "plain": {},
    "flow": {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    "zero SNR": {"rescale_betas_zero_snr": True},
    "shifted": {"shift": 3.0},
}
"""Settings that every class with such parameters is tried with."""


def supported():
    yield "DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}
    yield "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}
    yield "EulerDiscreteScheduler", {"use_karras_sigmas": True}
    for name in SCHEDULERS:
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        for settings in VARIANTS.values():
            if name not in REFUSED and all(key in parameters for key in settings):
                yield name, settings


def config_of(scheduler):
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def given_to_the_transformer(scheduler, timestep, x_0, noise):
    """What a pipeline makes of an image at one of its inference steps, in float64."""
    steps = timestep.reshape(1)
    if hasattr(scheduler, "scale_noise"):
        return copy.copy(scheduler).scale_noise(sample=x_0, timestep=steps, noise=noise)
    x_t = scheduler.add_noise(original_samples=x_0, noise=noise, timesteps=steps)
    return copy.copy(scheduler).scale_model_input(x_t, timestep)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy's, of what diffusers does
@pytest.mark.parametrize(("name", "settings"), list(supported()))
def test_levels_are_those_of_the_schedulers_own_inference_steps(name, settings):
    scheduler = getattr(diffusers, name)(**settings)
    levels = noise_levels(config_of(scheduler))
    scheduler.set_timesteps(10)  # they are whole numbers in most classes: 999 = 9 * 111
    flow = bool(settings.get("use_flow_sigmas")) or hasattr(scheduler, "scale_noise")
    x_0, noise = torch.randn(2, 1, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    compared = 0
    for timestep in scheduler.timesteps.unique():
        if flow:  # between timesteps the levels of flow matching are linear
            signal, level = 1 - float(timestep) / 1000, float(timestep) / 1000
        elif float(timestep).is_integer() and not settings.get("use_karras_sigmas"):
            signal, level = levels[int(timestep)].tolist()
        else:
            continue  # a timestep that the sampler has interpolated or rounded
        if name == "SASolverScheduler" and flow:
            continue  # its add_noise has DDPM noise where its sampler has that of flow matching
        expected = given_to_the_transformer(scheduler, timestep, x_0, noise)
        # Some classes round the timesteps of flow matching down, and not the noise.
        near = 4e-3 if settings.get("use_flow_sigmas") else 1e-5
        torch.testing.assert_close(signal * x_0 + level * noise, expected, rtol=0, atol=near)
        compared += 1
    assert compared >= 8 or settings.get("use_karras_sigmas") or name == "SASolverScheduler"
    if flow:
        assert torch.equal(levels[:, 1], FLOW)
        assert torch.equal(levels[:, 0], 1 - FLOW)
    elif hasattr(scheduler, "alphas_cumprod"):
        torch.testing.assert_close(
            levels[:, 0].square(), scheduler.alphas_cumprod.double(), rtol=0, atol=1e-6
        )
        torch.testing.assert_close(levels.square().sum(dim=1), torch.ones_like(FLOW), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_other_schedulers_are_refused(name):
    with pytest.raises(InputError, match=f"{name}.*{REFUSED[name]}"):
        noise_levels({"_class_name": name})


def test_every_refused_scheduler_is_one_of_diffusers():
    assert set(REFUSED) <= set(SCHEDULERS)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_rescaled_betas_end_in_noise_alone(name):
    levels = noise_levels({"_class_name": name, "rescale_betas_zero_snr": True})
    assert levels[999].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    "settings",
    [
        {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
        {"_class_name": "SASolverScheduler", "use_flow_sigmas": True},
        {"_class_name": "DDPMScheduler", "prediction_type": "flow_prediction"},
        {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"},
        # FlowMatchEulerDiscreteScheduler.from_config(DDPMScheduler().config) keeps the betas
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "beta_schedule": "linear", "beta_start": 0.1},
    ],
)
def test_a_config_of_flow_matching(settings):
    assert torch.equal(noise_levels(settings)[:, 1], FLOW)


def test_a_model_of_flow_matching_with_ddpm_noise_gets_its_own_and_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        levels = noise_levels({"_class_name": "DDIMScheduler"}, flow_matching=True)
    assert torch.equal(levels[:, 1], FLOW)
    assert "DDIMScheduler adds DDPM noise" in caplog.text


def test_a_config_that_was_converted_from_another_class_keeps_its_meaning():
    config = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config
    kept = diffusers.DPMSolverMultistepScheduler.from_config(config, use_flow_sigmas=True)
    assert kept.config["shift"] == 3.0
    assert torch.equal(noise_levels(config_of(kept))[:, 1], FLOW)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_class_name": "LCM"}, "no scheduler LCM"),
        ({"_class_name": "DiTTransformer2DModel"}, "no scheduler DiT"),
        ({}, "no scheduler None"),
        ({"_class_name": "DDPMScheduler", "num_train_timesteps": 4000}, "4000 timesteps"),
        ({"_class_name": "DDPMScheduler", "noise_curve": "steep"}, "noise_curve='steep'"),
        (
            {"_class_name": "DEISMultistepScheduler", "rescale_betas_zero_snr": True},
            "rescale_betas_zero_snr=True",
        ),
        ({"_class_name": "EulerDiscreteScheduler", "use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ({"_class_name": "DDIMScheduler", "snr_shift_scale": 3.0}, "snr_shift_scale=3.0"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas"),
        (
            {
                "_class_name": "EulerDiscreteScheduler",
                "timestep_type": "continuous",
                "prediction_type": "v_prediction",
            },
            "timesteps are not 0..999",
        ),
    ],
)
def test_a_config_that_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        noise_levels(settings)


@pytest.mark.parametrize("betas", [0.5, 2**63, [0.1, 0.2], [float("nan")] * 1000, "betas"])
def test_trained_betas_that_are_no_schedule(betas):
    config = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "trained_betas": betas}
    with pytest.raises(InputError, match="makes no noise schedule"):
        noise_levels(config)


READ = {
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "snr_shift_scale",
    "prediction_type",
    "use_flow_sigmas",
    "timestep_type",
    "invert_sigmas",
}


def test_every_key_of_a_supported_scheduler_is_read_or_of_sampling():
    """A parameter that a new diffusers adds is given to the class, until somebody decides."""
    keys = {
        key
        for name in set(SCHEDULERS) - set(REFUSED)
        for key in inspect.signature(getattr(diffusers, name).__init__).parameters
    }
    assert keys - SAMPLING - {"self", "kwargs"} == READ


def test_every_key_that_is_not_read_is_one_of_a_scheduler():
    known = {
        key for name in SCHEDULERS for key in inspect.signature(getattr(diffusers, name).__init__).parameters
    }
    assert known >= SAMPLING - {"noise_sampler_seed"}  # of DPMSolverSDEScheduler, which needs torchsde


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_a_timestep_out_of_range(timestep):
    with pytest.raises(InputError, match=r"choose 0\.\.999"):
        noise_level(noise_levels({"_class_name": "DDPMScheduler"}), timestep)


def test_the_level_of_a_timestep():
    level = noise_level(noise_levels({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}), 260)
    assert (level.signal, level.noise) == pytest.approx((0.74, 0.26))


def test_noise_is_the_contracts():
    expected = torch.randn((3, 4, 8, 6), generator=torch.Generator().manual_seed(7))
    assert torch.equal(draw_noise(3, (4, 8, 6), 7), expected)
