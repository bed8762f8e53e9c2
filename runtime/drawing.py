"""Pictures of matches, with Pillow alone: they work wherever the runtime does."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ditf.runtime.matching import Matches

_HEIGHT = 640  # largest height of a picture, px
_GAP = 12
_LABELLED = 40  # more matches than this have no score beside them


def draw_matches(
    source: Image.Image, target: Image.Image, points: np.ndarray, matches: Matches
) -> Image.Image:
    """Both images side by side, a line from each point to its match, scores at the matches.

    Args:
        source, target: RGB.
        points: [N, 2], (x, y) px in the source.
        matches: in the target.

    Returns:
        An RGB picture at most 640 px high.
    """
    left, right = _fit(source), _fit(target)
    height = max(left.height, right.height)
    canvas = Image.new("RGB", (left.width + _GAP + right.width, height), "white")
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width + _GAP, 0))
    starts = (points + 0.5) * (left.width / source.width, left.height / source.height)
    ends = (matches.points + 0.5) * (right.width / target.width, right.height / target.height)
    ends[:, 0] += left.width + _GAP
    overlay = Image.new("RGBA", canvas.size)
    draw = ImageDraw.Draw(overlay)
    colours = [_colour(index, len(points)) for index in range(len(points))]
    for start, end, colour in zip(starts, ends, colours, strict=True):
        draw.line((*start, *end), fill=(*colour, 110), width=1)
    for start, end, colour in zip(starts, ends, colours, strict=True):
        for x, y in (start, end):
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=(*colour, 255), outline="black")
    if len(points) <= _LABELLED:
        font = ImageFont.load_default(11)
        for (x, y), score in zip(ends, matches.scores, strict=True):
            text = f"{score:.2f}"
            beyond = x + 7 + draw.textlength(text, font) > canvas.width
            place, anchor = ((x - 7, y), "rm") if beyond else ((x + 7, y), "lm")
            draw.text(place, text, "white", font, anchor, stroke_width=1, stroke_fill="black")
    return Image.alpha_composite(canvas.convert("RGBA"), overlay).convert("RGB")


def _fit(image: Image.Image) -> Image.Image:
    scale = min(1.0, _HEIGHT / image.height, 2 * _HEIGHT / image.width)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _colour(index: int, count: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(index / max(count, 1), 0.85, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)
