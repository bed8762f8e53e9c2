"""Every benchmark on a miniature dataset equals the slow published protocol, to the digit."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
from PIL import Image

from ditf.calib.eval.benchmarks import BENCHMARKS
from ditf.calib.eval.correspondence import Criteria, evaluate_flows, evaluate_pairs
from ditf.calib.eval.datasets.base import Pair, check_images
from ditf.calib.eval.homography import evaluate_homographies
from ditf.calib.eval.outcomes import by_category, category_mean, totals
from ditf.calib.eval.segmentation import evaluate_videos
from tests.calib.eval import miniature, published
from tests.runtime.published import accepted, cosines

ALPHAS = (0.05, 0.1, 0.15, 0.3)


def toy(path, category):
    return miniature.features(miniature.pixels(path))


def read(name, folder, split=None):
    benchmark = BENCHMARKS[name]
    reading = check_images(benchmark.read(folder, split or benchmark.splits[0]))
    assert reading.problems == {}
    return benchmark.with_alphas(list(ALPHAS)), reading


def same(outcomes, tallies):
    """Outcomes at all alphas equal the published tallies."""
    found, mean, categories = totals(outcomes), category_mean(outcomes), by_category(outcomes)
    for alpha, tally in tallies.items():
        key, wanted = f"{alpha:g}", tally.document()
        assert found["pck"][key] == wanted["pck"]
        assert found["pck_per_image"][key] == wanted["pck_per_image"]
        # A mean of means: summed in another order, so the last place may differ.
        assert mean["pck"][key] == pytest.approx(wanted["mean"], abs=1e-15)
        assert mean["pck_per_image"][key] == pytest.approx(wanted["mean_per_image"], abs=1e-15)
        assert {name: values["pck"][key] for name, values in categories.items()} == wanted["by_category"]
    values = [tally.per_point() for tally in tallies.values()]
    assert values[0] < values[-1]  # a protocol that is always right or wrong would show nothing


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("spair-71k", miniature.spair),
        ("pf-pascal", miniature.pf_pascal),
        ("pf-pascal", lambda root: miniature.pf_pascal(root, in_list=False)),
        ("pf-willow", miniature.pf_willow),
    ],
)
def test_keypoint_benchmarks(tmp_path, name, make):
    folder = make(tmp_path)
    benchmark, reading = read(name, folder)
    slow = {"spair-71k": published.spair, "pf-pascal": published.pf_pascal, "pf-willow": published.pf_willow}
    outcomes = evaluate_pairs(reading.items, miniature.match, benchmark.criteria)
    same(outcomes, {alpha: slow[name](folder, toy, alpha) for alpha in ALPHAS})


def test_ap10k_in_three_settings(tmp_path):
    folder = miniature.ap10k(tmp_path)
    benchmark, reading = read("ap-10k", folder)
    assert [item.group for item in reading.items] == ["intra-species"] * 2 + ["cross-species"] + [
        "cross-family"
    ] * 2
    outcomes = evaluate_pairs(reading.items, miniature.match, benchmark.criteria)
    settings = {
        "intra-species": "test",
        "cross-species": "test_cross_species",
        "cross-family": "test_cross_family",
    }
    for group, setting in settings.items():
        found = totals([outcome for outcome in outcomes if outcome.group == group])
        for alpha in ALPHAS:
            wanted = published.ap10k(folder, toy, alpha, setting)
            assert found["pck"][f"{alpha:g}"] == wanted.per_point()
            assert found["pck_per_image"][f"{alpha:g}"] == wanted.per_image()
    seen = {name for item in reading.items for name in item.keypoints}
    assert {"left eye", "right eye", "nose"} <= seen


@pytest.mark.parametrize(("strict", "hits"), [(False, 3), (True, 2)])
def test_at_most_or_less_than(strict, hits):
    """SPair counts a match at exactly alpha, AP-10K does not."""
    pair = Pair("p", np.zeros((9, 9, 3), np.uint8), np.zeros((50, 50, 3), np.uint8), np.zeros((4, 2)),
                np.zeros((4, 2)), (0, 0, 40, 20), "x", "abcd")  # fmt: skip
    found = np.array([[0, 0], [4, 0], [0, 3], [4, 4]], float)  # distances over 40: 0, 0.1, 0.075, 0.14
    (outcome,) = evaluate_pairs([pair], lambda pair: found, Criteria((0.1,), strict=strict))
    assert outcome.shares["pck", "0.1"] == (hits, 4)
    assert BENCHMARKS["ap-10k"].criteria.strict
    assert not any(b.criteria.strict for name, b in BENCHMARKS.items() if name != "ap-10k")


def test_stereo():
    benchmark = BENCHMARKS["stereo"]
    reading = check_images(benchmark.read(None, "test"))
    (pair,) = reading.items
    left, right, disparity = skimage.data.stereo_motorcycle()
    wanted = [
        (x, y)
        for y in range(8, 500, 16)
        for x in range(8, 741, 16)
        if np.isfinite(disparity[y, x]) and x - disparity[y, x] >= 0
    ]
    np.testing.assert_array_equal(pair.points, wanted)
    few = slice(None, None, 40)
    shorter = Pair(**{**vars(pair), "points": pair.points[few], "truth": pair.truth[few]})
    (outcome,) = evaluate_pairs([shorter], miniature.match, benchmark.criteria)
    maps = miniature.features(left), miniature.features(right)
    # On so large an image neighbours come within the tie rule's tolerance: any that it allows will do.
    for scores, (u, v) in zip(cosines(*maps, np.array(wanted[few])), outcome.found.astype(int), strict=True):
        assert v * 741 + u in accepted(scores)
    errors = [
        ((u - (x - float(disparity[y, x]))) ** 2 + (v - y) ** 2) ** 0.5
        for (u, v), (x, y) in zip(outcome.found, wanted[few], strict=True)
    ]
    measured = totals([outcome])
    assert measured["epe"][""] == pytest.approx(np.mean(errors), rel=1e-12)
    for limit in (1, 3, 5):
        assert measured["pck_px"][str(limit)] == np.mean([error <= limit for error in errors])
    expected = {
        f"{alpha:g}": np.mean([error / 741 <= alpha for error in errors]) for alpha in (0.01, 0.05, 0.1)
    }
    assert measured["pck"] == expected
    assert "pck_per_image" not in measured


def test_tss(tmp_path):
    folder = miniature.tss(tmp_path)
    benchmark = BENCHMARKS["tss"]
    reading = check_images(benchmark.read(folder, "test"))
    assert len(reading.items) == 6

    def flow(path):
        with Image.open(path) as image:
            size = image.size[::-1]
        return np.random.default_rng(len(str(path.name)) + size[0]).normal(0, 1, (*size, 2)).astype("f4")

    outcomes = evaluate_flows(reading.items, lambda pair: flow(pair.source), benchmark.criteria)
    wanted = published.tss(folder, flow, 0.05)
    found = totals(outcomes)
    assert found["pck"]["0.05"] == wanted["pck"]
    assert found["pck_per_image"]["0.05"] == pytest.approx(wanted["pck_per_image"], abs=1e-15)
    assert found["epe"][""] == pytest.approx(wanted["epe"], rel=1e-12)
    assert list(by_category(outcomes)) == ["FG3DCar", "JODS", "PASCAL"]
    assert 0.1 < wanted["pck"] < 0.9


@pytest.mark.parametrize(("split", "sequences"), [("test", 2), ("all", 3)])
def test_hpatches(tmp_path, split, sequences):
    folder = miniature.hpatches(tmp_path)
    reading = check_images(BENCHMARKS["hpatches"].read(folder, split))
    assert len(reading.items) == 5 * sequences
    rng = np.random.default_rng(0)
    estimates = {}
    for index, item in enumerate(reading.items):
        shift = np.eye(3)
        shift[:2, 2] = rng.normal(0, 0.02 + 0.04 * (index % 5), 2)
        estimates[item.name] = None if index == 3 else shift @ item.homography * rng.uniform(0.5, 2)
    outcomes = evaluate_homographies(reading.items, lambda pair: estimates[pair.name])
    found = totals(outcomes)["homography_accuracy"]
    for limit in (1, 3, 5):
        rights = []
        for item in reading.items:
            k = int(item.name[-1])
            size = (36 + k, 48)
            truth = np.loadtxt(folder / item.name.split("/")[0] / f"H_1_{k}")
            args = (truth, estimates[item.name], (37, 48), size, limit)
            rights.append(published.homography_accuracy(*args))
        assert found[str(limit)] == sum(rights) / len(rights)
    assert 0 < found["1"] < found["5"] < 1
    assert list(by_category(outcomes)) == ["illumination", "viewpoint"]


def test_davis(tmp_path):
    folder = miniature.davis(tmp_path)
    reading = check_images(BENCHMARKS["davis"].read(folder, "val"))
    rng = np.random.default_rng(0)
    labels = {}
    for video in reading.items:
        frames = [video.labels(0)]
        for t in range(1, len(video.frames)):
            moved = np.roll(video.labels(t), tuple(rng.integers(-2, 3, 2)), (0, 1))
            moved[rng.random(moved.shape) < 0.02 * t] = 0
            frames.append(moved)
        labels[video.name] = frames
    outcomes = evaluate_videos(reading.items, lambda video, first: labels[video.name][1:])
    found, wanted = totals(outcomes)["davis"], published.davis(folder, labels)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=1e-14), name
    assert 0.2 < found["F"] < 0.99
    perfect = evaluate_videos(reading.items, lambda v, first: [v.labels(t) for t in range(1, len(v.frames))])
    assert totals(perfect)["davis"]["J&F"] == 1.0
