"""Massive channels: the few channels that are large in every token of every image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ditf.runtime.errors import InputError

MASSIVE_RATIO = 10.0
"""A channel is massive when its mean |x| is more than this multiple of the median channel's. In FLUX and
SD3 massive channels reach 50 to 1000 times the median; ordinary channels stay below 5 times."""

FLOAT16_MAX = 65504.0

DEFINITION = f"mean |x| over tokens > {MASSIVE_RATIO:g} x the median channel's"


@dataclass(frozen=True)
class ChannelStatistics:
    """Statistics, for each channel, of the tokens of one stream that enter one block.

    Attributes:
        mean_abs: [C], mean |x| over images and tokens.
        max_abs: [C], the largest |x|.
        token_share: [C], share of tokens on which |x| is more than `MASSIVE_RATIO` times the median channel's
            mean in the same image.
        positive_share: [C], share of tokens on which x > 0.
        images: number of images.
    """

    mean_abs: np.ndarray
    max_abs: np.ndarray
    token_share: np.ndarray
    positive_share: np.ndarray
    images: int

    @property
    def median(self) -> float:
        """The median over the channels of mean |x|."""
        return float(np.median(self.mean_abs))

    @property
    def massive(self) -> list[int]:
        """Massive channels, ascending."""
        found: list[int] = np.flatnonzero(self.mean_abs > MASSIVE_RATIO * self.median).tolist()
        return found

    @property
    def sign_stability(self) -> np.ndarray:
        """[C], share of tokens on which a channel has its more frequent sign: 0.5 for noise, 1 for a bias."""
        stability: np.ndarray = np.maximum(self.positive_share, 1.0 - self.positive_share)
        return stability

    def to_json(self) -> dict[str, Any]:
        """The statistics as calibration.json has them."""
        median = max(self.median, 1e-30)
        stability = self.sign_stability
        return {
            "definition": DEFINITION,
            "images": self.images,
            "median_channel": self.median,
            "massive_channels": [
                {
                    "channel": channel,
                    "mean_abs": float(self.mean_abs[channel]),
                    "max_abs": float(self.max_abs[channel]),
                    "ratio": float(self.mean_abs[channel]) / median,
                    "token_share": float(self.token_share[channel]),
                    "sign_stability": float(stability[channel]),
                }
                for channel in self.massive
            ],
            "max_abs": float(self.max_abs.max()),
            "headroom_to_65504": FLOAT16_MAX / max(float(self.max_abs.max()), 1e-30),
            "mean_abs": [float(f"{value:.6g}") for value in self.mean_abs],
        }


class Accumulator:
    """Collects `ChannelStatistics` one image at a time; memory does not grow with the number of images."""

    def __init__(self) -> None:
        self._images = 0
        self._sums: np.ndarray = np.zeros(0)
        self._max: np.ndarray = np.zeros(0)

    def add(self, tokens: np.ndarray, where: str) -> None:
        """Add the tokens of one image.

        Args:
            tokens: [N, C].
            where: names the tokens in the error.

        Raises:
            InputError: a token is NaN or infinite.
        """
        if not np.isfinite(tokens).all():
            raise InputError(
                f"{where} are NaN or infinite on calibration image {self._images}",
                "check the checkpoint's weights",
            )
        absolute = np.abs(tokens)
        mean = absolute.mean(axis=0, dtype=np.float64)
        limit = MASSIVE_RATIO * float(np.median(mean))
        sums = np.stack([mean, (absolute > limit).mean(axis=0), (tokens > 0).mean(axis=0)])
        largest = absolute.max(axis=0)
        if self._images:
            self._sums += sums
            np.maximum(self._max, largest, out=self._max)
        else:
            self._sums, self._max = sums, largest
        self._images += 1

    def finish(self) -> ChannelStatistics:
        """The statistics over all images that were added.

        Raises:
            InputError: no image was added.
        """
        if not self._images:
            raise InputError("calibration needs at least one image")
        mean, share, positive = self._sums / self._images
        return ChannelStatistics(mean, self._max, share, positive, self._images)


def channel_statistics(hidden_states: Sequence[np.ndarray]) -> ChannelStatistics:
    """Statistics over the hidden states, [N, C] each, of several images.

    Raises:
        InputError: there are no images, or a hidden state is NaN or infinite.
    """
    accumulator = Accumulator()
    for tokens in hidden_states:
        accumulator.add(tokens, "the model's hidden states")
    return accumulator.finish()
