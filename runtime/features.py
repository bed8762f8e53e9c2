"""FeatureMap: the features of one image and how they lie on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ditf.runtime.errors import InputError


@dataclass(frozen=True)
class FeatureMap:
    """Features of one image.

    Attributes:
        array: [C, h, w], float16 or float32, channels first, row 0 at the top.
        image_size: (H, W) of the original image in pixels.
        extent: (rows, columns) of the map, in cells, that the image covers: (h, w) unless the image
            was padded (`fit="pad"`), when the last row or column is covered in part.

    Raises:
        InputError: `array` is not a 3-D float array, or holds NaN or infinity.
    """

    array: np.ndarray
    image_size: tuple[int, int]
    extent: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        array = self.array
        if array.ndim != 3 or array.dtype.kind != "f" or 0 in array.shape:
            raise InputError(
                f"a feature map must be a float array [C, h, w], got {array.dtype} {list(array.shape)}"
            )
        if not np.isfinite(array).all():
            raise InputError(
                "the features hold NaN or infinity",
                "run `ditf check` on the bundle; if it was exported with --fp16, export it in float32",
            )
        if min(self.image_size) < 1:
            raise InputError(f"image_size must be positive, got {self.image_size}")
        if self.extent is None:
            object.__setattr__(self, "extent", (float(array.shape[1]), float(array.shape[2])))
        elif not all(0 < e <= n for e, n in zip(self.extent, array.shape[1:], strict=True)):
            raise InputError(f"extent {self.extent} does not lie in the map's {array.shape[1:]} cells")

    @property
    def cells(self) -> tuple[float, float]:
        """`extent`, never None."""
        assert self.extent is not None  # set in __post_init__
        return self.extent
