"""Making encoded pictures."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def encoded(pixels: np.ndarray, format: str = "PNG") -> bytes:
    """Encode RGB uint8 [H, W, 3] as a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def noise(seed: int, height: int = 50, width: int = 70) -> np.ndarray:
    """RGB noise, uint8 [H, W, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
