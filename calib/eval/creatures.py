"""Creatures: drawn animals whose keypoints are known exactly.

They are side views of quadrupeds of several species, which differ only in their proportions. Colours,
markings, pose, scale, place, direction and background are random in each picture, so that neither colour nor
place reveals a keypoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ditf.calib.eval.creature_paint import paint
from ditf.calib.eval.creature_skeleton import KEYPOINTS, SPECIES, Skeleton

__all__ = ["KEYPOINTS", "SPECIES", "Creature", "draw_creature"]

_SUPERSAMPLING = 3


@dataclass(frozen=True)
class Creature:
    """A picture and its annotation.

    Attributes:
        image: uint8 [size, size, 3] RGB.
        keypoints: float64 [len(KEYPOINTS), 2] (x, y) in pixels, with centres at integers; all are inside.
        box: (x0, y0, x1, y1) around the drawn animal, pixels.
        species: index into `SPECIES`.
    """

    image: np.ndarray
    keypoints: np.ndarray
    box: tuple[float, float, float, float]
    species: int


def draw_creature(species: int, seed: int | tuple[int, ...], size: int = 256) -> Creature:
    """Draw one animal.

    Args:
        species: index into `SPECIES`.
        seed: together with the species it determines the picture.
        size: side of the square picture, pixels.
    """
    seeds = (seed,) if isinstance(seed, int) else seed
    rng = np.random.default_rng([*seeds, species])
    skeleton = Skeleton(rng, list(SPECIES.values())[species])
    canvas = size * _SUPERSAMPLING
    points, radii = skeleton.outline()
    low, high = (points - radii[:, None]).min(0), (points + radii[:, None]).max(0)
    extent = (high - low).max()
    scale = canvas * rng.uniform(0.75, 0.95) / extent
    room = canvas - scale * (high - low)
    offset = rng.uniform(0.03, 0.97, 2) * room - scale * low
    flip = rng.random() < 0.5

    def place(point: np.ndarray) -> np.ndarray:
        placed: np.ndarray = point * scale + offset
        if flip:
            placed = placed * [-1, 1] + [canvas, 0]
        return placed

    image = paint(rng, skeleton, place, scale, canvas).resize((size, size), Image.Resampling.BOX)
    to_pixels = (1 / _SUPERSAMPLING, -0.5)  # continuous canvas coordinates -> pixel centres at integers
    keypoints = place(skeleton.keypoints()) * to_pixels[0] + to_pixels[1]
    corners = place(np.stack([low, high])) * to_pixels[0] + to_pixels[1]
    x0, y0, x1, y1 = (float(value) for value in (*corners.min(0), *corners.max(0)))
    return Creature(np.asarray(image), keypoints.clip(0, size - 1), (x0, y0, x1, y1), species)
