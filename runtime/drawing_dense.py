"""Pictures of what is known at every pixel: the heat map of one query, and dense flow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ditf.runtime.drawing import GAP, draw_scale, fit, fitted_size, scale_colours, side_by_side
from ditf.runtime.matching.flow import warp


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


def draw_flow(source: Image.Image, target: Image.Image, field: np.ndarray, back: np.ndarray) -> Image.Image:
    """Four images: source and target, and below them the flow and the source warped over the target.

    In the flow's colours the hue is the direction (red is to the right, green down), the strength how far:
    full at the length that a twentieth of the pixels exceed, which the caption gives. Where the flow is
    right, the warped source, half transparent, falls onto the target.

    Args:
        source, target: RGB.
        field: float32 [H, W, 2], flow from the source to the target.
        back: the same from the target to the source.
    """
    length = float(np.percentile(np.linalg.norm(field, axis=2), 95))
    flow = fit(Image.fromarray(flow_colours(field, length)))
    warped = Image.fromarray(warp(np.asarray(source), back))
    over = fit(Image.blend(target, warped, 0.5))
    rows = [side_by_side([fit(source), fit(target)]), side_by_side([flow, over])]
    canvas = Image.new("RGB", (rows[0].width, sum(row.height for row in rows) + GAP), "white")
    canvas.paste(rows[0], (0, 0))
    canvas.paste(rows[1], (0, rows[0].height + GAP))
    if flow.width > 160 and flow.height > 40:
        _caption(
            canvas, (8, canvas.height - rows[1].height + flow.height - 8), f"full colour: {length:.0f} px"
        )
    return canvas


def flow_colours(field: np.ndarray, length: float) -> np.ndarray:
    """Flow as colours: the hue is the direction, the saturation its length over `length`; uint8 [H, W, 3]."""
    angle = np.arctan2(field[..., 1], field[..., 0]) / (2 * np.pi) % 1.0
    strength = np.clip(np.linalg.norm(field, axis=2) / max(length, 1e-6), 0.0, 1.0)
    channels = [np.rint(channel * 255).astype(np.uint8) for channel in (angle, strength, np.ones_like(angle))]
    return np.asarray(Image.merge("HSV", [Image.fromarray(channel) for channel in channels]).convert("RGB"))


def _mark(canvas: Image.Image, place: np.ndarray) -> None:
    """A white ring with a black border around a place."""
    draw = ImageDraw.Draw(canvas)
    x, y = place
    for radius, colour, width in ((8, "black", 4), (7, "white", 2)):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=width)


def _caption(canvas: Image.Image, place: tuple[int, int], text: str) -> None:
    """Text on white, its lower left corner at a place."""
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    left, top, right, bottom = draw.textbbox(place, text, font, "ls")
    draw.rectangle((left - 4, top - 4, right + 4, bottom + 4), fill="white")
    draw.text(place, text, "black", font, "ls")
