"""Pictures of outcomes: what is right is green, what is wrong red, and the truth is marked."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ditf.calib.eval.benchmarks import BENCHMARKS
from ditf.calib.eval.correspondence import Criteria, evaluate_flows, evaluate_pairs
from ditf.calib.eval.datasets.base import Pair
from ditf.calib.eval.homography import evaluate_homographies
from ditf.calib.eval.pictures import RIGHT, TRUTH, WRONG, draw_outcome
from ditf.calib.eval.segmentation import evaluate_videos
from tests.calib.eval import miniature

CAPTION = 26


def colours(picture, left=0.0):
    """Colours right of a share of the width, under the caption."""
    array = np.asarray(picture)[CAPTION:, int(left * picture.width) :]
    return {tuple(int(v) for v in colour) for colour in array.reshape(-1, 3)}


def test_points():
    grey = np.full((240, 240, 3), 128, np.uint8)
    points = np.array([[40.0, 50], [200, 60]])
    pair = Pair("p", grey, grey, points, points, (0, 0, 239, 239), "cat", "ab")
    found = np.array([[44.0, 50], [60, 200]])  # one right, one wrong
    benchmark = BENCHMARKS["spair-71k"]
    (outcome,) = evaluate_pairs([pair], lambda pair: found, benchmark.criteria)
    picture = draw_outcome(benchmark, pair, outcome)
    scale, left = 2.0, 480 + 12
    for (x, y), colour in zip(found, (RIGHT, WRONG), strict=True):
        place = (round((x + 0.5) * scale) + left, round((y + 0.5) * scale) + CAPTION)
        assert picture.getpixel(place) == colour
    for (x, y), colour in zip(points, (RIGHT, WRONG), strict=True):
        assert picture.getpixel((round((x + 0.5) * scale), round((y + 0.5) * scale) + CAPTION)) == colour
    assert TRUTH in colours(picture, 0.5)
    assert TRUTH not in colours(picture.crop((0, 0, 480, picture.height)))


@pytest.mark.parametrize(("shift", "colour"), [(0.05, RIGHT), (8, WRONG), (None, TRUTH)])
def test_homographies(tmp_path, shift, colour):
    benchmark = BENCHMARKS["hpatches"]
    pair = benchmark.read(miniature.hpatches(tmp_path), "test").items[0]

    def estimate(pair):
        return None if shift is None else np.array([[1, 0, shift], [0, 1, 0], [0, 0, 1]]) @ pair.homography

    (outcome,) = evaluate_homographies([pair], estimate)
    picture = draw_outcome(benchmark, pair, outcome)
    assert colour in colours(picture, 0.5)
    wild = evaluate_homographies([pair], lambda pair: np.array([[1e9, 1, 0], [0, 1, 0], [-1 / 47, 0, 1]]))
    draw_outcome(benchmark, pair, wild[0])  # corners at infinity


def test_flows(tmp_path):
    benchmark = BENCHMARKS["tss"]
    pair = benchmark.read(miniature.tss(tmp_path), "test").items[0]
    truth = pair.truth()[0]
    for off, colour, other in ((0.5, RIGHT, WRONG), (10, WRONG, RIGHT)):
        (outcome,) = evaluate_flows([pair], lambda pair, off=off: truth + np.float32(off), Criteria((0.05,)))
        seen = colours(draw_outcome(benchmark, pair, outcome))
        assert colour in seen
        assert other not in seen


def test_videos(tmp_path):
    benchmark = BENCHMARKS["davis"]
    folder = miniature.davis(tmp_path)
    for path in folder.rglob("*.jpg"):
        Image.new("RGB", (54, 40), "black").save(path)
    video = benchmark.read(folder, "val").items[0]

    def propagate(video, labels):
        for t in range(1, len(video.frames)):
            yield np.roll(video.labels(t), 4 if t == 3 else 0, 1)

    (outcome,) = evaluate_videos([video], propagate)
    assert outcome.found[0] == 3  # the worst frame
    picture = draw_outcome(benchmark, video, outcome)
    pixels = np.asarray(picture)[CAPTION:, picture.width // 2 + 10 :].reshape(-1, 3).astype(int)
    strong = pixels[pixels.max(axis=1) > 60]
    assert any(r > 1.5 * g for r, g, _ in strong)  # too much
    assert any(g > 1.5 * r for r, g, _ in strong)  # right
    assert any(abs(r - g) < 30 and r > 3 * b for r, g, b in strong)  # missed
