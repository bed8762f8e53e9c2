from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ditf
from ditf.calib.images import golden_pair, procedural_images
from ditf.runtime.bundles.bundle import NOISE
from ditf.runtime.errors import BundleError, InputError, MissingComponent
from ditf.runtime.images import fit_image
from ditf.runtime.matching.mutual import mutual_matches
from ditf.runtime.matching.points import match_points
from ditf.runtime.model import _crop
from tests.runtime.published import ROUNDING, accepted, cosines, upsample

SMALL = (90, 120)
POINTS = [(10.0, 20.0), (50.5, 40.25)]


@pytest.fixture(scope="module")
def model(demo_bundle) -> Iterator[ditf.Model]:
    """A float16 bundle with a static batch of 1, 96x96."""
    with ditf.load(demo_bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def batched(demo_bundle_float32) -> Iterator[ditf.Model]:
    """A float32 bundle with a static batch of 3, 96x96."""
    with ditf.load(demo_bundle_float32) as opened:
        yield opened


@pytest.fixture(scope="module")
def dynamic(pixart_bundle) -> Iterator[ditf.Model]:
    """A float16 bundle with a dynamic batch and noise as an input, 48x80."""
    with ditf.load(pixart_bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def padded(pixart_bundle) -> Iterator[ditf.Model]:
    """The same bundle, with padded images."""
    with ditf.load(pixart_bundle, fit="pad") as opened:
        yield opened


@pytest.fixture(scope="module")
def pair() -> np.ndarray:
    return golden_pair(SMALL)


@pytest.fixture(scope="module")
def features(dynamic, pair) -> ditf.FeatureMap:
    """The features of the first image of the pair."""
    return dynamic.features(pair[0])


def points_in(size: tuple[int, int], count: int = 25) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 1, (count, 2)) * (size[1] - 1, size[0] - 1)


def assert_published(matches: ditf.Matches, expected: np.ndarray, width: int) -> None:
    index = (matches.points[:, 1] * width + matches.points[:, 0]).astype(int)
    for chosen, scores in zip(index, expected, strict=True):
        assert chosen in accepted(scores)
    np.testing.assert_allclose(matches.scores, expected.max(axis=1), rtol=0, atol=2 * ROUNDING)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    difference = actual.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def test_says_what_runs(model, demo_bundle):
    assert model.backend == "onnxruntime"
    assert model.reason == "auto; no tensorrt engine in the bundle; no tensorrt-rtx engine in the bundle"
    assert "onnxruntime" in model.detail
    assert model.bundle.path == demo_bundle
    assert model.manifest.layer == 9


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"backend": "none"}, InputError),
        ({"backend": "tensorrt"}, MissingComponent),
        ({"fit": "crop"}, InputError),
        ({"fit": ""}, InputError),
    ],
)
def test_wrong_options(demo_bundle, options, error):
    with pytest.raises(error):
        ditf.load(demo_bundle, **options)


def test_no_bundle(tmp_path):
    with pytest.raises(BundleError):
        ditf.load(tmp_path)
    with pytest.raises(InputError):
        ditf.load(str(tmp_path / "none"))


def test_path_image_and_array_agree(dynamic, features, pair, tmp_path):
    path = tmp_path / "left.png"
    image = Image.fromarray(pair[0])
    image.save(path)
    for source in (path, str(path), image, pair[0]):
        again = dynamic.features(source)
        np.testing.assert_array_equal(again.array, features.array)
        assert again.image_size == SMALL


def test_features_are_as_the_manifest_says(model, pair):
    features = model.features(pair[0])
    assert features.array.dtype == np.float16
    assert features.array.shape == (128, 12, 12)
    assert features.image_size == SMALL
    assert features.cells == (12, 12)


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (48, 80), (500, 41)])
@pytest.mark.parametrize("name", ["dynamic", "padded"])
def test_images_of_any_size(request, name, size):
    opened = request.getfixturevalue(name)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    features = opened.features(image)
    assert features.image_size == size
    matches = opened.match(features, features, [[size[1] - 1, size[0] - 1]])
    assert (matches.points >= 0).all()
    assert (matches.points <= (size[1] - 1, size[0] - 1)).all()


@pytest.fixture(scope="module")
def alone(batched) -> list[np.ndarray]:
    """The features of four images, each of which fills a batch by itself."""
    return [batched.features(image).array for image in procedural_images(SMALL, 4)]


@pytest.mark.parametrize("count", [1, 3, 4])
def test_static_batch_is_filled_up(batched, alone, count):
    together = batched.features_of(procedural_images(SMALL, 4)[:count])
    assert len(together) == count
    for actual, expected in zip(together, alone, strict=False):
        assert actual.array.dtype == np.float32
        assert relative_error(actual.array, expected) < 1e-5  # float32: another place in the batch


