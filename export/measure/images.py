"""The images that the unmodified model is run over when its activations and features are measured."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ditf.calib.images import COUNT, procedural_images
from ditf.runtime.images import fit_image, list_images, open_image, skipped_files

logger = logging.getLogger(__name__)


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
    """Calibration images, which are read from disk when this is made: before an export's long work starts.

    Args:
        folder: a folder of images, or None for the built-in procedural ones.
        size: (H, W) in pixels that the images are fitted to.

    Attributes:
        arrays: the images, uint8 [H, W, 3].

    Raises:
        InputError: `folder` is no directory, has no images, or has one that cannot be read.
    """

    folder: Path | None
    size: tuple[int, int]
    arrays: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arrays", self._read())

    @property
    def source(self) -> str:
        """Where the images come from, as calibration.json and the manifest record it."""
        return str(self.folder or "built-in procedural pictures")

    def _read(self) -> list[np.ndarray]:
        if self.folder is None:
            return procedural_images(self.size)
        paths = list_images(self.folder)
        skipped = skipped_files(self.folder, paths)
        if skipped is not None:
            logger.warning("%s", skipped)
        return [fit_image(open_image(path), self.size)[0] for path in paths]
