"""Pictures of a benchmark's results: right matches in green, wrong ones in red, the truth in yellow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ditf.calib.eval.benchmarks import Benchmark
from ditf.calib.eval.correspondence import Criteria
from ditf.calib.eval.datasets.base import Box, Pair, read_image
from ditf.calib.eval.datasets.davis import Video
from ditf.calib.eval.datasets.hpatches import HomographyPair
from ditf.calib.eval.datasets.tss import FlowPair
from ditf.calib.eval.homography import corners_of, warp
from ditf.calib.eval.outcomes import Outcome

RIGHT, WRONG, TRUTH = (60, 220, 90), (240, 50, 60), (255, 235, 60)
_HEIGHT = 480  # largest height of an image, px
_GAP = 12
_CAPTION = 26
_FEW = 100  # with more points, right matches have no line and their truth no cross
_FILL = 110  # opacity of labels over a frame, of 255


def draw_outcome(benchmark: Benchmark, item: Any, outcome: Outcome) -> Image.Image:
    """Draw one item of a benchmark with its result.

    Returns:
        An RGB image: both images side by side, at most 480 px high, under a caption.
    """
    value = outcome.value(benchmark.headline)
    metric, threshold = benchmark.headline
    what = {"pck": f"PCK@{threshold}", "homography_accuracy": f"within {threshold} px"}.get(metric, threshold)
    caption = f"{item.name}    {item.category}    {what} {value:.1%}"
    if isinstance(item, Pair):
        alpha = float(threshold)
        return _points(
            item.images, caption, item.points, outcome.found, item.truth, item.box,
            _right(outcome.found, item.truth, item.reference, alpha, benchmark.criteria),
        )  # fmt: skip
    if isinstance(item, FlowPair):
        places, ends = outcome.found[:, :2], outcome.found[:, 2:]
        flow = item.truth()[0]
        truth = places + flow[places[:, 1].astype(int), places[:, 0].astype(int)]
        right = _right(ends, truth, item.reference, float(threshold), benchmark.criteria)
        return _points(item.images, caption, places, ends, truth, None, right)
    if isinstance(item, HomographyPair):
        return _quads(item, caption, outcome.found, value == 1.0)
    return _labels(item, caption, outcome.found)


def _right(
    found: np.ndarray, truth: np.ndarray, reference: float, alpha: float, criteria: Criteria
) -> np.ndarray:
    distances = np.linalg.norm(found - truth, axis=1)
    one = Criteria((alpha,), strict=criteria.strict)
    return one.shares(distances, reference)["pck", f"{alpha:g}"]


class _Sheet:
    """Two images side by side under a caption."""

    def __init__(self, images: Sequence[Any], caption: str) -> None:
        whole = [Image.fromarray(read_image(image)) for image in images]
        self._scales = [min(_HEIGHT / one.height, 1.6 * _HEIGHT / one.width) for one in whole]
        shown = [
            one.resize((max(1, round(one.width * scale)), max(1, round(one.height * scale))))
            for one, scale in zip(whole, self._scales, strict=True)
        ]
        self._left = [0, shown[0].width + _GAP]
        width = sum(one.width for one in shown) + _GAP
        self.picture = Image.new("RGB", (width, max(one.height for one in shown) + _CAPTION), "white")
        for one, left in zip(shown, self._left, strict=True):
            self.picture.paste(one, (left, _CAPTION))
        self.draw = ImageDraw.Draw(self.picture)
        self.draw.text((6, 5), caption, "black", ImageFont.load_default(13))

    def place(self, side: int, points: np.ndarray) -> list[tuple[float, float]]:
        """Positions on the sheet of points (x, y) px of an image."""
        x, y = ((np.asarray(points, np.float64) + 0.5) * self._scales[side]).T
        return [(float(a) + self._left[side], float(b) + _CAPTION) for a, b in zip(x, y, strict=True)]


def _points(
    images: Sequence[Any],
    caption: str,
    points: np.ndarray,
    found: np.ndarray,
    truth: np.ndarray,
    box: Box | None,
    right: np.ndarray,
) -> Image.Image:
    """Draw source points and their matches, with a line from each wrong match to its truth."""
    sheet = _Sheet(images, caption)
    draw = sheet.draw
    if box is not None:
        corners = sheet.place(1, np.array([[box[0], box[1]], [box[2], box[3]]]))
        draw.rectangle((*corners[0], *corners[1]), outline=TRUTH)
    few = len(points) <= _FEW
    size = 5 if few else 2
    places = zip(sheet.place(0, points), sheet.place(1, found), sheet.place(1, truth), right, strict=True)
    for start, end, goal, good in sorted(places, key=lambda one: bool(one[3])):
        colour = RIGHT if good else WRONG
        if few:
            draw.line((*start, *end), fill=colour, width=1)
        if not good:
            draw.line((*end, *goal), fill=TRUTH, width=1)
        if few or not good:
            _cross(draw, goal, size)
        for x, y in (start, end):
            draw.ellipse((x - size, y - size, x + size, y + size), fill=colour, outline="black")
    return sheet.picture


def _cross(draw: ImageDraw.ImageDraw, place: tuple[float, float], size: int) -> None:
    x, y = place
    for width, colour in ((3, (0, 0, 0)), (1, TRUTH)):
        draw.line((x - size - 1, y - size - 1, x + size + 1, y + size + 1), fill=colour, width=width)
        draw.line((x - size - 1, y + size + 1, x + size + 1, y - size - 1), fill=colour, width=width)


def _quads(item: HomographyPair, caption: str, found: np.ndarray | None, right: bool) -> Image.Image:
    """Draw the true and the estimated outline of the source in the target."""
    sheet = _Sheet(item.images, caption)
    corners = corners_of(read_image(item.source).shape[:2])
    outlines = [(item.homography, TRUTH)]
    if found is not None:
        outlines.append((np.asarray(found), RIGHT if right else WRONG))
    limit = 10.0 * max(sheet.picture.size)  # a wild estimate goes anywhere
    for homography, colour in outlines:
        warped = np.nan_to_num(warp(corners, homography), nan=limit).clip(-limit, limit)
        outline = sheet.place(1, warped)
        sheet.draw.line([*outline, outline[0]], fill=colour, width=3)
    return sheet.picture


def _labels(item: Video, caption: str, found: tuple[int, np.ndarray]) -> Image.Image:
    """Draw a frame's true labels and those found: right ones green, missed ones yellow, wrong ones red."""
    index, labels = found
    truth = item.labels(index)
    frame = read_image(item.frames[index]).astype(np.float32)
    colours = np.zeros_like(frame)
    colours[(truth > 0) & (labels == truth)] = RIGHT
    colours[(truth > 0) & (labels == 0)] = TRUTH
    colours[(labels > 0) & (labels != truth)] = WRONG
    marked = colours.any(axis=2, keepdims=True)
    over = np.where(marked, frame + (colours - frame) * (_FILL / 255), frame)
    one = np.where((truth > 0)[..., None], frame + (np.array(TRUTH) - frame) * (_FILL / 255), frame)
    sides = [side.round().astype(np.uint8) for side in (one, over)]
    return _Sheet(sides, f"{caption}    frame {index}").picture
