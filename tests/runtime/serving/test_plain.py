"""Routes for curl, against a real server."""

from __future__ import annotations

import io

import numpy as np
import pytest
import requests
from PIL import Image

import ditf
from tests.runtime.serving.tiny import image


def encoded(pixels, format="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def noise(seed, height=50, width=70):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def model(demo_bundle):
    with ditf.load(demo_bundle) as one:
        yield one


@pytest.fixture
def post(server):
    def call(path, files, headers=None, **data):
        return requests.post(f"{server.url}{path}", files=files, data=data, headers=headers, timeout=20)

    return call


@pytest.fixture(scope="module")
def pair():
    return {"source": encoded(noise(1)), "target": encoded(noise(2, 60, 40))}


def test_matches(post, pair, model):
    answer = post("/match", pair, points=["3,5", "40.5,12 69,49"])
    assert answer.status_code == 200, answer.text
    found = answer.json()
    points = [[3, 5], [40.5, 12], [69, 49]]
    expected = model.match(model.features(noise(1)), model.features(noise(2, 60, 40)), points)
    assert found["points"] == points
    np.testing.assert_array_equal(np.float32(found["matches"]), expected.points)
    np.testing.assert_array_equal(np.float32(found["scores"]), expected.scores)
    assert (found["source_size"], found["target_size"]) == ([50, 70], [60, 40])


def test_a_method_and_a_bundle(post, tiny):
    files = {"source": encoded(image(1)), "target": encoded(image(2))}
    answer = post("/match", files, points="3,5", method="window", bundle="tiny")
    with ditf.load(tiny) as other:
        expected = other.match(other.features(image(1)), other.features(image(2)), [[3, 5]], "window")
    np.testing.assert_array_equal(np.float32(answer.json()["matches"]), expected.points)
    assert answer.json()["bundle"] == "tiny"


@pytest.mark.parametrize(
    ("query", "headers"), [("?format=png", {}), ("", {"Accept": "image/png,image/*;q=0.8"})]
)
@pytest.mark.parametrize(("path", "data"), [("/match", {"points": "3,5"}), ("/heat-map", {"point": "3,5"})])
def test_pictures(post, pair, path, data, query, headers):
    answer = post(path + query, pair, headers, **data)
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).size == (70 + 12 + 40, 60)


def test_a_heat_map_as_an_array(post, pair, model):
    answer = post("/heat-map?format=npy", pair, point="3,5")
    expected = model.heat_map(model.features(noise(1)), model.features(noise(2, 60, 40)), (3, 5))
    np.testing.assert_array_equal(np.load(io.BytesIO(answer.content)), expected)


def test_features(post, model):
    answer = post("/features", {"image": encoded(noise(1))})
    np.testing.assert_array_equal(np.load(io.BytesIO(answer.content)), model.features(noise(1)).array)
    assert answer.headers["x-image-size"] == "50x70"
    assert answer.headers["x-covered-cells"] == "12x12"


def test_bundles(server, demo_bundle):
    found = requests.get(f"{server.url}/bundles", timeout=10).json()["bundles"]
    assert [one["name"] for one in found] == [demo_bundle.name, "tiny"]
    assert found[0]["size"] == [96, 96]
    assert found[0]["batch"] == 1
    assert found[1]["batch"] == 0


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "BMP", "TIFF", "PPM"])
def test_formats(post, pair, format):
    assert post("/match", {**pair, "target": encoded(noise(2), format)}, points="1,1").status_code == 200


