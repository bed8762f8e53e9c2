"""Massive channels: the few channels that are large in every token of every image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ditf.calib.reference import Reference
from ditf.runtime.errors import InputError

MASSIVE_RATIO = 10.0
"""A channel is massive when its mean |x| is more than this multiple of the median channel's. In FLUX
and SD3 the massive ones are 50 to 1000 times the median; ordinary channels stay below 5."""

FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class ChannelStatistics:
    """Statistics of the hidden states that enter one block.

    Attributes:
        mean_abs: [C], mean |x| over images and tokens; max_abs: [C], the largest |x|.
        images: how many.
    """

    mean_abs: np.ndarray
    max_abs: np.ndarray
    images: int

    @property
    def median(self) -> float:
        """Mean |x| of the median channel."""
        return float(np.median(self.mean_abs))

    @property
    def massive(self) -> list[int]:
        """Massive channels, ascending."""
        found: list[int] = np.flatnonzero(self.mean_abs > MASSIVE_RATIO * self.median).tolist()
        return found

    def to_json(self) -> dict[str, Any]:
        """For calibration.json."""
        return {
            "definition": f"mean |x| over image tokens > {MASSIVE_RATIO:g} x the median channel's",
            "images": self.images,
            "median_channel": self.median,
            "massive_channels": [
                {
                    "channel": channel,
                    "mean_abs": float(self.mean_abs[channel]),
                    "max_abs": float(self.max_abs[channel]),
                    "ratio": float(self.mean_abs[channel]) / max(self.median, 1e-30),
                }
                for channel in self.massive
            ],
            "max_abs": float(self.max_abs.max()),
            "headroom_to_65504": FLOAT16_MAX / max(float(self.max_abs.max()), 1e-30),
            "mean_abs": [round(float(value), 6) for value in self.mean_abs],
        }


def channel_statistics(hidden_states: Sequence[np.ndarray]) -> ChannelStatistics:
    """Statistics over the hidden states [N, C] of several images.

    Raises:
        InputError: no images, or hidden states that are not finite.
    """
    if not hidden_states:
        raise InputError("calibration needs at least one image")
    for index, tokens in enumerate(hidden_states):
        if not np.isfinite(tokens).all():
            raise InputError(
                f"the model's hidden states are NaN or infinite on calibration image {index}",
                "check the checkpoint's weights",
            )
    absolute = [np.abs(tokens) for tokens in hidden_states]
    return ChannelStatistics(
        mean_abs=np.mean([tokens.mean(axis=0, dtype=np.float64) for tokens in absolute], axis=0),
        max_abs=np.max([tokens.max(axis=0) for tokens in absolute], axis=0),
        images=len(hidden_states),
    )


def measure(reference: Reference, images: Sequence[np.ndarray]) -> ChannelStatistics:
    """Run the reference over images, uint8 [H, W, 3] each."""
    return channel_statistics([reference.hidden_states(image) for image in images])
