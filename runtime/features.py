"""FeatureMap: the features of one image, and how their grid lies on the image."""

from __future__ import annotations

import math
from typing import Protocol, Union

import numpy as np

from ditf.runtime.errors import InputError


class Resident(Protocol):
    """An array in device memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def numpy(self) -> np.ndarray:
        """A copy in host memory."""

    def reshape(self, *shape: int) -> Resident:
        """A view of the same memory in another shape."""


class FeatureMap:
    """Features of one image.

    Args:
        array: float16 or float32 [C, h, w], row 0 at the top, in host or device memory. In device memory it
            may be larger than `extent`; only the rows and columns that `extent` reaches into are used.
        image_size: (H, W) of the original image in pixels.
        extent: (rows, columns) of the map that the image covers, in cells. It is (h, w) unless the image was
            padded (`fit="pad"`), which can leave the last row or column covered in part.

    Attributes:
        image_size: as given.
        cells: the extent.
        resident: the whole array in device memory, or None if it was given in host memory.

    Raises:
        InputError: `array` is not a 3-D float array, or holds NaN or infinity. An array in device memory is
            checked for these when it is fetched.
    """

    def __init__(
        self,
        array: Union[np.ndarray, Resident],
        image_size: tuple[int, int],
        extent: tuple[float, float] | None = None,
    ) -> None:
        shape, dtype = tuple(array.shape), array.dtype
        if len(shape) != 3 or dtype.kind != "f" or 0 in shape:
            raise InputError(f"a feature map must be a float array [C, h, w], got {dtype} {list(shape)}")
        if min(image_size) < 1:
            raise InputError(f"image_size must be positive, got {image_size}")
        if extent is not None and not all(0 < e <= n for e, n in zip(extent, shape[1:], strict=True)):
            raise InputError(f"extent {extent} does not lie in the map's {shape[1:]} cells")
        self.image_size = image_size
        self.cells = (float(shape[1]), float(shape[2])) if extent is None else extent
        self.resident: Resident | None = None
        self._array: np.ndarray | None = None
        if isinstance(array, np.ndarray):
            self._array = _checked(array)
        else:
            self.resident = array

    @property
    def array(self) -> np.ndarray:
        """The features in host memory, [C, h, w]. The first access fetches them from the device."""
        if self._array is None:
            assert self.resident is not None
            rows, columns = self.grid
            self._array = _checked(np.ascontiguousarray(self.resident.numpy()[:, :rows, :columns]))
        return self._array

    @property
    def channels(self) -> int:
        """The number of channels, C."""
        held = self.resident if self._array is None else self._array
        assert held is not None
        return int(held.shape[0])

    @property
    def grid(self) -> tuple[int, int]:
        """The size (h, w) of `array` in cells."""
        if self._array is None:
            return math.ceil(self.cells[0]), math.ceil(self.cells[1])
        return self._array.shape[1], self._array.shape[2]

    def __repr__(self) -> str:
        height, width = self.image_size
        return f"FeatureMap({self.channels} channels over {self.cells} cells, of {width}x{height} px)"


def _checked(array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        raise not_finite()
    return array


def not_finite() -> InputError:
    """The error for features that hold NaN or infinity."""
    return InputError(
        "the features hold NaN or infinity",
        "run `ditf check` on the bundle; if it is not a float32 bundle, export it with --precision fp32",
    )
