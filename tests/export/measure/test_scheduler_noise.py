"""Noise by every kind of scheduler, against the formulas of the papers and the schedule of the graph."""

from __future__ import annotations

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from ditf.calib.images import golden_pair
from ditf.export.measure.reference_model import Reference
from ditf.export.measure.scheduler_noise import SchedulerNoise
from tests.export.parity import SETTINGS, planned

DDPM = [
    ("DDPMScheduler", {}),
    ("DDIMScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ("PNDMScheduler", {"steps_offset": 1}),
    ("LCMScheduler", {}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"rescale_betas_zero_snr": True}),
    ("DPMSolverMultistepScheduler", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
    ("DPMSolverSinglestepScheduler", {}),
    ("UniPCMultistepScheduler", {"timestep_spacing": "leading"}),
    ("DEISMultistepScheduler", {"beta_schedule": "scaled_linear"}),
    ("SASolverScheduler", {}),
]
FLOW = [
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "shift_terminal": 0.1}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ("DPMSolverMultistepScheduler", {"flow_shift": 3.0}),
    ("UniPCMultistepScheduler", {"flow_shift": 3.0}),
    ("DEISMultistepScheduler", {"flow_shift": 3.0}),
    ("DPMSolverSinglestepScheduler", {"flow_shift": 3.0}),
    ("SASolverScheduler", {"flow_shift": 3.0}),  # its own add_noise ignores the flags
]
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers

FLAGS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def levels(name, config, timestep, flow=False):
    """Signal and noise of x_t, and the method that gives them."""
    if hasattr(getattr(diffusers, name)(), "betas"):
        config = {"beta_start": 0.0001, "beta_end": 0.02, **config}
    noise = SchedulerNoise({"_class_name": name, **config}, flow)
    one, none = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    return [float(noise.add(*pair, timestep)) for pair in ((one, none), (none, one))], noise.source


@pytest.mark.parametrize(("name", "config"), DDPM)
def test_a_ddpm_schedule(name, config):
    betas = config.get("beta_schedule", "linear")
    steps = np.arange(1000)
    if betas == "squaredcos_cap_v2":
        bar = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    elif betas == "scaled_linear":
        beta = np.linspace(0.0001**0.5, 0.02**0.5, 1000) ** 2
    else:
        beta = 0.0001 + (0.02 - 0.0001) * steps / 999
    root = np.sqrt(np.cumprod(1 - beta))
    if config.get("rescale_betas_zero_snr"):  # Lin et al. 2023, algorithm 1
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    for timestep in (0, 261, 900):
        (signal, noise), source = levels(name, {"beta_schedule": betas, **config}, timestep)
        assert signal == pytest.approx(root[timestep], rel=1e-3, abs=1e-5)
        assert noise == pytest.approx(np.sqrt(1 - root[timestep] ** 2), rel=1e-3, abs=1e-5)
    assert source == f"{name}.add_noise"


@pytest.mark.parametrize(("name", "config"), FLOW)
@pytest.mark.parametrize("flags", [{}, FLAGS], ids=["not-said", "said"])
def test_flow_matching(name, config, flags):
    """A pipeline of flow matching, or a scheduler that says so: t is the noise level, whatever is shifted."""
    if name.startswith("FlowMatch"):
        flags = {}
    for timestep in (0, 1, 127, 261, 999):
        (signal, noise), _ = levels(name, {**config, **flags}, timestep, flow=not flags)
        assert (signal, noise) == pytest.approx((1 - timestep / 1000, timestep / 1000), abs=2e-7)


def test_a_scheduler_that_cannot_flow():
    levels_and_source = levels("DDIMScheduler", {}, 261, flow=True)
    assert levels_and_source == (pytest.approx([0.739, 0.261]), "FlowMatchEulerDiscreteScheduler.scale_noise")


def test_a_model_of_flow_matching_saved_with_dpm_solver(checkpoint, tmp_path):
    """Its features are those of the same weights with the scheduler that they were published with."""
    own = checkpoint("sd3")
    other = shutil.copytree(own, tmp_path / "dpm")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(own / "scheduler")
    DPMSolverMultistepScheduler.from_config(
        scheduler.config,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        flow_shift=scheduler.config.shift,
    ).save_pretrained(other / "scheduler")
    index = json.loads((other / "model_index.json").read_text())
    index["scheduler"][1] = "DPMSolverMultistepScheduler"
    (other / "model_index.json").write_text(json.dumps(index))
    maps, levels = [], []
    for folder in (own, other):
        plan, (entry,) = planned(folder, "2", (32, 32), 1, 1, "bake", False)
        reference = Reference(plan.checkpoint, plan.family, plan.layer, plan.size, plan.noise())
        reference.under(entry.condition, entry.timestep)
        maps.append(reference.features(reference.hidden_states(golden_pair(plan.size)[0]), SETTINGS))
        levels.append(plan.levels)
    np.testing.assert_array_equal(*maps)
    assert torch.equal(*levels)
