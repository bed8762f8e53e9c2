"""Pictures of matches, with Pillow alone: they work wherever the runtime does."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ditf.runtime.matching.points import Matches

_HEIGHT = 640  # largest height of an image in a picture, px
GAP = 12
_LABELLED = 40  # more matches than this have no score beside them
_LEGEND = (190, 30)  # px

_SCALE = np.array(
    [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float32
)  # viridis at 0, 1/4, ... 1: its lightness rises evenly


def draw_matches(
    source: Image.Image, target: Image.Image, points: np.ndarray, matches: Matches
) -> Image.Image:
    """Both images side by side, each point and its match in one colour, lines coloured by score.

    Up to 40 matches have colours of their own and scores beside them; of more, the colour says where in the
    source the point is.

    Args:
        source, target: RGB.
        points: [N, 2], (x, y) px in the source.
        matches: in the target.

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
    order = np.argsort(matches.scores, kind="stable")  # the best on top
    for index in order:
        line = (*starts[index], *ends[index])
        if few:
            draw.line(line, fill=(255, 255, 255, 110), width=4)  # else dark lines vanish on dark images
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


def fit(image: Image.Image) -> Image.Image:
    """An image no larger than a picture holds."""
    return image.resize(fitted_size(image.size), Image.Resampling.LANCZOS)


def fitted_size(size: Sequence[int]) -> tuple[int, int]:
    """(width, height) that `fit` gives an image of (width, height)."""
    width, height = size
    scale = min(1.0, _HEIGHT / height, 2 * _HEIGHT / width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Images in a row, aligned at the top, on white."""
    width = sum(image.width for image in images) + GAP * (len(images) - 1)
    canvas = Image.new("RGB", (width, max(image.height for image in images)), "white")
    left = 0
    for image in images:
        canvas.paste(image, (left, 0))
        left += image.width + GAP
    return canvas


def scale_colours(values: np.ndarray) -> np.ndarray:
    """Numbers in 0..1 as colours from dark violet to yellow, uint8 [..., 3]."""
    position = np.clip(values, 0.0, 1.0) * (len(_SCALE) - 1)
    lower = np.minimum(position.astype(np.int64), len(_SCALE) - 2)
    weight = (position - lower)[..., None].astype(np.float32)
    colours: np.ndarray = np.rint(_SCALE[lower] * (1 - weight) + _SCALE[lower + 1] * weight).astype(np.uint8)
    return colours


def draw_scale(picture: Image.Image, what: str, low: float, high: float) -> None:
    """What the colours mean, in the lower left corner; a picture too small for it stays as it is."""
    width, height = _LEGEND
    if picture.width < width + 12 or picture.height < 3 * height:
        return
    left, top = 6, picture.height - height - 6
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left, top, left + width, top + height), fill="white")
    bar = scale_colours(np.linspace(0, 1, width - 12)[None].repeat(9, axis=0))
    picture.paste(Image.fromarray(bar), (left + 6, top + height - 13))
    font = ImageFont.load_default(11)
    draw.text((left + 6, top + 2), f"{low:.2f}", "black", font, "la")
    draw.text((left + width // 2, top + 2), what, "black", font, "ma")
    draw.text((left + width - 6, top + 2), f"{high:.2f}", "black", font, "ra")


def _hue(index: int, count: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(index / max(count, 1), 0.85, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def _place(point: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int]:
    """A colour that changes over the image: the hue to the right, paler downwards."""
    x, y = (point + 0.5) / size
    red, green, blue = colorsys.hsv_to_rgb(0.85 * x, 1.0 - 0.65 * y, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)