@pytest.mark.parametrize(
    ("changes", "data", "status", "message"),
    [
        ({"target": b""}, {}, 400, "target: the image is none of PNG"),
        ({"target": b"<svg/>"}, {}, 400, "target: the image is none of PNG"),
        ({"source": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, {}, 400, "none of PNG"),
        ({"source": encoded(noise(1))[:-100]}, {}, 400, "source: the image is not a readable image"),
        ({}, {"points": "70,5"}, 400, "point 70,5 is outside the source image of 70x50"),
        ({}, {"points": "-1,5"}, 400, "outside"),
        ({}, {"points": "nan,5"}, 400, "outside"),
        ({}, {"points": "inf,5"}, 400, "outside"),
        ({}, {"points": "1e400,5"}, 400, "outside"),
        ({}, {"points": "3"}, 400, "point '3' is not x,y"),
        ({}, {"points": "3,5," + "9" * 500}, 400, "is not x,y"),
        ({}, {"points": " ".join(["1,1"] * 5000)}, 413, "5,000 points"),
        ({}, {"points": None}, 422, "points: Field required"),
        ({"source": None}, {}, 422, "source: Field required"),
        ({}, {"method": "best"}, 422, "method: Input should be"),
        ({}, {"bundle": "../../etc/passwd"}, 404, "no bundle '../../etc/passwd' is served"),
        ({}, {"prompt": "a dog"}, 400, "knows no 'a dog'"),
    ],
)
def test_what_is_wrong_is_said(post, pair, changes, data, status, message):
    files = {name: value for name, value in {**pair, **changes}.items() if value is not None}
    fields = {name: value for name, value in {"points": "3,5", **data}.items() if value is not None}
    answer = post("/match", files, **fields)
    assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text


def test_a_file_that_is_text_and_a_form_that_is_none(server, pair):
    answer = requests.post(
        f"{server.url}/match", data={"source": "x", "target": "y", "points": "1,1"}, timeout=9
    )
    assert answer.status_code == 422
    for body, kind in (
        (b"{}", "application/json"),
        (b"--x", "multipart/form-data; boundary=y"),
        (b"", "multipart/form-data"),
        (b"\xff" * 99, "multipart/form-data; boundary=\xff"),
    ):
        answer = requests.post(f"{server.url}/match", data=body, headers={"Content-Type": kind}, timeout=9)
        assert answer.status_code in (400, 422)
        assert answer.json()["error"]


def test_a_decompression_bomb_is_refused_by_its_head(post, pair):
    """Below where Pillow warns, where it warns, and where it refuses; 14,000 x 14,000 are 24 kB of PNG."""
    for side in (6000, 10_000, 14_000):
        file = io.BytesIO()
        Image.new("1", (side, side)).save(file, "PNG")
        answer = post("/match", {**pair, "target": file.getvalue()}, points="1,1")
        assert answer.status_code == 413
        assert "more than 32,000,000" in answer.json()["error"]


def test_failures_of_the_engine_are_500_with_an_id(post, pair):
    answer = post(
        "/features", {"image": encoded(image(1, fails=True))}, {"X-Request-Id": "mine-1"}, bundle="tiny"
    )
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "mine-1"
    assert "mine-1" in answer.json()["error"]
    assert "/" not in answer.json()["error"]  # no path of this machine


def test_headers_of_every_answer(server):
    for path in ("/bundles", "/nothing", "/v2"):
        answer = requests.get(server.url + path, timeout=9)
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert len(answer.headers["x-request-id"]) == 32
    injected = requests.get(f"{server.url}/v2", headers={"X-Request-Id": "a b"}, timeout=9)
    assert len(injected.headers["x-request-id"]) == 32


def test_metrics(server, post, pair):
    assert post("/match", pair, points="3,5").status_code == 200
    text = requests.get(f"{server.url}/metrics", timeout=9).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['ditf_requests_total{endpoint="match",status="200"}']) >= 1
    assert float(values["ditf_cache_bytes"]) > 0
    assert float(values["ditf_requests_in_flight"]) == 0
    assert float(values["ditf_queue_depth"]) == 0
    for stage in ("read", "decode", "queue", "features", "match"):
        assert float(values[f'ditf_stage_seconds_count{{stage="{stage}"}}']) >= 1
    assert float(values["ditf_batch_images_count"]) >= 1


def test_paths_open_nothing(server):
    for path in (
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2fetc%2fpasswd",
        "//etc/passwd",
        "/v2/models/..%2f..%2fetc",
    ):
        answer = requests.get(server.url + path, timeout=9)
        assert answer.status_code == 404
