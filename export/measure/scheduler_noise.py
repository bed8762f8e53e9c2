"""Noise by the public methods of diffusers' schedulers, not by ditf's own schedule."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import diffusers
import torch

_EVERY_STEP = {
    "timestep_spacing": "trailing",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "interpolation_type": "linear",
    "lambda_min_clipped": -float("inf"),
    "original_inference_steps": 1000,
    "skip_prk_steps": True,
}
"""Settings of samplers with which 1000 inference steps are the timesteps 999, ..., 0."""


class SchedulerNoise:
    """Adds noise to x_0 as the checkpoint's scheduler does.

    `noise_schedule.noise_levels` decides for the graph between DDPM and flow matching. The decision is made
    again here, because the reference has to find a graph that has the wrong noise.

    Args:
        config: of the checkpoint's scheduler; `noise_levels` has accepted it.
        flow_matching: whether the transformer is known to be trained with flow matching.

    Attributes:
        source: the method that adds the noise, for the record.
    """

    def __init__(self, config: Mapping[str, Any], flow_matching: bool) -> None:
        own = getattr(diffusers, config["_class_name"])
        asked = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
        self._flow = flow_matching or bool(asked) or not hasattr(own, "add_noise")
        self._scheduler: Any
        if self._flow:
            # Without a shift, whose timesteps are 1, 2, ..., 1000.
            self._scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
            self.source = "FlowMatchEulerDiscreteScheduler.scale_noise"
            return
        self.source = f"{own.__name__}.add_noise"
        with warnings.catch_warnings():  # numpy deprecates how diffusers makes arrays of tensors
            warnings.simplefilter("ignore", DeprecationWarning)
            self._scheduler = own.from_config(config, **_EVERY_STEP)
            self._scheduler.set_timesteps(1000)
            if 0 not in self._scheduler.timesteps:  # DPMSolverSinglestepScheduler has no timestep_spacing
                self._scheduler.set_timesteps(timesteps=list(range(999, -1, -1)))

    def add(self, x_0: torch.Tensor, noise: torch.Tensor, timestep: int) -> torch.Tensor:
        """x_t, as the transformer is given it, of the shape and type of x_0 and noise."""
        if self._flow:
            if not timestep:
                return x_0
            own = self._scheduler.timesteps[-timestep].to(x_0.device)  # 260 may be 259.99998 there
            noisy: torch.Tensor = self._scheduler.scale_noise(x_0, own.expand(len(x_0)), noise)
            return noisy
        steps = torch.full((len(x_0),), timestep, device=x_0.device)
        scheduler = copy.copy(self._scheduler)  # it counts steps from the first timestep that it scales
        given: torch.Tensor = scheduler.scale_model_input(scheduler.add_noise(x_0, noise, steps), steps[0])
        return given
