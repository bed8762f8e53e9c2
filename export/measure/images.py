"""The images that the unmodified model is run over when its activations and features are measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ditf.calib.images import COUNT, procedural_images
from ditf.runtime.images import fit_image, list_images, open_image


def image_names(folder: Path | None) -> list[str]:
    """One name for each calibration image; no pixel is read.

    Raises:
        InputError: `folder` is no directory, or has no images.
    """
    if folder is None:
        return [f"procedural {index}" for index in range(COUNT)]
    return [path.name for path in list_images(folder)]


@dataclass(frozen=True)
class CalibrationImages:
    """Calibration images, read from disk once, when `arrays` is first used, and kept with this object.

    Args:
        folder: a folder of images, or None for the built-in procedural ones.
        size: (H, W) in pixels that the images are fitted to.

    Raises (when `arrays` is first used):
        InputError: `folder` is no directory, has no images, or has one that cannot be read.
    """

    folder: Path | None
    size: tuple[int, int]

    @property
    def source(self) -> str:
        """Where the images come from, as calibration.json and the manifest record it."""
        return str(self.folder or "built-in procedural pictures")

    @cached_property
    def arrays(self) -> list[np.ndarray]:
        """The images, uint8 [H, W, 3]."""
        if self.folder is None:
            return procedural_images(self.size)
        return [fit_image(open_image(path), self.size)[0] for path in list_images(self.folder)]
