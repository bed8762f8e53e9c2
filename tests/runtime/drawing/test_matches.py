from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ditf.runtime.drawing.canvas import scale_colours
from ditf.runtime.drawing.matches import draw_matches
from ditf.runtime.matching.points import Matches


def drawn(source: tuple[int, int], target: tuple[int, int], count: int) -> Image.Image:
    """A picture of random matches; sizes are (width, height)."""
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 1, (count, 2)) * (source[0] - 1, source[1] - 1)
    ends = rng.uniform(0, 1, (count, 2)) * (target[0] - 1, target[1] - 1)
    matches = Matches(ends.astype(np.float32), rng.uniform(-1, 1, count).astype(np.float32))
    return draw_matches(Image.new("RGB", source, "navy"), Image.new("RGB", target, "grey"), points, matches)


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ((60, 40), (30, 50), (60 + 12 + 30, 50)),
        ((1, 1), (1, 1), (14, 1)),
        ((1280, 1280), (640, 320), (640 + 12 + 640, 640)),
        ((100, 6400), (20_000, 10), (10 + 12 + 1280, 640)),
    ],
)
@pytest.mark.parametrize("count", [0, 1, 40, 41])
def test_size(source, target, expected, count):
    picture = drawn(source, target, count)
    assert picture.mode == "RGB"
    assert picture.size == expected


def test_many_points():
    assert drawn((300, 200), (200, 300), 5000).size == (512, 300)


def test_marks_are_at_the_points():
    source, target = Image.new("RGB", (100, 80), "white"), Image.new("RGB", (100, 80), "white")
    matches = Matches(np.array([[70.0, 60.0]], np.float32), np.array([0.5], np.float32))
    picture = draw_matches(source, target, np.array([[20.0, 10.0]]), matches)
    first = picture.getpixel((20, 10))
    assert first == picture.getpixel((100 + 12 + 70, 60))
    assert first != (255, 255, 255)
    assert picture.getpixel((5, 75)) == (255, 255, 255)


def test_neither_image_nor_points_change():
    source, points = Image.new("RGB", (40, 30), "red"), np.array([[3.0, 4.0]])
    matches = Matches(np.array([[5.0, 6.0]], np.float32), np.ones(1, np.float32))
    draw_matches(source, source, points, matches)
    assert source.getcolors() == [(1200, (255, 0, 0))]
    assert points.tolist() == [[3.0, 4.0]]
    assert matches.points.tolist() == [[5.0, 6.0]]


def test_colours_tell_matches_apart():
    source = Image.new("RGB", (400, 20), "white")
    points = np.array([[x, 10.0] for x in range(20, 400, 40)])
    picture = draw_matches(source, source, points, Matches(points.astype(np.float32), np.ones(10)))
    assert len({picture.getpixel((int(x), 10)) for x, _ in points}) == 10


def test_lines_of_many_matches_are_coloured_by_score_and_explained():
    source = Image.new("RGB", (300, 200), "black")
    points = np.tile([[150.0, 20.0], [150.0, 60.0]], (50, 1))
    scores = np.tile([0.1, 0.9], 50).astype(np.float32)
    picture = draw_matches(source, source, points, Matches(points.astype(np.float32), scores))
    low, high = (np.array(picture.getpixel((250, y))).astype(int) for y in (20, 60))
    assert high[0] > low[0]  # yellow against violet
    assert high[1] > low[1]
    assert picture.getpixel((8, 170)) == (255, 255, 255)  # the legend


def test_scale_rises_evenly():
    colours = scale_colours(np.linspace(-0.5, 1.5, 50)).astype(float)
    lightness = colours @ (0.299, 0.587, 0.114)
    assert (np.diff(lightness) >= -0.5).all()
    assert lightness[-1] > 4 * lightness[0]
