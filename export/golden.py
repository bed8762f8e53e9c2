"""golden.npz: enough of the unmodified model's answers to check parity where there is no PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ditf.export.reference import FeatureSettings, Reference
from ditf.runtime.matching import TIE_TOLERANCE

POINTS = 64
MAX_ROWS = 512  # per image
_ROW_BYTES = 4 << 20  # of all rows; with two 960 px images the file stays below 8 MB
_CHANNELS_AT_ONCE = 64


def write_golden(
    path: Path, reference: Reference, images: np.ndarray, settings: FeatureSettings, seed: int
) -> dict[str, Any]:
    """Run the reference on a pair of images and write what a device compares itself with.

    The file holds images uint8 [2, H, W, 3]; rows int64 [2, R], sampled token indices, and features
    float32 [2, R, C] at them; points float32 [P, 2] in the first image, and match_points [P, 2] and
    match_scores [P] in the second.

    Returns:
        What it holds, for the manifest.
    """
    maps = [reference.features(reference.hidden_states(image), settings) for image in images]
    channels, h, w = maps[0].shape
    rng = np.random.default_rng(seed)
    count = max(1, min(h * w, MAX_ROWS, _ROW_BYTES // (4 * channels * len(maps))))
    rows = np.stack([np.sort(rng.choice(h * w, count, replace=False)) for _ in maps])
    features = np.stack([m.reshape(channels, -1).T[r] for m, r in zip(maps, rows, strict=True)])
    height, width = images.shape[1:3]
    points = np.stack([rng.integers(0, width, POINTS), rng.integers(0, height, POINTS)], axis=1)
    match_points, match_scores = published_match(maps[0], maps[1], points, (height, width))
    np.savez_compressed(
        path,
        images=images,
        rows=rows,
        features=features,
        points=points.astype(np.float32),
        match_points=match_points,
        match_scores=match_scores,
    )
    return {"images": "procedural pair", "rows_per_image": count, "points": POINTS}


@torch.no_grad()
def published_match(
    source: np.ndarray, target: np.ndarray, points: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """DiTF's published protocol, step by step in PyTorch: upsample, normalise, cosine, argmax.

    Features are upsampled some channels at a time, which changes nothing and keeps memory bounded.

    Args:
        source, target: float32 [C, h, w].
        points: integers [N, 2], (x, y) px.
        size: (H, W) of both images.

    Returns:
        points float32 [N, 2] and cosines float32 [N]; the first of tied pixels.
    """
    x, y = torch.from_numpy(points[:, 0]), torch.from_numpy(points[:, 1])
    products = torch.zeros(len(points), size[0] * size[1])
    target_squares = torch.zeros(size[0] * size[1])
    query_squares = torch.zeros(len(points))
    for start in range(0, len(source), _CHANNELS_AT_ONCE):
        chunk = slice(start, start + _CHANNELS_AT_ONCE)
        queries = _upsample(source[chunk], size)[:, y, x]
        pixels = _upsample(target[chunk], size).flatten(1)
        products += queries.T @ pixels
        target_squares += pixels.square().sum(0)
        query_squares += queries.square().sum(0)
    cosines = products / (query_squares[:, None] * target_squares).sqrt().clamp(min=1e-12)
    best = cosines.amax(dim=1, keepdim=True)
    index = (cosines >= best - float(TIE_TOLERANCE)).to(torch.uint8).argmax(dim=1)
    found = torch.stack([index % size[1], index // size[1]], dim=1)
    return found.to(torch.float32).numpy(), best[:, 0].numpy()


def _upsample(array: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    maps = torch.from_numpy(np.ascontiguousarray(array))[None]
    return functional.interpolate(maps, size, mode="bilinear", align_corners=False)[0]
