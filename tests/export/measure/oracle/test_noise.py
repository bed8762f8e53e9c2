"""The oracle's noise, by every kind of scheduler, against the formulas of the papers."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.measure.oracle.noise import Noise
from ditf.export.measure.oracle.parts import Parts
from ditf.runtime.errors import InputError

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
]
FLOW = [
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "shift_terminal": 0.1}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ("DPMSolverMultistepScheduler", {"flow_shift": 3.0}),
    ("UniPCMultistepScheduler", {"flow_shift": 3.0}),
    ("DEISMultistepScheduler", {"flow_shift": 3.0}),
    ("DPMSolverSinglestepScheduler", {"flow_shift": 3.0}),
]
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers

FLAGS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def levels(folder, name, config, timestep, flow=False):
    """Signal and noise of the oracle's x_t."""
    if hasattr(getattr(diffusers, name)(), "betas"):
        config = {"beta_start": 0.0001, "beta_end": 0.02, **config}
    getattr(diffusers, name)(**config).save_pretrained(folder / "scheduler")
    checkpoint = Checkpoint(folder, str(folder))
    noise = Noise(Parts(checkpoint, "DiTTransformer2DModel"), checkpoint, flow)
    one, none = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    return [float(noise.add(*pair, timestep)) for pair in ((one, none), (none, one))], noise.source


@pytest.mark.parametrize(("name", "config"), DDPM)
def test_a_ddpm_schedule(tmp_path, name, config):
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
        (signal, noise), source = levels(tmp_path, name, {"beta_schedule": betas, **config}, timestep)
        assert signal == pytest.approx(root[timestep], rel=1e-3, abs=1e-5)
        assert noise == pytest.approx(np.sqrt(1 - root[timestep] ** 2), rel=1e-3, abs=1e-5)
    assert source == f"{name}.add_noise"


@pytest.mark.parametrize(("name", "config"), FLOW)
@pytest.mark.parametrize("flags", [{}, FLAGS], ids=["not-said", "said"])
def test_flow_matching(tmp_path, name, config, flags):
    """A pipeline of flow matching, or a scheduler that says so: t is the noise level, whatever is shifted."""
    if name.startswith("FlowMatch"):
        flags = {}
    for timestep in (0, 1, 127, 261, 999):
        (signal, noise), _ = levels(tmp_path, name, {**config, **flags}, timestep, flow=not flags)
        assert (signal, noise) == pytest.approx((1 - timestep / 1000, timestep / 1000), abs=2e-7)


def test_a_scheduler_that_cannot_flow(tmp_path):
    levels_and_source = levels(tmp_path, "DDIMScheduler", {}, 261, flow=True)
    assert levels_and_source == (pytest.approx([0.739, 0.261]), "FlowMatchEulerDiscreteScheduler.scale_noise")


def test_no_scheduler_of_diffusers(tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "AutoencoderKL"}')
    checkpoint = Checkpoint(tmp_path, "here")
    with pytest.raises(InputError, match="AutoencoderKL of here is no scheduler"):
        Noise(Parts(checkpoint, "DiTTransformer2DModel"), checkpoint, False)
