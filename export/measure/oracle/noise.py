"""x_t by the checkpoint's own scheduler: its `scale_noise` or `add_noise`.

Schedulers look a timestep up in a grid of inference steps that their settings shift and space. Those settings
belong to sampling: here they are set to a plain grid of all training timesteps, so that a flow model's
timestep t is the noise level t / 1000.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.measure.oracle.parts import Parts, quiet_classes
from ditf.runtime.errors import InputError

_PLAIN_GRID = {
    "shift": 1.0,
    "flow_shift": 1.0,
    "shift_terminal": None,
    "use_dynamic_shifting": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "lambda_min_clipped": -float("inf"),
}
_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
_STEPS = 1000
_NEAR = 1e-2  # in timesteps; neighbours of the grid are 1 apart


class Noise:
    """Adds noise as the scheduler of a checkpoint does.

    Args:
        flow: the pipeline samples by flow matching, whichever scheduler the checkpoint was saved with.

    Attributes:
        source: the method that adds the noise, for the record.
    """

    def __init__(self, parts: Parts, checkpoint: Checkpoint, flow: bool) -> None:
        config = checkpoint.config("scheduler")
        said = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
        self._flow = bool(flow or said)
        scheduler: Any = parts.scheduler({**_PLAIN_GRID, **(_FLOW if self._flow else {})})
        if flow and not hasattr(scheduler, "scale_noise") and "use_flow_sigmas" not in scheduler.config:
            scheduler = FlowMatchEulerDiscreteScheduler()
        self._scheduler = scheduler
        method = "scale_noise" if hasattr(scheduler, "scale_noise") else "add_noise"
        self.source = f"{type(scheduler).__name__}.{method}"

    def add(self, x_0: torch.Tensor, eps: torch.Tensor, timestep: int) -> torch.Tensor:
        """x_t [1, c, h', w'].

        Args:
            x_0, eps: [1, c, h', w'].
            timestep: 0..999.

        Raises:
            InputError: the scheduler has no such timestep.
        """
        if self._flow and timestep == 0:
            return x_0  # the grids of flow matching start at 1
        with quiet_classes():
            return self._add(x_0, eps, timestep)

    def _add(self, x_0: torch.Tensor, eps: torch.Tensor, timestep: int) -> torch.Tensor:
        scheduler = self._scheduler
        if hasattr(scheduler, "scale_noise"):
            nearest = self._nearest(scheduler.timesteps, timestep)
            noisy: torch.Tensor = scheduler.scale_noise(x_0, scheduler.timesteps[nearest : nearest + 1], eps)
            return noisy
        if hasattr(scheduler, "sigmas"):  # of the multistep schedulers, whose add_noise reads the grid
            scheduler.set_begin_index(self._set_grid(timestep))
        noisy = scheduler.add_noise(x_0, eps, torch.tensor([timestep]))
        scaled: torch.Tensor = scheduler.scale_model_input(noisy, torch.tensor(timestep))
        return scaled

    def _set_grid(self, timestep: int) -> int:
        """Make a grid that has the timestep; returns its index."""
        scheduler = self._scheduler
        if not self._flow:
            scheduler.set_timesteps(_STEPS)
            if timestep not in scheduler.timesteps:  # the multistep schedulers leave out the last of a grid
                scheduler.set_timesteps(2 * _STEPS)
            return self._nearest(scheduler.timesteps, timestep)
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(sigmas=np.array([timestep / _STEPS]))
        else:
            scheduler.set_timesteps(_STEPS - 1)
        return self._nearest(scheduler.sigmas[:-1] * _STEPS, timestep)

    def _nearest(self, grid: torch.Tensor, timestep: int) -> int:
        distance = (grid.double() - timestep).abs()
        if float(distance.min()) > _NEAR:
            raise InputError(
                f"timestep {timestep} is not among those of {type(self._scheduler).__name__}",
                "use another scheduler, such as the one the model was published with",
            )
        return int(distance.argmin())
