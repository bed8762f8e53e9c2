"""The noise of x_t at every timestep, as the checkpoint's own scheduler defines it.

See docs/design.md, "Noise and schedules".
"""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin

from ditf.export.checkpoints.loading import first_line
from ditf.runtime.errors import InputError, MissingComponent

logger = logging.getLogger(__name__)

TIMESTEPS = 1000
"""Every published model was trained with as many timesteps, and ditf's are 0..999."""

_STEPS = """
    timestep_spacing steps_offset original_inference_steps timestep_scaling skip_prk_steps interpolation_type
    use_karras_sigmas use_exponential_sigmas use_beta_sigmas use_lu_lambdas lambda_min_clipped sigma_min
    sigma_max final_sigmas_type set_alpha_to_one flow_shift shift shift_terminal use_dynamic_shifting
    time_shift_type base_shift max_shift base_image_seq_len max_image_seq_len scale_factors upscale_mode
"""
_SOLVER = """
    solver_order solver_type solver_p algorithm_type predictor_order corrector_order disable_corrector
    tau_func predict_x0 lower_order_final euler_at_final variance_type clip_sample clip_sample_range
    thresholding dynamic_thresholding_ratio sample_max_value stochastic_sampling noise_sampler_seed eta
"""
SAMPLING = frozenset(_STEPS.split() + _SOLVER.split())
"""Config keys that cannot change the noise that a model was trained with: ditf does not read them.

The first ones choose which timesteps a sampler visits, and a shift moves a timestep and its noise together.
The others choose how it computes a step from one to the next.
"""

_EVERY_STEP = {"timestep_spacing": "trailing", "original_inference_steps": TIMESTEPS, "skip_prk_steps": True}
"""Values with which a sampler of 1000 steps visits every timestep of the training."""

_INACTIVE = {
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "rescale_betas_zero_snr": (False, None),
    "use_flow_sigmas": (False, None),
    "snr_shift_scale": (1, None),
    "timestep_type": ("discrete",),
    "invert_sigmas": (False, None),
}
"""Values that change nothing, of keys that a config may still have from the class it was converted from."""

_FLOW_KEYS = ("use_flow_sigmas", "prediction_type")
_FLOW = torch.arange(TIMESTEPS, dtype=torch.float64) / TIMESTEPS
_FIX = "set the checkpoint's own scheduler, of flow matching or DDPM, in scheduler/scheduler_config.json"


@dataclass(frozen=True)
class NoiseLevel:
    """x_t = signal * x_0 + noise * eps."""

    signal: float
    noise: float


def noise_level(levels: torch.Tensor, timestep: int) -> NoiseLevel:
    """The noise level at a timestep.

    Args:
        levels: from `noise_levels`.
        timestep: 0..999.

    Raises:
        InputError: the timestep is out of range.
    """
    if not 0 <= timestep < len(levels):
        raise InputError(f"timestep {timestep} is out of range", f"choose 0..{len(levels) - 1}")
    signal, noise = levels[timestep].tolist()
    return NoiseLevel(signal, noise)


