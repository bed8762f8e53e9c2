"""Hidden states block by block: where massive channels appear, how large, and how AdaLN meets them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ditf.calib.channels import Accumulator, ChannelStatistics


@dataclass(frozen=True)
class Entering:
    """What enters one block, of one image.

    Attributes:
        image: tokens [N, C], float32; text: tokens [L, C] of a text stream, or None.
        modulated: [N, C], the image after the block's own first norm and its modulation.
    """

    image: np.ndarray
    text: np.ndarray | None
    modulated: np.ndarray


@dataclass(frozen=True)
class BlockStatistics:
    """Statistics of what enters one block.

    Attributes:
        scale: [C], 1 + scale of the block's first norm, times its weight where it has one, recovered from
            what it made of the image.
    """

    layer: int
    name: str
    image: ChannelStatistics
    text: ChannelStatistics | None
    scale: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """For calibration.json."""
        return {
            "layer": self.layer,
            "name": self.name,
            "image": self.image.to_json(),
            "text": None if self.text is None else self.text.to_json(),
            "scale": [float(f"{value:.4g}") for value in self.scale],
        }


class BlockMeasurement:
    """Collects the statistics of blocks; neither images nor layers are kept.

    Args:
        names: of the blocks, for people.
        centred: False where their norms are RMSNorms, which take no mean off.
    """

    def __init__(self, names: Sequence[str], centred: bool = True) -> None:
        self._names = names
        self._centred = centred
        self._image = [Accumulator() for _ in names]
        self._text: dict[int, Accumulator] = {}
        self._scales: dict[int, np.ndarray] = {}

    def add(self, layer: int, entering: Entering) -> None:
        """What enters block `layer`, of one more image.

        Raises:
            InputError: NaN or infinity; names the block.
        """
        name = self._names[layer]
        self._image[layer].add(entering.image, f"the image tokens that enter {name}")
        if entering.text is not None:
            text = self._text.setdefault(layer, Accumulator())
            text.add(entering.text, f"the text tokens that enter {name}")
        if layer not in self._scales:  # the same for every image
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
    """Slope of modulated = slope * norm(x) + shift, channel by channel: exact, since it is affine."""
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
    """Why pictures say little, if they do."""
    if all(int(image.max()) == int(image.min()) for image in images):
        return "every image is of one colour"
    if len(images) > 1 and all(np.array_equal(image, images[0]) for image in images[1:]):
        return "the images are identical"
    return None


def mismatches(document: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What of a calibration file is not as an export needs it: "timestep 261 instead of 10"."""
    return [
        f"{name} {document.get(name)!r} instead of {value!r}"
        for name, value in wanted.items()
        if document.get(name) != value
    ]