@pytest.mark.parametrize("count", [1, 2, 5])
def test_dynamic_batch(dynamic, count):
    images = procedural_images(SMALL, count)
    together = dynamic.features_of(images)
    assert len(together) == count
    for actual, image in zip(together, images, strict=True):
        expected = dynamic.features(image).array
        assert actual.array.dtype == np.float16
        assert actual.array.shape == (48, 6, 10)
        # float16 inside: another batch may be summed in another order; a wrong image is at 0.1 and more.
        assert relative_error(actual.array, expected) < 2e-3


def test_images_of_a_batch_keep_their_sizes(dynamic):
    sizes = [(20, 30), (64, 64), (41, 7), (256, 256)]
    images = [np.full((*size, 3), 40 * index, np.uint8) for index, size in enumerate(sizes)]
    assert [features.image_size for features in dynamic.features_of(images)] == sizes


@pytest.mark.parametrize("name", ["model", "batched", "dynamic"])
def test_no_images(request, name):
    assert request.getfixturevalue(name).features_of([]) == []


def test_bad_image_is_refused(model, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    for source in (tmp_path / "bad.png", tmp_path / "none.png", np.zeros((4, 4), np.uint8)):
        with pytest.raises(InputError):
            model.features(source)


def test_own_noise_is_the_default(dynamic, pixart_bundle, pair):
    noise = np.load(pixart_bundle / NOISE)
    expected = dynamic.features(pair[0]).array
    np.testing.assert_array_equal(dynamic.features(pair[0], noise=noise).array, expected)
    np.testing.assert_array_equal(dynamic.features_of([pair[0]], noise)[0].array, expected)


def test_other_noise_changes_the_features(dynamic, pair):
    expected = dynamic.features(pair[0]).array
    noise = np.random.default_rng(1).standard_normal((3, 4, 12, 20)).astype(np.float32)
    other = dynamic.features(pair[0], noise=noise).array
    assert relative_error(other, expected) > 0.01


@pytest.mark.parametrize(
    "noise",
    [
        np.zeros((1, 4, 12, 20), np.float32),
        np.zeros((3, 4, 20, 12), np.float32),
        np.zeros((4, 12, 20), np.float32),
        np.zeros((3, 4, 12, 20), np.float64),
        np.zeros((3, 4, 12, 20), np.float16),
    ],
    ids=lambda noise: f"{noise.dtype}{list(noise.shape)}",
)
def test_wrong_noise_is_refused(dynamic, pair, noise):
    with pytest.raises(InputError, match=r"noise must be float32 \[3, 4, 12, 20\]"):
        dynamic.features(pair[0], noise=noise)


def test_noise_that_is_not_finite_is_refused(dynamic, pair):
    with pytest.raises(InputError, match="NaN or infinity"):
        dynamic.features(pair[0], noise=np.full((3, 4, 12, 20), np.nan, np.float32))


def test_baked_noise_cannot_be_replaced(model, pair):
    with pytest.raises(InputError, match="baked in") as caught:
        model.features(pair[0], noise=np.zeros((1, 3, 96, 96), np.float32))
    assert "--noise input" in caught.value.fix


@pytest.mark.parametrize(
    ("size", "shape", "extent"),
    [
        ((48, 80), (6, 10), (6, 10)),
        ((96, 160), (6, 10), (6, 10)),
        ((60, 50), (6, 5), (6, 5)),
        ((20, 100), (2, 10), (2, 10)),
        ((50, 100), (5, 10), (5, 10)),
        ((90, 120), (6, 8), (6, 8)),
        ((100, 110), (6, 7), (6, 53 / 8)),  # 53 of 80 columns: the last cell is covered in part
    ],
)
def test_pad_crops_the_features(padded, size, shape, extent):
    image = golden_pair(size)[0]
    features = padded.features(image)
    assert features.image_size == size
    assert features.array.shape == (48, *shape)
    assert features.cells == pytest.approx(extent, abs=1e-9)
    pixels, _ = fit_image(Image.fromarray(image), (48, 80), "pad")
    whole = padded.run(pixels[None])[0]
    np.testing.assert_array_equal(features.array, whole[:, : shape[0], : shape[1]])


@pytest.mark.parametrize("cell", [8, 16])
def test_cells_of_padding_alone_are_cropped(cell):
    # Whatever the size of the engine: 56 rows of 200 are 7 cells of 8 px, and not one more.
    wrong = []
    for side in range(cell, 1025, cell):
        array = np.zeros((1, side // cell, 1), np.float32)
        for rows in range(cell, side + 1, cell):
            features = _crop(array, (rows, 1), (side, 1), (100, 100))
            if features.array.shape[1] != math.ceil(rows / cell):
                wrong.append((side, rows, features.array.shape[1]))
    assert not wrong, f"{len(wrong)} (engine size, image rows, cells): {wrong[:3]}"


@pytest.mark.parametrize("name", ["model", "batched", "dynamic", "padded"])
def test_match_is_the_published_protocol(request, name, pair):
    opened = request.getfixturevalue(name)
    source, target = opened.features_of(pair)
    points = points_in(SMALL)
    assert_published(opened.match(source, target, points), cosines(source, target, points), SMALL[1])


@pytest.mark.parametrize("name", ["model", "batched", "dynamic", "padded"])
def test_match_graph_is_the_published_protocol(request, name, pair):
    opened = request.getfixturevalue(name)
    source, target = opened.features_of([pair[0], pair[1][:61, :97]])
    points = points_in(SMALL)
    matches = opened.match_with_graph(source, target, points)
    assert_published(matches, cosines(source, target, points), 97)
    assert matches.points.dtype == matches.scores.dtype == np.float32


@pytest.mark.parametrize("engine", ["match", "match_with_graph"])
def test_matching_without_points(dynamic, features, engine):
    matches = getattr(dynamic, engine)(features, features, [])
    assert matches.points.shape == (0, 2)
    assert matches.scores.shape == (0,)


@pytest.mark.parametrize("engine", ["match", "match_with_graph"])
@pytest.mark.parametrize("points", [[[120, 0]], [[0, np.nan]], [1, 2], "left"])
def test_bad_points_are_refused(dynamic, features, engine, points):
    with pytest.raises(InputError, match="point"):
        getattr(dynamic, engine)(features, features, points)


@pytest.mark.parametrize("engine", ["match", "match_with_graph"])
def test_maps_of_another_bundle_are_refused(model, dynamic, features, engine):
    other = ditf.FeatureMap(np.ones((128, 12, 12), np.float16), SMALL)  # as `model` makes them
    with pytest.raises(InputError, match="same bundle"):
        getattr(model, engine)(other, features, [[1, 1]])
    with pytest.raises(InputError, match="same bundle"):
        getattr(dynamic, engine)(other, features, [[1, 1]])


@pytest.mark.parametrize("name", ["model", "dynamic", "padded"])
def test_same_image_matches_itself(request, name, pair):
    opened = request.getfixturevalue(name)
    features = opened.features(pair[0])
    points = np.round(points_in(SMALL, 60))
    matches = opened.match(features, features, points)
    np.testing.assert_allclose(matches.scores, 1.0, rtol=0, atol=1e-6)
    # To the pixel but where features repeat (borders): then the two directions are all but the same.
    up = upsample(features).numpy()
    up /= np.linalg.norm(up, axis=0)
    x, y = points.astype(int).T
    mx, my = matches.points.astype(int).T
    # sqrt(2 * TIE_TOLERANCE) = 1.4e-3 apart at the most, and rounding.
    assert (np.linalg.norm(up[:, y, x] - up[:, my, mx], axis=0) < 2e-3).all()
    assert (matches.points == points).all(axis=1).mean() > 0.5


def test_closed_model_raises(pixart_bundle, pair):
    with ditf.load(pixart_bundle) as opened:
        features = opened.features(pair[0])
        opened.match_with_graph(features, features, [[1, 1]])
    with pytest.raises(RuntimeError, match="closed"):
        opened.features(pair[0])
    with pytest.raises(RuntimeError, match="closed"):
        opened.match_with_graph(features, features, [[1, 1]])
    opened.close()  # twice does no harm


def test_closed_model_does_not_open_the_match_graph(pixart_bundle, features):
    with ditf.load(pixart_bundle) as opened:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        opened.match_with_graph(features, features, [[1, 1]])


def test_threads_share_a_model(pixart_bundle, tmp_path):
    paths: list[Path] = []
    for index, image in enumerate(procedural_images(SMALL, 4)):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(image).save(paths[-1])

    def answer(opened: ditf.Model, path: Path) -> tuple[np.ndarray, np.ndarray]:
        features = opened.features(path)
        return features.array, opened.match_with_graph(features, features, [[5, 6], [70, 50]]).points

    with ditf.load(pixart_bundle) as opened:
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda path: answer(opened, path), paths * 2))
        for path, (array, points) in zip(paths * 2, together, strict=True):
            expected_array, expected_points = answer(opened, path)
            np.testing.assert_array_equal(array, expected_array)
            np.testing.assert_array_equal(points, expected_points)


def test_every_way_to_match_is_the_library_s(model, pair):
    source, target = (model.features(image) for image in pair)
    matching = (
        model.match(source, target, POINTS, "window", 5, 0.1),
        model.match(source, target, POINTS, "kernel"),
    )
    expected = (
        match_points(source, target, POINTS, "window", window=5, temperature=0.1),
        match_points(source, target, POINTS, "kernel"),
    )
    for got, wanted in zip(matching, expected, strict=True):
        np.testing.assert_array_equal(got.points, wanted.points)
    mutual, wanted = model.mutual(source, target, 20, 0.9, 2), mutual_matches(source, target, 20, 0.9, 2)
    np.testing.assert_array_equal(mutual.points, wanted.points)
    assert model.flow(source, target, "window").field.shape == (*SMALL, 2)
    assert model.heat_map(source, target, POINTS[0]).shape == SMALL
    with pytest.raises(InputError, match="unknown method"):
        model.match(source, target, POINTS, "soft")
