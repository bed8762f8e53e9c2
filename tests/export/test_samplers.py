"""Checkpoints saved with another sampler than their model's: the graph has the noise of their pipeline."""

from __future__ import annotations

import shutil

import diffusers
import pytest

from tests.export.parity import module_parity

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize(
    ("name", "scheduler", "config"),
    [
        ("sd3", "UniPCMultistepScheduler", FLOW),
        ("flux", "DPMSolverMultistepScheduler", FLOW),
        ("sd3", "DEISMultistepScheduler", {}),  # it does not say so, but SD3 knows only flow matching
        ("auraflow", "DDIMScheduler", {}),
        ("pixart", "DDIMScheduler", {"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear"}),
        ("pixart", "EulerDiscreteScheduler", {"timestep_spacing": "leading", "use_karras_sigmas": True}),
        ("pixart", "UniPCMultistepScheduler", FLOW),
        ("dit", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ],
)
def test_a_sampler(checkpoint, tmp_path, name, scheduler, config):
    folder = shutil.copytree(checkpoint(name), tmp_path / name)
    shutil.rmtree(folder / "scheduler")
    getattr(diffusers, scheduler)(**config).save_pretrained(folder / "scheduler")
    found = module_parity(folder, "2", "bake", False)
    assert found["relative_error"] < 5e-6
