"""J and F of DAVIS 2017, as davis2017-evaluation computes them for the semi-supervised task.

Sources: Perazzi et al., CVPR 2016, section 4; Pont-Tuset et al., arXiv 1704.00675; davisvideochallenge/
davis2017-evaluation: metrics.py (db_eval_iou, f_measure, _seg2bmap), evaluation.py, utils.py
(db_statistics).

Objects are those of the first frame's annotation; the first and the last frame are not scored; void counts
as background. Of each object J is intersection over union, 1 where both are empty, F the harmonic mean of
precision and recall of boundaries that may be ceil(0.008 * image diagonal) px apart. Mean, recall (share of
frames above 0.5) and decay (first quarter's mean minus last's) of each object, then the mean over the
objects of all videos. J&F is the mean of J's and F's.

Label propagation as DiTF runs it is DINO's (eval_video_segmentation.py): n_last 7, radius 12, top-k 5,
temperature 0.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ditf.calib.eval.correspondence import Report, quiet
from ditf.calib.eval.datasets.davis import Video
from ditf.calib.eval.outcomes import Outcome
from ditf.runtime.errors import InputError, missing_extra

Propagation = Callable[[Video, np.ndarray], Iterable[np.ndarray]]
"""Yields labels uint8 [H, W] of every frame after the first, given those of the first."""

_BOUND = 0.008  # share of the diagonal
_BINS = 4


def region_similarity(truth: np.ndarray, found: np.ndarray) -> float:
    """J of bool masks [H, W]."""
    union = np.count_nonzero(truth | found)
    return 1.0 if union == 0 else np.count_nonzero(truth & found) / union


def boundary(mask: np.ndarray) -> np.ndarray:
    """Boundary pixels of a bool mask [H, W], half a pixel towards the origin.

    In the last row and column pixels are compared along it only, and the corner is never a boundary.
    """
    edge = np.zeros_like(mask)
    edge[:-1, :-1] = (mask[:-1, :-1] ^ mask[:-1, 1:]) | (mask[:-1, :-1] ^ mask[1:, :-1])
    edge[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    edge[-1, :-1] = mask[-1, :-1] ^ mask[-1, 1:]
    edge[:-1, -1] = mask[:-1, -1] ^ mask[1:, -1]
    return edge


def boundary_accuracy(truth: np.ndarray, found: np.ndarray) -> float:
    """F of bool masks [H, W].

    Raises:
        MissingComponent: OpenCV, which dilates, is not installed.
    """
    cv2 = _opencv()
    edges = [boundary(mask) for mask in (truth, found)]
    disk = _disk(int(np.ceil(_BOUND * np.hypot(*truth.shape))))
    near_truth, near_found = (cv2.dilate(edge.astype(np.uint8), disk).astype(bool) for edge in edges)
    there, here = (int(np.count_nonzero(edge)) for edge in edges)
    if there == 0 and here == 0:
        return 1.0
    if there == 0 or here == 0:
        return 0.0  # one of precision and recall is 1 by definition, the other 0
    precision = np.count_nonzero(edges[1] & near_truth) / here
    recall = np.count_nonzero(edges[0] & near_found) / there
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def statistics(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, recall and decay over the frames of one object, [n]; `db_statistics`."""
    ends = (np.round(np.linspace(1, len(values), _BINS + 1) + 1e-10) - 1).astype(int)
    bins = [values[ends[i] : ends[i + 1] + 1] for i in range(_BINS)]
    decay = float(np.mean(bins[0]) - np.mean(bins[-1]))
    return float(np.mean(values)), float(np.mean(values > 0.5)), decay


def evaluate_videos(videos: Sequence[Video], propagate: Propagation, report: Report = quiet) -> list[Outcome]:
    """Propagate the labels of every video and score them.

    Returns:
        One outcome per video with "davis": "J&F", "J", "F" and their "-recall" and "-decay" (weight: its
        objects). `found` holds the index of the worst scored frame and its labels.

    Raises:
        InputError: labels of another size or number.
    """
    _opencv()
    outcomes = []
    frames = sum(len(video.frames) for video in videos)
    done = 0
    for video in videos:
        first = video.labels(0)
        objects = int(first.max())
        last = len(video.frames) - 1
        scores = np.zeros((2, objects, last - 1))
        worst: tuple[float, int, np.ndarray] | None = None
        count = 0
        for index, labels in enumerate(propagate(video, first), 1):
            count = index
            report(video.name, done + index, frames)
            if labels.shape != first.shape:
                raise InputError(f"{video.name}: labels of {labels.shape}, the frames have {first.shape}")
            if index >= last:
                continue
            truth = video.labels(index)
            for one in range(objects):
                masks = truth == one + 1, labels == one + 1
                scores[:, one, index - 1] = region_similarity(*masks), boundary_accuracy(*masks)
            mean = float(scores[:, :, index - 1].mean())
            if worst is None or mean < worst[0]:
                worst = mean, index, np.array(labels)
        if count != last:
            raise InputError(f"{video.name}: labels of {count} frames after the first, it has {last}")
        done += len(video.frames)
        outcomes.append(_outcome(video, scores, worst))
    return outcomes


def _outcome(video: Video, scores: np.ndarray, worst: Any) -> Outcome:
    sums: dict[str, float] = {}
    for letter, objects in zip("JF", scores, strict=True):
        parts = np.array([statistics(values) for values in objects])
        for ending, total in zip(("", "-recall", "-decay"), parts.sum(axis=0), strict=True):
            sums[letter + ending] = float(total)
    sums = {"J&F": (sums["J"] + sums["F"]) / 2, **sums}
    shares = {("davis", name): (total, float(scores.shape[1])) for name, total in sums.items()}
    return Outcome(video.name, video.category, video.group, shares, found=worst and worst[1:])


def _disk(radius: int) -> np.ndarray:
    """uint8 disk, as skimage.morphology.disk draws it."""
    axis = np.arange(-radius, radius + 1)
    return (axis[:, None] ** 2 + axis[None] ** 2 <= radius**2).astype(np.uint8)


def _opencv() -> Any:
    try:
        import cv2
    except ImportError:
        raise missing_extra("opencv", "eval") from None
    return cv2