def noise_levels(scheduler: Mapping[str, Any], flow_matching: bool = False) -> torch.Tensor:
    """Signal and noise of every timestep, float64 [1000, 2]: x_t = signal * x_0 + noise * eps.

    The scheduler's class is made from its config, and its own `add_noise` or `scale_noise` is applied to
    (x_0, eps) = (1, 0) and (0, 1), followed by its `scale_model_input`, so that the levels are those of what
    the transformer is given. There are three exceptions, and each is flow matching with noise t / 1000:

    - A config with `use_flow_sigmas` or `prediction_type: flow_prediction`. The `add_noise` of such classes
      looks the noise up among shifted inference steps, whose timesteps are rounded down to integers, and
      SASolverScheduler's does not look at these keys at all.
    - `flow_matching`: the scheduler of a model that is known to be trained with flow matching may have been
      replaced by one that has DDPM noise. A warning says so.
    - A class with `scale_noise` has the noise t / 1000 at the timesteps t that it is asked for, whatever its
      shift: that is checked.

    The graph and the plan take the schedule from here. The reference model
    (`ditf.export.measure.reference_model`) adds noise by itself, so that it can check this.

    Args:
        scheduler: the config of the checkpoint's scheduler.
        flow_matching: whether every model of this family was trained with flow matching.

    Raises:
        InputError: the class has no such noise, or the config has a key that could change the noise and that
            the class does not read.
        MissingComponent: the class needs a library that is not installed.
    """
    name, found = _class_of(scheduler)
    parameters = inspect.signature(found.__init__).parameters
    _check_keys(name, scheduler, parameters)
    asked = _asks_flow(scheduler, parameters)
    levels = _probe(name, found, scheduler, [key for key in parameters if key not in _FLOW_KEYS or not asked])
    if levels is None or asked:
        return _flow_levels()
    if flow_matching:
        logger.warning(
            "the checkpoint's %s adds DDPM noise, but its transformer was trained with flow matching: taking"
            " the noise of flow matching",
            name,
        )
        return _flow_levels()
    for key, value in scheduler.items():
        if _could_change_noise(key) and key not in parameters and value not in _INACTIVE.get(key, ()):
            raise InputError(
                f"the scheduler's config has {key}={value!r:.40}, which {name} does not read",
                "remove the key if the model was not trained with it; otherwise set the _class_name of the"
                " scheduler that it was trained with",
            )
    return levels


