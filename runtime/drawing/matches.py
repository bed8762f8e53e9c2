"""Drawing matches between two images."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ditf.runtime.drawing.canvas import GAP, draw_scale, fit, scale_colours, side_by_side
from ditf.runtime.matching.points import Matches

_LABELLED = 40  # with more matches than this, no score is written beside them


def draw_matches(
    source: Image.Image, target: Image.Image, points: np.ndarray, matches: Matches
) -> Image.Image:
    """Draw both images side by side, with a line from each point to its match.

    A point and its match have the same colour, and the line's colour shows the score. Up to 40 matches get a
    colour each and their score as text. With more matches, a point's colour shows where in the source it is.

    Args:
        source, target: RGB images.
        points: [N, 2], (x, y) in pixels of the source.
        matches: the matches of these points in the target.

    Returns:
        An RGB picture at most 640 px high.
    """
    left, right = fit(source), fit(target)
    canvas = side_by_side([left, right])
    starts = (points + 0.5) * (left.width / source.width, left.height / source.height)
    ends = (matches.points + 0.5) * (right.width / target.width, right.height / target.height)
    ends[:, 0] += left.width + GAP
    few = len(points) <= _LABELLED
    low, high = (matches.scores.min(), matches.scores.max()) if len(points) else (0.0, 0.0)
    lines = scale_colours((matches.scores - low) / max(high - low, 1e-6))
    overlay = Image.new("RGBA", canvas.size)
    draw = ImageDraw.Draw(overlay)
    faint = round(min(150, max(40, 20_000 / max(len(points), 1))))
    order = np.argsort(matches.scores, kind="stable")  # the best matches are drawn last, on top
    for index in order:
        line = (*starts[index], *ends[index])
        if few:
            draw.line(line, fill=(255, 255, 255, 110), width=4)  # keeps dark lines visible on dark images
        draw.line(line, fill=(*lines[index], 255 if few else faint), width=2 if few else 1)
    radius = 4 if few else 3
    for index in order:
        own = _hue(index, len(points)) if few else _place(points[index], source.size)
        for x, y in (starts[index], ends[index]):
            box = (x - radius, y - radius, x + radius, y + radius)
            draw.ellipse(box, fill=(*own, 255), outline="black" if few else None)
    if few:
        font = ImageFont.load_default(11)
        for (x, y), score in zip(ends, matches.scores, strict=True):
            text = f"{score:.2f}"
            beyond = x + 7 + draw.textlength(text, font) > canvas.width
            place, anchor = ((x - 7, y), "rm") if beyond else ((x + 7, y), "lm")
            draw.text(place, text, "white", font, anchor, stroke_width=1, stroke_fill="black")
    picture = Image.alpha_composite(canvas.convert("RGBA"), overlay).convert("RGB")
    if not few:
        draw_scale(picture, "cosine", low, high)
    return picture


def _hue(index: int, count: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(index / max(count, 1), 0.85, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def _place(point: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int]:
    """A colour for a place in the image: the hue changes to the right, and colours get paler downwards."""
    x, y = (point + 0.5) / size
    red, green, blue = colorsys.hsv_to_rgb(0.85 * x, 1.0 - 0.65 * y, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)
