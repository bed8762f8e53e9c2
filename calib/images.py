"""Procedural images: the calibration and golden images that need no files."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

COUNT = 6  # calibration images when the user gives none


def procedural_image(size: tuple[int, int], seed: int) -> np.ndarray:
    """Draw an image with edges, gradients, textures and flat areas: uint8 [H, W, 3].

    Args:
        size: (H, W) in pixels.
        seed: picks the shapes and colours.
    """
    height, width = size
    rng = np.random.default_rng(seed)
    image = Image.fromarray(_background(rng, height, width))
    draw = ImageDraw.Draw(image)
    for _ in range(14):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        rx, ry = rng.uniform(0.03, 0.2, 2) * min(size)
        box = (x - rx, y - ry, x + rx, y + ry)
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        shape = rng.integers(3)
        if shape == 0:
            draw.ellipse(box, fill=colour)
        elif shape == 1:
            draw.rectangle(box, fill=colour)
        else:
            step = max(2, int(min(rx, ry) / 2))
            for line in range(int(box[0]), int(box[2]), step):
                draw.line((line, box[1], line, box[3]), fill=colour, width=max(1, step // 2))
    return np.asarray(image)


def procedural_images(size: tuple[int, int], count: int = COUNT) -> list[np.ndarray]:
    """Different images, made from the seeds 0..count-1."""
    return [procedural_image(size, seed) for seed in range(count)]


def golden_pair(size: tuple[int, int]) -> np.ndarray:
    """The golden pair: an image and a rotated, shifted and enlarged copy of it, uint8 [2, H, W, 3]."""
    first = procedural_image(size, seed=1000)
    height, width = size
    angle, zoom = np.deg2rad(6.0), 1.12
    c, s = np.cos(angle) / zoom, np.sin(angle) / zoom
    cx, cy = width / 2, height / 2
    matrix = (c, s, cx - c * cx - s * cy + 0.04 * width, -s, c, cy + s * cx - c * cy - 0.03 * height)
    second = Image.fromarray(first).transform(
        (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(90, 90, 90)
    )
    return np.stack([first, np.asarray(second)])


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth colour noise: a coarse random grid that is enlarged."""
    coarse = rng.integers(40, 216, (4, 4, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