def draw_noise(ensemble: int, shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    """eps, float32 [ensemble, c, h, w]; a seed gives the same noise on every machine."""
    return torch.randn((ensemble, *shape), generator=torch.Generator().manual_seed(seed))


def _flow_levels() -> torch.Tensor:
    return torch.stack([1.0 - _FLOW, _FLOW], dim=1)


def _class_of(scheduler: Mapping[str, Any]) -> tuple[str, Any]:
    name = str(scheduler.get("_class_name"))
    found = getattr(diffusers, name, None)
    libraries = getattr(found, "_backends", None)  # diffusers puts a placeholder where one is missing
    if libraries:
        raise MissingComponent(
            f"{name} needs {' and '.join(libraries)}", f"pip install {' '.join(libraries)}"
        )
    if not (inspect.isclass(found) and issubclass(found, SchedulerMixin)):
        raise InputError(f"diffusers {diffusers.__version__} has no scheduler {name:.60}", _FIX)
    return name, found


def _could_change_noise(key: str) -> bool:
    return not key.startswith("_") and key not in SAMPLING


def _check_keys(name: str, scheduler: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    steps = scheduler.get("num_train_timesteps", TIMESTEPS)
    if steps != TIMESTEPS:
        raise InputError(
            f"a scheduler of {steps!r:.40} timesteps is not supported", f"supported: {TIMESTEPS}"
        )
    if scheduler.get("invert_sigmas"):
        raise InputError(
            f"{name} with invert_sigmas=True is not supported: its model's time runs from noise to image",
            _FIX,
        )
    for key in scheduler:
        if _could_change_noise(key) and key not in parameters and key not in _known_keys():
            raise InputError(
                f"the scheduler's config has {key}={scheduler[key]!r:.40}, which no scheduler of diffusers"
                f" {diffusers.__version__} knows: it could change the noise",
                "remove the key if it does not, or install the diffusers that knows it",
            )


@cache
def _known_keys() -> frozenset[str]:
    """The parameters of all schedulers of diffusers."""
    known: set[str] = set()
    for name in dir(diffusers.schedulers):
        found = getattr(diffusers.schedulers, name)
        if inspect.isclass(found) and issubclass(found, SchedulerMixin):
            known.update(inspect.signature(found.__init__).parameters)
    return frozenset(known)


def _asks_flow(scheduler: Mapping[str, Any], parameters: Mapping[str, Any]) -> bool:
    """Whether the config says that the model was trained with flow matching."""
    sigmas = "use_flow_sigmas" in parameters and bool(scheduler.get("use_flow_sigmas"))
    return sigmas or scheduler.get("prediction_type") == "flow_prediction"


def _probe(
    name: str, found: Any, config: Mapping[str, Any], parameters: Collection[str]
) -> torch.Tensor | None:
    """Signal and noise of a scheduler's own method, float64 [1000, 2]; None if they are flow matching's.

    Args:
        parameters: the keys of the config that the scheduler is made with, where they could change the noise.
    """
    given = {key: value for key, value in config.items() if _could_change_noise(key) and key in parameters}
    given |= {key: value for key, value in _EVERY_STEP.items() if key in parameters}
    try:
        with (
            warnings.catch_warnings()
        ):  # diffusers makes numpy arrays of tensors in a way that numpy deprecates
            warnings.simplefilter("ignore", DeprecationWarning)
            made = found(**given)
            if hasattr(made, "add_noise"):
                return _added_levels(made, every_step="timestep_spacing" in parameters)
            if hasattr(made, "scale_noise"):
                _check_scaled(made)
                return None
        raise ValueError("it has neither add_noise nor scale_noise")
    except Exception as error:  # a config can make a library raise anything
        raise InputError(
            f"the scheduler {name} makes no noise schedule ({first_line(error)})", _FIX
        ) from error


def _added_levels(scheduler: Any, every_step: bool) -> torch.Tensor:
    """Signal and noise of what the transformer is given after `add_noise` and `scale_model_input`.

    Args:
        every_step: whether 1000 inference steps are all timesteps of the training. `add_noise` of many
            classes knows only the timesteps of its inference steps.
    """
    means = getattr(scheduler, "alphas_cumprod", None)
    if means is None:
        raise ValueError("its noise is neither that of DDPM nor of flow matching")
    if means.shape != (TIMESTEPS,):
        raise ValueError(f"its betas are not {TIMESTEPS} numbers")
    if every_step or "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(TIMESTEPS)
    else:
        scheduler.set_timesteps(timesteps=list(reversed(range(TIMESTEPS))))
    timesteps = torch.arange(TIMESTEPS).to(scheduler.timesteps.dtype)
    if not torch.isin(timesteps, scheduler.timesteps).all():
        raise ValueError(f"its timesteps are not 0..{TIMESTEPS - 1}")
    x_0, noise = torch.eye(2, dtype=torch.float64)[:, None].expand(-1, TIMESTEPS, -1)
    x_t = scheduler.add_noise(original_samples=x_0, noise=noise, timesteps=timesteps)
    # A copy, because a scheduler counts its steps from the first timestep that it scales.
    scaled = [copy.copy(scheduler).scale_model_input(*one) for one in zip(x_t, timesteps, strict=True)]
    levels = torch.stack(scaled)
    if not torch.allclose(levels[:, 0].square(), means.to(torch.float64), rtol=0, atol=1e-5):  # NaN fails too
        raise ValueError("its add_noise does not follow its alphas_cumprod")
    if not torch.allclose(levels.square().sum(dim=1), torch.ones_like(levels[:, 0]), rtol=0, atol=1e-5):
        raise ValueError("what the transformer is given has no unit variance")
    return levels


def _check_scaled(scheduler: Any) -> None:
    """Check that `scale_noise` has the noise t / 1000 at its own timesteps t."""
    timesteps = scheduler.timesteps
    if timesteps is None or len(timesteps) != TIMESTEPS:
        raise ValueError(f"it has not {TIMESTEPS} timesteps")
    x_0, noise = torch.eye(2, dtype=torch.float64)[:, None]
    for timestep in timesteps.split(1):  # some classes take one at a time
        levels = copy.copy(scheduler).scale_noise(sample=x_0, timestep=timestep, noise=noise)
        level = timestep.to(torch.float64) / TIMESTEPS
        if not torch.allclose(levels[0], torch.cat([1 - level, level]), rtol=0, atol=1e-6):  # NaN fails too
            raise ValueError(f"its noise is not its timestep divided by {TIMESTEPS}")
