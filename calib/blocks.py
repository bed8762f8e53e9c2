"""Statistics of the hidden states that enter each block: massive channels, and AdaLN's scale on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ditf.calib.channels import Accumulator, ChannelStatistics


@dataclass(frozen=True)
class Entering:
    """The tokens that enter one block for one image.

    Attributes:
        image: image tokens, float32 [N, C].
        text: tokens of a text stream, float32 [L, C], or None.
        modulated: [N, C], the image tokens after the block's first norm and its modulation.
    """

    image: np.ndarray
    text: np.ndarray | None
    modulated: np.ndarray


@dataclass(frozen=True)
class BlockStatistics:
    """Statistics of the tokens that enter one block.

    Attributes:
        layer: index of the block.
        name: of the block, such as "double.0".
        image, text: statistics of the image tokens, and of the tokens of a text stream if there is one.
        scale: [C], (1 + scale) of the block's first norm, times the norm's weight if it has one. It is
            recovered from the norm's input and output.
    """

    layer: int
    name: str
    image: ChannelStatistics
    text: ChannelStatistics | None
    scale: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """The statistics as calibration.json has them."""
        return {
            "layer": self.layer,
            "name": self.name,
            "image": self.image.to_json(),
            "text": None if self.text is None else self.text.to_json(),
            "scale": [float(f"{value:.4g}") for value in self.scale],
        }


class BlockMeasurement:
    """Collects the statistics of blocks; it keeps no tokens.

    Args:
        names: names of the blocks.
        centred: False if their norms are RMSNorms, which do not subtract the mean.
    """

    def __init__(self, names: Sequence[str], centred: bool = True) -> None:
        self._names = names
        self._centred = centred
        self._image = [Accumulator() for _ in names]
        self._text: dict[int, Accumulator] = {}
        self._scales: dict[int, np.ndarray] = {}

    def add(self, layer: int, entering: Entering) -> None:
        """Add what enters block `layer` for one more image.

        Raises:
            InputError: a token is NaN or infinite; the message names the block.
        """
        name = self._names[layer]
        self._image[layer].add(entering.image, f"the image tokens that enter {name}")
        if entering.text is not None:
            text = self._text.setdefault(layer, Accumulator())
            text.add(entering.text, f"the text tokens that enter {name}")
        if layer not in self._scales:  # it is the same for every image
            self._scales[layer] = _scale(entering, self._centred)

    def finish(self) -> list[BlockStatistics]:
        """The statistics of every block.

        Raises:
            InputError: no image was added.
        """
        return [
            BlockStatistics(
                layer,
                name,
                self._image[layer].finish(),
                self._text[layer].finish() if layer in self._text else None,
                self._scales[layer],
            )
            for layer, name in enumerate(self._names)
        ]


def _scale(entering: Entering, centred: bool) -> np.ndarray:
    """The slope of modulated = slope * norm(x) + shift in each channel, by least squares.

    The modulation is affine, so the fit is exact.
    """
    x = entering.image.astype(np.float64)
    if centred:
        x = x - x.mean(axis=1, keepdims=True)
    normed = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-6)
    varying = normed - normed.mean(axis=0)
    modulated = entering.modulated.astype(np.float64)
    slope: np.ndarray = (varying * (modulated - modulated.mean(axis=0))).sum(axis=0) / np.maximum(
        (varying * varying).sum(axis=0), 1e-30
    )
    return slope


def degenerate(images: Sequence[np.ndarray]) -> str | None:
    """Why statistics over these images say little, or None."""
    if all(int(image.max()) == int(image.min()) for image in images):
        return "every image is of one colour"
    if len(images) > 1 and all(np.array_equal(image, images[0]) for image in images[1:]):
        return "the images are identical"
    return None


def mismatches(document: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The settings in which a calibration differs from those wanted, such as "timestep 261 instead of 10"."""
    return [
        f"{name} {document.get(name)!r} instead of {value!r}"
        for name, value in wanted.items()
        if document.get(name) != value
    ]
