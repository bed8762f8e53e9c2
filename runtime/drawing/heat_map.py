"""Drawing the heat map of one source point."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ditf.runtime.drawing.canvas import GAP, draw_scale, fit, fitted_size, scale_colours, side_by_side


def draw_heat_map(
    source: Image.Image, target: Image.Image, point: Sequence[float] | np.ndarray, heat: np.ndarray
) -> Image.Image:
    """The point in the source, and beside it the target under the cosines with it, its best pixel marked.

    Args:
        source, target: RGB.
        point: (x, y) px in the source.
        heat: float32 [H, W] of the target's size; its highest value is yellow, its median and what is below
            it dark violet: on most pixels a query's cosine says little.
    """
    left, right = fit(source), fit(target)
    colours, low, high = heat_colours(heat)
    shown = Image.blend(right.convert("L").convert("RGB"), colours, 0.6)
    canvas = side_by_side([left, shown])
    _mark(canvas, (np.asarray(point) + 0.5) * left.width / source.width)
    best = np.array(np.unravel_index(heat.argmax(), heat.shape)[::-1])
    _mark(canvas, (best + 0.5) * right.width / target.width + (left.width + GAP, 0))
    draw_scale(canvas, "cosine", low, high)
    return canvas


def heat_colours(heat: np.ndarray) -> tuple[Image.Image, float, float]:
    """A heat map's colours, and the cosines of the darkest and the brightest.

    Args:
        heat: float32 [H, W].

    Returns:
        RGB, as large as `fit` makes an image of H x W; the median and the maximum.
    """
    low, high = float(np.median(heat)), float(heat.max())
    small = np.asarray(Image.fromarray(heat).resize(fitted_size(heat.shape[::-1]), Image.Resampling.BILINEAR))
    return Image.fromarray(scale_colours((small - low) / max(high - low, 1e-6))), low, high


def _mark(canvas: Image.Image, place: np.ndarray) -> None:
    """A white ring with a black border around a place."""
    draw = ImageDraw.Draw(canvas)
    x, y = place
    for radius, colour, width in ((8, "black", 4), (7, "white", 2)):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=width)
