"""The noise of the reference, against formulas and against the schedule of the graph."""

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
from ditf.export.measure.reference_noise import ReferenceNoise
from tests.export.parity import SETTINGS, planned

TIMESTEPS = (0, 1, 260, 999)


@pytest.fixture
def pair():
    """x_0 and eps."""
    return torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy's, of what diffusers does
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}),
        ("DPMSolverMultistepScheduler", {"rescale_betas_zero_snr": True, "use_karras_sigmas": True}),
        ("DPMSolverSinglestepScheduler", {}),
        (
            "EulerDiscreteScheduler",
            {"timestep_spacing": "leading"},
        ),  # what it adds is not what the model reads
        ("HeunDiscreteScheduler", {}),
        ("LCMScheduler", {}),
        ("SASolverScheduler", {}),
    ],
)
def test_ddpm_noise(name, settings, pair):
    x_0, eps = pair
    mean = getattr(diffusers, name)(**settings).alphas_cumprod
    noise = ReferenceNoise({"_class_name": name, **settings}, flow_matching=False)
    for t in TIMESTEPS:
        expected = mean[t].sqrt() * x_0 + (1 - mean[t]).sqrt() * eps
        torch.testing.assert_close(noise.add(x_0, eps, t), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("settings", "family"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, True),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0, "beta_schedule": "linear"}, False),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, False),
        ({"_class_name": "SASolverScheduler", "use_flow_sigmas": True}, False),
        ({"_class_name": "DDPMScheduler", "prediction_type": "flow_prediction"}, False),
        ({"_class_name": "DDIMScheduler"}, True),
    ],
)
def test_noise_of_flow_matching(settings, family, pair):
    x_0, eps = pair
    noise = ReferenceNoise(settings, family)
    for t in TIMESTEPS:
        torch.testing.assert_close(noise.add(x_0, eps, t), (1 - t / 1000) * x_0 + t / 1000 * eps)


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
