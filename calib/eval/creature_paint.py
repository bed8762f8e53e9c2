"""Painting a creature: colours, markings and background, drawn at random for each picture."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from ditf.calib.eval.creature_skeleton import Skeleton

Colour = tuple[int, int, int]
Place = Callable[[np.ndarray], np.ndarray]
"""Maps a point in units of the animal to the canvas, (x, y) px."""


class _Brush:
    """Tapered strokes on the colour layer, and a mask of the parts that take markings."""

    def __init__(self, canvas: Image.Image, place: Place, scale: float) -> None:
        self.canvas = canvas
        self.mask = Image.new("L", canvas.size, 0)
        self._layers = (ImageDraw.Draw(canvas), ImageDraw.Draw(self.mask))
        self._place = place
        self._scale = scale

    def stroke(
        self, a: np.ndarray, b: np.ndarray, ra: float, rb: float, colour: Colour, marked: bool = False
    ) -> None:
        """Draw about the convex hull of two circles."""
        p, q = self._place(a), self._place(b)
        ra, rb = ra * self._scale, rb * self._scale
        length = math.hypot(*(q - p))
        normal = np.array([-(q - p)[1], (q - p)[0]]) / max(length, 1e-9)
        quad = [tuple(v) for v in (p + normal * ra, q + normal * rb, q - normal * rb, p - normal * ra)]
        for draw, fill in zip(self._layers, (colour, 255 if marked else 0), strict=True):
            draw.polygon(quad, fill=fill)
            for centre, radius in ((p, ra), (q, rb)):
                draw.ellipse((*(centre - radius), *(centre + radius)), fill=fill)


def paint(rng: np.random.Generator, s: Skeleton, place: Place, scale: float, canvas: int) -> Image.Image:
    """Draw an animal on a background.

    Args:
        place: maps units of the skeleton to the canvas.
        scale: pixels per unit.
        canvas: side of the square canvas, pixels.
    """
    image = _background(rng, canvas)
    hue, saturation, value = rng.random(), rng.uniform(0.15, 0.8), rng.uniform(0.4, 0.75)

    def tone(lightness: float, turn: float = 0.0) -> Colour:
        rgb = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, min(1.0, value * lightness))
        return (int(rgb[0] * 255), int(rgb[1] * 255), int(rgb[2] * 255))

    body = tone(1.0)
    far, near = tone(0.6), tone(0.9)
    turn = rng.normal(0, 0.06)
    head = tone(rng.uniform(0.8, 1.25), turn)
    brush = _Brush(image, place, scale)
    stroke = brush.stroke
    width = s.leg_width / 2

    def leg(joints: list[np.ndarray], colour: Colour, hoof: Colour) -> None:
        stroke(joints[0], joints[1], width * 1.3, width, colour, True)
        stroke(joints[1], joints[2], width, width * 0.8, colour, True)
        stroke(joints[2], joints[2] + [0.05, 0], width * 1.05, width * 0.9, hoof)

    dark, light, socks = tone(0.4), tone(1.45), tone(1.2)

    def tail(colour: Colour) -> None:
        stroke(s.tail_base, s.tail_middle, s.tail_width * 0.6, s.tail_width * 0.5, colour, True)
        stroke(s.tail_middle, s.tail_tip, s.tail_width * 0.5, s.tail_width * 0.5, colour, True)
        tuft = s.tail_tip + (s.tail_middle - s.tail_tip) * 0.25
        stroke(tuft, s.tail_tip, s.tail_width * 0.6, s.tail_width * 0.55 + 0.02, dark)

    leg(s.legs[0], far, far)
    leg(s.legs[2], far, far)
    stroke(
        s.ear_base + s.gaze * 0.06, s.ear + s.gaze * 0.08, s.ear_width * 0.5, s.ear_width * 0.3, far, False
    )
    tail(tone(0.85))
    stroke(s.hip, s.shoulder, s.half, s.half * 0.95, body, True)
    belly = -s.up * s.half * 0.62
    stroke(s.hip + belly, s.shoulder + belly, s.half * 0.32, s.half * 0.32, light)
    middle, along = (s.hip + s.shoulder) / 2, s.shoulder - s.hip
    saddle = middle + s.up * s.half * 0.72
    stroke(saddle - along * 0.14, saddle + along * 0.14, s.half * 0.24, s.half * 0.24, tone(0.55), False)
    leg(s.legs[1], near, dark)
    leg(s.legs[3], socks, dark)
    stroke(s.neck_base, s.head, s.neck_width * 0.6, s.neck_width * 0.42, body, True)
    across = s.head - s.neck_base
    crest = np.array([across[1], -across[0]]) / np.hypot(*across) * s.neck_width * 0.42
    stroke(s.neck_base + crest, s.head + crest, s.neck_width * 0.2, s.neck_width * 0.16, dark)
    stroke(s.head, s.head, s.head_radius, s.head_radius, head)
    muzzle = s.head + (s.nose - s.head) * 0.5
    stroke(s.head, muzzle, s.head_radius * 0.7, s.head_radius * 0.55, head)
    stroke(muzzle, s.nose, s.head_radius * 0.55, s.head_radius * 0.38, light)
    stroke(s.nose, s.nose, s.head_radius * 0.24, s.head_radius * 0.24, dark)
    stroke(s.ear_base, s.ear, s.ear_width * 0.5, s.ear_width * 0.3, tone(0.75, turn))
    stroke(
        s.ear_base,
        s.ear_base + (s.ear - s.ear_base) * 0.6,
        s.ear_width * 0.2,
        s.ear_width * 0.15,
        light,
        False,
    )
    stroke(s.eye, s.eye, s.head_radius * 0.26, s.head_radius * 0.26, (250, 250, 250))
    stroke(s.eye, s.eye, s.head_radius * 0.14, s.head_radius * 0.14, (15, 15, 15))
    _mark(rng, image, brush.mask, scale)
    return image


def _mark(rng: np.random.Generator, image: Image.Image, mask: Image.Image, scale: float) -> None:
    """Draw stripes, spots or nothing on the parts that the mask shows."""
    kind = rng.integers(3)
    if kind == 0:
        return
    layer = Image.new("L", image.size, 0)
    draw = ImageDraw.Draw(layer)
    side = image.size[0]
    step = scale * rng.uniform(0.1, 0.22)
    if kind == 1:
        slope = rng.uniform(-0.5, 0.5) * side
        for x in np.arange(-side, 2 * side, step):
            draw.line((x, 0, x + slope, side), fill=110, width=max(1, int(step * 0.4)))
    else:
        for x, y in rng.uniform(0, side, (int((side / step) ** 2 * 0.6), 2)):
            radius = step * 0.28
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=110)
    marking = tuple(int(v) for v in rng.integers(0, 256, 3))
    both = Image.fromarray(np.minimum(np.asarray(layer), np.asarray(mask)))
    image.paste(marking, (0, 0), both)


def _background(rng: np.random.Generator, canvas: int) -> Image.Image:
    """Smooth colours with a few shapes over them."""
    grid = (rng.integers(2, 5), rng.integers(2, 5), 3)
    coarse = rng.uniform(50, 206, 3) + rng.uniform(-50, 50, grid)
    image = Image.fromarray(coarse.astype(np.uint8)).resize((canvas, canvas), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 4)):
        x, y = rng.uniform(0, canvas, 2)
        rx, ry = rng.uniform(0.02, 0.16, 2) * canvas
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        if rng.random() < 0.5:
            draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)
        else:
            draw.rectangle((x - rx, y - ry, x + rx, y + ry), fill=colour)
    return image
