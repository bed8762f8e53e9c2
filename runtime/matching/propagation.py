"""Carrying the labels of a video's first frame through its frames, by DINO's protocol.

The protocol is that of facebookresearch/dino, eval_video_segmentation.py (Caron et al., ICCV 2021, after
Jabri et al., NeurIPS 2020), as DiTF runs it on DAVIS (eval_davis.py, with its temperature 0.1). A cell of a
new frame takes the labels of the cells that are most like it in the first frame and in the last few frames,
within a radius. Labels are carried on as probabilities, and decided only in the picture that is returned.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
from PIL import Image

from ditf.runtime.errors import InputError
from ditf.runtime.features import FeatureMap
from ditf.runtime.matching.cells import unit_cells
from ditf.runtime.matching.interpolation import upsampling_matrix

_BLOCK = 8  # a new frame is compared in blocks of 8 x 8 cells


_ROUNDING = np.float32(1e-6)  # a label whose probability varies by less over a frame counts as level


class Propagator:
    """Carries labels through a video, frame by frame.

    It holds (n_last + 1) float32 copies of a map [C, h, w] and of the labels' probabilities [labels, h, w],
    so memory does not grow with the video. Each block of 8 x 8 cells is compared only with the cells that
    one of its cells can reach, which are (8 + 2 radius)^2 in each frame.

    Args:
        first: the features of the first frame.
        labels: uint8 [H, W] at the size of the first frame's image. They may have any values; by convention
            0 is the background.
        n_last: the number of preceding frames that are used besides the first.
        radius: the largest Chebyshev distance in cells; 0 for no limit.
        top_k: the number of cells that a cell takes its label from; ties with the last of them count too.
        temperature: the temperature of the softmax over these cells.
        factor: labels are decided in a picture with this many pixels per cell, which is then scaled to the
            image by nearest neighbour. It is 16 in DiTF and in DINO's ViT-S/16.

    Raises:
        InputError: the labels have another shape or dtype than the frame, or an option is out of its range.
    """

    def __init__(
        self,
        first: FeatureMap,
        labels: np.ndarray,
        n_last: int = 7,
        radius: int = 12,
        top_k: int = 5,
        temperature: float = 0.1,
        factor: int = 16,
    ) -> None:
        for name, value, least in (
            ("n_last", n_last, 0), ("radius", radius, 0), ("top_k", top_k, 1), ("factor", factor, 1)
        ):  # fmt: skip
            if value < least:
                raise InputError(f"{name} is {value}", f"it is {least} or more")
        if not (math.isfinite(temperature) and temperature > 0):
            raise InputError(f"temperature is {temperature:g}", "it is a positive number")
        if labels.dtype != np.uint8 or labels.shape != first.image_size:
            height, width = first.image_size
            raise InputError(
                f"labels must be uint8 [{height}, {width}], as the frame,"
                f" got {labels.dtype} {list(labels.shape)}"
            )
        self._radius, self._top_k, self._factor = radius, top_k, factor
        self._temperature = np.float32(temperature)
        self._extent = first.cells
        small = _small(labels, first)
        self._labels = np.unique(small)
        one_hot = (small[..., None] == self._labels).astype(np.float32)
        self._first = (_grid_cells(first), one_hot)
        self._last: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=n_last)

    @property
    def labels(self) -> np.ndarray:
        """The labels that are carried, uint8, ascending: all that a cell of the first frame has."""
        return self._labels.copy()

    def update(self, frame: FeatureMap) -> np.ndarray:
        """Label the next frame.

        Returns:
            uint8 [H, W] at the size of the frame's own image.

        Raises:
            InputError: the features are of another model or grid than the first frame's.
        """
        cells, first = _grid_cells(frame), self._first[0]
        if cells.shape != first.shape or frame.cells != self._extent:
            raise InputError(
                f"a frame of {frame.channels} channels over {frame.cells} cells after one of"
                f" {first.shape[2]} over {self._extent}",
                "frames must have one size and one bundle",
            )
        probabilities = self._carry(cells)
        self._last.append((cells, probabilities))
        return self._decide(probabilities, frame.image_size)

    def _carry(self, cells: np.ndarray) -> np.ndarray:
        """Compute the labels' probabilities for all cells, float32 [h, w, labels]."""
        h, w, _ = cells.shape
        found = np.zeros((h, w, len(self._labels)), np.float32)
        for y in range(0, h, _BLOCK):
            for x in range(0, w, _BLOCK):
                rows, columns = slice(y, min(y + _BLOCK, h)), slice(x, min(x + _BLOCK, w))
                found[rows, columns] = self._carry_block(cells, rows, columns)
        return found

    def _carry_block(self, cells: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        """Compute the labels' probabilities for one block of cells."""
        h, w, channels = cells.shape
        reach = self._radius or max(h, w)
        far_rows, far_columns = (
            slice(max(0, one.start - reach), min(length, one.stop + reach))
            for one, length in ((rows, h), (columns, w))
        )
        frames = [self._first, *self._last]
        queries = cells[rows, columns]
        near = (
            _within(rows, far_rows, reach)[:, None, :, None] & _within(columns, far_columns, reach)[:, None]
        )
        shape = (queries.shape[0] * queries.shape[1], -1)
        far = ~near.reshape(shape)
        cosines = np.empty((len(far), len(frames), far.shape[1]), np.float32)
        for index, (keys, _) in enumerate(frames):
            product = queries.reshape(-1, channels) @ keys[far_rows, far_columns].reshape(-1, channels).T
            product[far] = -np.inf
            cosines[:, index] = product
        cosines = cosines.reshape(shape)
        count = min(self._top_k, cosines.shape[1])
        lowest = np.partition(cosines, -count, axis=1)[:, -count]
        query, key = np.nonzero((cosines >= lowest[:, None]) & (cosines > -np.inf))
        weights = cosines[query, key]
        firsts = np.searchsorted(query, np.arange(len(cosines)))
        weights -= np.maximum.reduceat(weights, firsts)[query]  # otherwise a small temperature overflows
        weights = np.exp(weights / self._temperature)
        weights /= np.add.reduceat(weights, firsts)[query]
        known = np.stack([seg[far_rows, far_columns] for _, seg in frames]).reshape(-1, len(self._labels))
        carried: np.ndarray = np.add.reduceat(weights[:, None] * known[key], firsts)
        return carried.reshape(*queries.shape[:2], -1)

    def _decide(self, probabilities: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
        """Decide the label of every pixel of an image, uint8 [H, W].

        As in DINO, probabilities are upsampled and stretched to 0..1 for each label. The highest wins, and of
        equal ones the first.
        """
        down, across = (
            upsampling_matrix(max(1, round(extent * self._factor)), cells, extent)
            for extent, cells in zip(self._extent, probabilities.shape, strict=False)
        )
        best = np.full((len(down), len(across)), -np.inf, np.float32)
        winner = np.zeros(best.shape, np.uint8)
        for index, label in enumerate(self._labels):
            score = down @ probabilities[:, :, index] @ across.T
            score -= score.min()
            top = score.max()
            if top > _ROUNDING:
                score /= top
            elif probabilities[:, :, index].any():
                score[:] = np.inf  # a level label is 0 / 0 in DINO, which its maximum prefers
            better = score > best
            best[better] = score[better]
            winner[better] = label
        return _resized(winner, image_size)


def _grid_cells(features: FeatureMap) -> np.ndarray:
    """The unit vectors of all cells, float32 [h, w, C]."""
    return unit_cells(features).reshape(*features.grid, features.channels)


def _small(labels: np.ndarray, features: FeatureMap) -> np.ndarray:
    """The label under each cell's centre, uint8 [h, w]. Beyond a padded image its edge is repeated."""
    beyond = [
        (0, round(pixels * cells / extent) - pixels)
        for pixels, cells, extent in zip(labels.shape, features.grid, features.cells, strict=True)
    ]
    return _resized(np.pad(labels, beyond, mode="edge"), features.grid)


def _resized(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a uint8 picture to (H, W) by Pillow's nearest filter, which DINO's code uses too."""
    image = Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.array(image)


def _within(block: slice, far: slice, reach: int) -> np.ndarray:
    """Whether positions are within reach of each other, bool [block, far]."""
    here, there = np.arange(block.start, block.stop), np.arange(far.start, far.stop)
    within: np.ndarray = np.abs(here[:, None] - there) <= reach
    return within
