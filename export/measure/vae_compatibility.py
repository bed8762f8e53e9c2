"""Whether the VAE of `--vae` may replace the checkpoint's own: both encode the same images, and x_0 decides.

Compatibility tables can be wrong and channel counts say little, so the latents themselves are compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ditf.calib.latents import CORRELATION, RELATIVE_ERROR, same_space, x_0_agreement
from ditf.export.checkpoints.latent_space import LatentSpace
from ditf.export.measure.images import CalibrationImages
from ditf.export.planning.plan import Plan
from ditf.runtime.errors import InputError

COMPARED_IMAGES = 2
"""How many calibration images are compared, beside the golden pair."""

_ALIKE = 0.9  # least correlation of channels that differ by nothing but a shift and a scale


@dataclass(frozen=True)
class VaeComparison:
    """A replacement VAE that was accepted.

    Attributes:
        agreement: the figures of `ditf.calib.latents.x_0_agreement` over all compared images.
        x_0: the golden pair encoded by the checkpoint's own VAE, float32 [2, c, h', w'].
    """

    agreement: dict[str, float]
    x_0: torch.Tensor


def compare_vaes(plan: Plan, pair: np.ndarray, images: CalibrationImages) -> VaeComparison:
    """Encode the same images with the VAE of --vae and with the checkpoint's own, and compare x_0.

    Args:
        plan: has a replacement VAE.
        pair: the golden pair, uint8 [2, H, W, 3].
        images: the first `COMPARED_IMAGES` of them are encoded too.

    Raises:
        InputError: the VAEs do not share a latent space; the message has the figures.
    """
    compared = np.stack([*pair, *images.arrays[:COMPARED_IMAGES]])
    own, other = (_encode(space, compared) for space in (plan.own_latents, plan.latents))
    agreement = x_0_agreement(other.numpy(), own.numpy())
    if not same_space(agreement):
        raise InputError(
            f"--vae {plan.options.vae} does not encode into the latent space of this model: against its own"
            f" VAE x_0 is off by {agreement['relative_error']:.2f} of its spread (at most {RELATIVE_ERROR}),"
            f" its channels correlate by {agreement['correlation_min']:.2f} to"
            f" {agreement['correlation_mean']:.2f} (least and mean; at least {CORRELATION})",
            _fix(agreement),
        )
    return VaeComparison(agreement, own[: len(pair)])


def _fix(agreement: dict[str, float]) -> str:
    if agreement["correlation_min"] >= _ALIKE:
        return (
            f"it is {agreement['gain']:.3g} times as large: its config's scaling_factor or shift_factor does"
            " not belong to its weights"
        )
    return "choose a VAE made for this model"


def _encode(space: LatentSpace, images: np.ndarray) -> torch.Tensor:
    """x_0 [n, c, h', w'], one image at a time; the VAE is freed on return."""
    vae = space.load_vae()
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.cat([space.encode(vae, one) for one in pixels.split(1)])
