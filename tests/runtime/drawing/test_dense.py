from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ditf.runtime.drawing.canvas import scale_colours
from ditf.runtime.drawing.flow import draw_flow, flow_colours
from ditf.runtime.drawing.heat_map import draw_heat_map

SIZES = [((60, 40), (30, 50)), ((1, 1), (1, 1)), ((300, 200), (200, 300)), ((1300, 700), (90, 1400))]


def pictures(source: tuple[int, int], target: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    return Image.new("RGB", source, "navy"), Image.new("RGB", target, "grey")


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_heat_map_of_any_size(source, target):
    heat = np.random.default_rng(0).uniform(-1, 1, target[::-1]).astype(np.float32)
    picture = draw_heat_map(*pictures(source, target), (0, 0), heat)
    assert picture.mode == "RGB"
    assert picture.height <= 640
    constant = np.full_like(heat, 0.3)
    assert draw_heat_map(*pictures(source, target), (0, 0), constant).size == picture.size


def test_heat_map_is_bright_at_its_best_and_dark_below_the_median():
    heat = np.zeros((200, 300), np.float32)
    heat[100:140, 200:240] = 1.0
    picture = np.asarray(draw_heat_map(*pictures((300, 200), (300, 200)), (5, 5), heat)).astype(int)
    target = picture[:, 312:]
    grey = np.array([128, 128, 128]) * 0.4
    # the mark is a ring around the best pixel, 200, 100: what is measured lies clear of it
    np.testing.assert_allclose(target[125, 225], grey + 0.6 * scale_colours(np.array(1.0)), atol=2)
    np.testing.assert_allclose(target[30, 30], grey + 0.6 * scale_colours(np.array(0.0)), atol=2)
    assert picture[100, 312 + 207].min() > 200  # the ring


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_flow_of_any_size(source, target):
    field = np.zeros((*source[::-1], 2), np.float32)
    back = np.zeros((*target[::-1], 2), np.float32)
    picture = draw_flow(*pictures(source, target), field, back)
    assert picture.mode == "RGB"
    assert picture.height <= 2 * 640 + 12


def test_flow_colours():
    field = np.array([[[0, 0], [10, 0], [0, 10], [-10, 0], [0, -10], [5, 0], [99, 0]]], np.float32)
    still, right, down, left, up, half, far = flow_colours(field, 10.0)[0].astype(int)
    assert still.tolist() == [255, 255, 255]
    assert right.tolist() == [255, 0, 0] == far.tolist()
    assert down[1] == 255
    assert down[2] == 0
    assert left.tolist()[0] == 0
    assert left[1] >= 250
    assert left[2] >= 250
    assert up[2] == 255
    assert up[1] == 0
    np.testing.assert_allclose(half, [255, 127, 127], atol=1)


def test_the_warped_source_falls_onto_the_target():
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 256, (60, 90, 3)).astype(np.uint8)
    source, target = (
        Image.fromarray(scene[:, 10:70]),
        Image.fromarray(scene[:, 5:65]),
    )  # moved 5 px to the right
    back = np.zeros((60, 60, 2), np.float32)
    back[..., 0] = -5
    picture = np.asarray(draw_flow(source, target, -back, back))
    over = picture[72:, 72:]
    np.testing.assert_array_equal(over[:, 5:], np.asarray(target)[:, 5:])
