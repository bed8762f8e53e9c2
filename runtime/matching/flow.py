"""Dense flow between two images: the match of every source cell, interpolated to every source pixel.

Measured before it was decided (scikit-image's stereo motorcycle; affine warps of smooth synthetic features
with noise, C = 256, 40x40 cells, 640x480): every pixel matched on its own takes 200 to 360 times as long (24
to 162 s against 0.1 to 0.5 s) and is better on the photographs (39.5 % of pixels within 10 px, 34.2 % here),
worse on the warps (median 2.0 to 5.5 px against 1.5 to 4.1 px: interpolation averages). Of the methods,
`argmax` is the most even; `window` is better, down to 0.4 times its error, where features change little from
cell to cell, and worse, up to 2.4 times, where they change much.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ditf.runtime.features import FeatureMap
from ditf.runtime.matching.cells import cell_centres
from ditf.runtime.matching.interpolation import upsampling_matrix
from ditf.runtime.matching.points import match_points


@dataclass(frozen=True)
class Flow:
    """Where every pixel of a source image is in a target image.

    Attributes:
        field: float32 [H, W, 2], (x, y) displacement in pixels at the source's resolution: source pixel
            (x, y) is at (x, y) + field[y, x] in the target.
        confidence: float32 [H, W], the cosine of the match in [-1, 1].
    """

    field: np.ndarray
    confidence: np.ndarray


def dense_flow(source: FeatureMap, target: FeatureMap, method: str = "argmax") -> Flow:
    """Match the centre of every source cell, and interpolate bilinearly between the centres.

    What is interpolated is how far each match is from the place that its point has when the source image is
    stretched onto the target; beyond the outermost centres it stays as it is there. Cost: that of
    `match_points` with h * w points, and 12 bytes a source pixel.

    Args:
        source, target: maps with the same number of channels.
        method: of `match_points`.

    Raises:
        InputError: an unknown method, or maps of different models.
    """
    centres = cell_centres(source)
    matches = match_points(source, target, centres, method)
    (height, width), (target_height, target_width) = source.image_size, target.image_size
    scale = np.array([target_width / width, target_height / height])
    # Beyond the outermost centres of the target's cells all pixels are equal: of these take the nearest.
    corners = cell_centres(target)[[0, -1]]
    offset = (np.clip(matches.points, *corners) - ((centres + 0.5) * scale - 0.5)).astype(np.float32)
    rows, columns = (
        upsampling_matrix(pixels, cells, extent)
        for pixels, cells, extent in zip(source.image_size, source.grid, source.cells, strict=True)
    )
    field = np.empty((height, width, 2), np.float32)
    for axis, pixels in ((0, np.arange(width)[None]), (1, np.arange(height)[:, None])):
        stretched = (pixels + 0.5) * scale[axis] - 0.5 - pixels
        field[..., axis] = rows @ offset[:, axis].reshape(source.grid) @ columns.T
        field[..., axis] += stretched.astype(np.float32)
    confidence: np.ndarray = rows @ matches.scores.reshape(source.grid) @ columns.T
    return Flow(field, np.clip(confidence, -1.0, 1.0, out=confidence))


def warp_image(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """An image looked up where a flow points: with the flow from A to B, B as A sees it.

    Args:
        image: uint8 [H', W', 3].
        flow: float32 [H, W, 2], a `Flow.field` into that image.

    Returns:
        uint8 [H, W, 3], sampled bilinearly; positions outside the image take its edge.
    """
    height, width = image.shape[:2]
    y, x = np.indices(flow.shape[:2], dtype=np.float32)
    x, y = np.clip(x + flow[..., 0], 0, width - 1), np.clip(y + flow[..., 1], 0, height - 1)
    x0, y0 = x.astype(np.int64), y.astype(np.int64)
    x1, y1 = np.minimum(x0 + 1, width - 1), np.minimum(y0 + 1, height - 1)
    right, down = (x - x0)[..., None], (y - y0)[..., None]
    above = image[y0, x0] * (1 - right) + image[y0, x1] * right
    below = image[y1, x0] * (1 - right) + image[y1, x1] * right
    return np.rint(above * (1 - down) + below * down).astype(np.uint8)
