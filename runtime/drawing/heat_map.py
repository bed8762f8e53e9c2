"""Drawing the heat map of one source point."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ditf.runtime.drawing.canvas import GAP, draw_scale, fit, fitted_size, scale_colours, side_by_side


def draw_heat_map(
    source: Image.Image, target: Image.Image, point: Sequence[float] | np.ndarray, heat: np.ndarray
) -> Image.Image:
    """Draw the source with the point marked, and beside it the target coloured by its cosines with the point.

    The target's best pixel is marked. The highest cosine is yellow; the median and all below it are dark
    violet, because a query's cosine says little on most pixels.

    Args:
        source, target: RGB images.
        point: (x, y) in pixels of the source.
        heat: float32 [H, W] of the target's size, cosines.
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
    """Colour a heat map.

    Args:
        heat: float32 [H, W], cosines.

    Returns:
        An RGB image, as large as `fit` makes an image of H x W; and the cosines of its darkest and brightest
        colour, which are the median and the maximum.
    """
    low, high = float(np.median(heat)), float(heat.max())
    small = np.asarray(Image.fromarray(heat).resize(fitted_size(heat.shape[::-1]), Image.Resampling.BILINEAR))
    return Image.fromarray(scale_colours((small - low) / max(high - low, 1e-6))), low, high


def _mark(canvas: Image.Image, place: np.ndarray) -> None:
    """Draw a white ring with a black border around a place."""
    draw = ImageDraw.Draw(canvas)
    x, y = place
    for radius, colour, width in ((8, "black", 4), (7, "white", 2)):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=width)
