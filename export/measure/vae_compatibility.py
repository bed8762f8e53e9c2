"""--vae: whether another encoder may stand for the checkpoint's own. x_0 decides, not the channel count."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ditf.calib.images import golden_pair
from ditf.calib.latents import CORRELATION, RELATIVE_ERROR, same_space, x_0_agreement
from ditf.export.checkpoints.vae import LatentSpace
from ditf.export.measure.calibrate import calibration_images
from ditf.export.planning.plan import Plan
from ditf.runtime.errors import InputError

MORE_IMAGES = 2
"""Of the calibration images, beside the golden pair."""

_ALIKE = 0.9  # least correlation of channels that differ by nothing but a shift and a scale


@dataclass(frozen=True)
class Swap:
    """An encoder that was accepted.

    Attributes:
        agreement: of `x_0_agreement`, over the golden pair and some calibration images.
        x_0: of the golden pair by the checkpoint's own VAE, float32 [2, c, h', w'].
    """

    agreement: dict[str, float]
    x_0: torch.Tensor


def judge_encoder(plan: Plan) -> Swap:
    """Run the encoder of --vae and the checkpoint's own VAE over the same images and compare x_0.

    Raises:
        InputError: they are not of one latent space; names the figures.
    """
    pair = golden_pair(plan.size)
    _, more = calibration_images(plan.options.calibration_images, plan.size)
    images = np.stack([*pair, *more[:MORE_IMAGES]])
    own, other = (_encode(space, images) for space in (plan.own_latents, plan.latents))
    agreement = x_0_agreement(other.numpy(), own.numpy())
    if not same_space(agreement):
        raise InputError(
            f"--vae {plan.options.vae} does not encode into the latent space of this model: against its own"
            f" VAE x_0 is off by {agreement['relative_error']:.2f} of its spread (at most {RELATIVE_ERROR}),"
            f" its channels correlate by {agreement['correlation_min']:.2f} to"
            f" {agreement['correlation_mean']:.2f} (least and mean; at least {CORRELATION})",
            _fix(agreement),
        )
    return Swap(agreement, own[: len(pair)])


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
