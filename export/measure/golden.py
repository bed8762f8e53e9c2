"""Golden outputs: what the unmodified model gives on a pair of images, to check a bundle without PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from ditf.calib.projection import project_features, projection_cost
from ditf.export.graph.features import FeatureSettings
from ditf.export.measure.reference_model import Reference
from ditf.export.planning.conditions import Entry
from ditf.runtime.matching.cells import TIE_TOLERANCE

POINTS = 64
MAX_ROWS = 512  # per image
MAX_CASES = 8
_ROW_BYTES = 4 << 20  # all rows; with two 960 px images the file stays below 8 MB
_OTHER_BYTES = 1 << 20  # the rows of all conditions but the first
_HIDDEN_BYTES = 1 << 20  # the hidden states that enter the blocks
_CHANNELS_AT_ONCE = 64


@dataclass(frozen=True)
class GoldenCase:
    """A condition that a bundle is checked under: its index in the bundle, and its entry."""

    index: int
    entry: Entry


class Judge(Protocol):
    """The unmodified model that golden outputs come from.

    Attributes:
        record: what its parts were made by; "oracle" is "independent" (`ditf.export.measure.oracle`) or
            "streamed" (`Streamed`).
    """

    record: dict[str, str]

    def maps(
        self, entry: Entry, images: np.ndarray, settings: FeatureSettings, whole: bool = False
    ) -> list[np.ndarray]:
        """The features of images uint8 [n, H, W, 3] under a condition, each float32 [C, h, w].

        Args:
            whole: without the bundle's approximations (--text-tokens, --vae).
        """

    def entering(self, entry: Entry, image: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """What enters blocks 0..k at image tokens `rows` [R]: float32 [k + 1, R, C]."""


class Streamed:
    """The reference as a judge, whose weights are read when they are used.

    It shares the checkpoint's reading, the text embeddings, the noise levels and x_0 with the graph.

    Args:
        reference: with the bundle's encoder.
        reason: why the oracle does not judge.
        own_x_0: the images of `maps` encoded by the checkpoint's own VAE, float32 [n, c, h', w'], where the
            bundle has another encoder.
    """

    def __init__(self, reference: Reference, reason: str, own_x_0: torch.Tensor | None = None) -> None:
        self._reference = reference
        self._own_x_0 = own_x_0
        self.record = {"oracle": "streamed", "reason": reason}

    def maps(
        self, entry: Entry, images: np.ndarray, settings: FeatureSettings, whole: bool = False
    ) -> list[np.ndarray]:
        reference = self._reference.under(entry.condition, entry.timestep)
        if whole and self._own_x_0 is not None:
            hidden = (reference.hidden_states_of(one) for one in self._own_x_0.split(1))
        else:
            hidden = (reference.hidden_states(image) for image in images)
        return [reference.features(one, settings) for one in hidden]

    def entering(self, entry: Entry, image: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return self._reference.under(entry.condition, entry.timestep).entering(image, rows)


@dataclass(frozen=True)
class GoldenOutputs:
    """The golden outputs of one export.

    Attributes:
        arrays: the arrays of golden.npz, see `golden_outputs`.
        manifest: what the manifest says about them.
        projection_cost: what --pca costs on the golden pair (`ditf.calib.projection.projection_cost`); empty
            without --pca.
    """

    arrays: Mapping[str, np.ndarray]
    manifest: dict[str, Any]
    projection_cost: dict[str, float]


def golden_cases(conditions: int) -> list[int]:
    """Which of many conditions are checked: the first, the last and some between, at most `MAX_CASES`."""
    return sorted({round(i) for i in np.linspace(0, conditions - 1, min(conditions, MAX_CASES)).tolist()})


def golden_outputs(
    judge: Judge,
    images: np.ndarray,
    settings: FeatureSettings,
    seed: int,
    cases: Sequence[GoldenCase],
    whole: Entry | None = None,
    projection: np.ndarray | None = None,
) -> GoldenOutputs:
    """Run the unmodified model on images and keep what a device compares its own outputs with.

    The arrays are `images` uint8 [n, H, W, 3], n = 2 in golden.npz; `rows` int64 [n, R], sampled token
    indices, and `features` float32 [n, R, C] at them, under the first condition; `points` float32 [P, 2] in
    the first image, and `match_points` [P, 2] and `match_scores` [P] in the second. Each further condition,
    with index i > 0, has `rows_i` [S] and `features_i` [S, C] of the first image. `hidden_rows` [H] and
    `hidden_states` [k + 1, H, C] are what enters blocks 0..k on the first image under the first condition. A
    bundle that approximates has `whole_features` [n, R, C] and `whole_match_points` [P, 2], which the model
    gives without any approximation. `oracle` is the judge's record as JSON.

    Args:
        judge: the unmodified model.
        images: uint8 [n, H, W, 3], at least two.
        settings: the feature's definition.
        seed: picks rows and points.
        cases: the conditions, the bundle's first one first.
        whole: the first condition without --text-tokens, where the bundle approximates; else None.
        projection: P of --pca, float32 [N, C]: features are then P times what the model gives, in float32.
    """
    first = cases[0].entry
    full = judge.maps(first, images, settings)
    maps = _projected(full, projection)
    channels, h, w = maps[0].shape
    rng = np.random.default_rng(seed)
    count = max(1, min(h * w, MAX_ROWS, _ROW_BYTES // (4 * channels * len(maps))))
    rows = np.stack([np.sort(rng.choice(h * w, count, replace=False)) for _ in maps])
    height, width = images.shape[1:3]
    points = np.stack([rng.integers(0, width, POINTS), rng.integers(0, height, POINTS)], axis=1)
    match_points, match_scores = reference_match(maps[0], maps[1], points, (height, width))
    cost = {}
    if projection is not None:
        cost = projection_cost((full[0], full[1]), (maps[0], maps[1]), points, (height, width))
    arrays = {
        "images": images,
        "rows": rows,
        "features": _take(maps, rows),
        "points": points.astype(np.float32),
        "match_points": match_points,
        "match_scores": match_scores,
        "oracle": np.array(json.dumps(judge.record)),
    }
    some = np.random.default_rng(seed).permutation(h * w)[:MAX_ROWS]
    entering = judge.entering(first, images[0], some)
    order = np.argsort(some[: max(1, _HIDDEN_BYTES * len(some) // entering.nbytes)])
    arrays["hidden_rows"], arrays["hidden_states"] = some[order], entering[:, order]
    if whole is not None:
        exact = _projected(judge.maps(whole, images, settings, whole=True), projection)
        arrays["whole_features"] = _take(exact, rows)
        arrays["whole_match_points"] = reference_match(exact[0], exact[1], points, (height, width))[0]
    others = cases[1:]
    for case in others:
        few = max(1, min(count, _OTHER_BYTES // (4 * channels * len(others))))
        chosen = np.sort(rng.choice(h * w, few, replace=False))
        arrays[f"rows_{case.index}"] = chosen
        one = _projected(judge.maps(case.entry, images[:1], settings), projection)
        arrays[f"features_{case.index}"] = _take(one, chosen[None])[0]
    manifest = {
        "images": "procedural pair",
        "rows_per_image": count,
        "points": POINTS,
        "conditions": [case.index for case in cases],
        **judge.record,
    }
    return GoldenOutputs(arrays, manifest, cost)


def _projected(maps: list[np.ndarray], projection: np.ndarray | None) -> list[np.ndarray]:
    return maps if projection is None else [project_features(one, projection) for one in maps]


def _take(maps: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Token rows [n, R, C] of maps [C, h, w]."""
    return np.stack([m.reshape(len(m), -1).T[r] for m, r in zip(maps, rows, strict=True)])


@torch.no_grad()
def reference_match(
    source: np.ndarray, target: np.ndarray, points: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Match points as the DiTF paper does, step by step in PyTorch: upsample, normalise, cosine, argmax.

    Features are upsampled some channels at a time; the result is the same, and memory stays bounded.

    Args:
        source, target: float32 [C, h, w].
        points: integers [N, 2], (x, y) px.
        size: (H, W) of both images.

    Returns:
        points float32 [N, 2], (x, y) px, and cosines float32 [N]; of tied pixels the first one wins.
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
