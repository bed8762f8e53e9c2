"""NVIDIA's unmodified client works with a server of the demo's bundle."""

from __future__ import annotations

import time

import numpy as np
import pytest
import requests
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

import ditf
from ditf.runtime.matching.points import match_points
from tests.runtime.serving.tiny import image, mean_colours

POINTS = np.array([[3, 5], [40.5, 60], [95, 95]], np.float32)


@pytest.fixture(scope="module")
def client(server):
    with triton.InferenceServerClient(server.address, concurrency=8, max_greenlets=8) as one:
        yield one


@pytest.fixture(scope="module")
def model(demo_bundle):
    with ditf.load(demo_bundle) as one:
        yield one


def tensor(name, array, binary=True):
    datatype = {"uint8": "UINT8", "int64": "INT64", "float16": "FP16", "float32": "FP32"}[array.dtype.name]
    one = triton.InferInput(name, list(array.shape), datatype)
    return one.set_data_from_numpy(array, binary_data=binary)


def correspond_inputs(source, target, points=POINTS, binary=True):
    return [
        tensor("source", source, binary),
        tensor("target", target, binary),
        tensor("points", points, binary),
    ]


def test_health_and_metadata(client, demo_bundle):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("features")
    assert client.is_model_ready("tiny.match", "1")
    assert not client.is_model_ready("features", "2")
    assert not client.is_model_ready("nothing")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data", "parameters"]
    assert client.get_model_metadata("features") == {
        "name": "features",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, 96, 96, 3]}],
        "outputs": [{"name": "features", "datatype": "FP16", "shape": [-1, 128, 12, 12]}],
    }
    named = client.get_model_metadata(f"{demo_bundle.name}.correspond", "1")
    assert [one["name"] for one in named["inputs"]] == ["source", "target", "points"]
    assert [one["shape"] for one in named["outputs"]] == [[-1, 2], [-1]]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_features_are_the_graphs_own(client, model, binary_in, binary_out):
    pixels = np.stack([image(1), image(2)])
    outputs = [triton.InferRequestedOutput("features", binary_data=binary_out)]
    answer = client.infer("features", [tensor("image", pixels, binary_in)], outputs=outputs, request_id="a-7")
    assert answer.get_response()["id"] == "a-7"
    found = answer.as_numpy("features")
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, np.concatenate([model.run(one[None]) for one in pixels]))


@pytest.mark.parametrize("method", ["argmax", "window", "kernel"])
def test_correspond_is_the_runtimes(client, model, method):
    source = np.random.default_rng(3).integers(0, 256, (50, 70, 3), np.uint8)
    target = np.random.default_rng(4).integers(0, 256, (40, 90, 3), np.uint8)
    points = np.array([[0, 0], [69, 49], [12.5, 30]], np.float32)
    answer = client.infer(
        "correspond", correspond_inputs(source, target, points), parameters={"method": method}
    )
    expected = model.match(model.features(source), model.features(target), points, method)
    np.testing.assert_array_equal(answer.as_numpy("matches"), expected.points)
    np.testing.assert_array_equal(answer.as_numpy("scores"), expected.scores)


@pytest.mark.parametrize("binary", [True, False])
def test_match_of_two_maps(client, model, binary):
    source, target = model.features(image(5)), model.features(image(6))
    inputs = [
        tensor("source", source.array, binary),
        tensor("target", target.array, binary),
        tensor("source_size", np.array([96, 96]), binary),
        tensor("target_size", np.array([96, 96]), binary),
        tensor("points", POINTS, binary),
    ]
    answer = client.infer("match", inputs)
    expected = match_points(source, target, POINTS)
    np.testing.assert_array_equal(answer.as_numpy("matches"), expected.points)
    np.testing.assert_array_equal(answer.as_numpy("scores"), expected.scores)


def test_no_points(client):
    answer = client.infer("correspond", correspond_inputs(image(1), image(2), np.zeros((0, 2), np.float32)))
    assert answer.get_response()["outputs"][0]["shape"] == [0, 2]


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_compressed(client, compression):
    answer = client.infer(
        "tiny.features",
        [tensor("image", image(7)[None])],
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    np.testing.assert_allclose(answer.as_numpy("features")[0], mean_colours(image(7)), rtol=1e-5)


def test_a_raw_binary_request(server):
    """With Inference-Header-Content-Length 0 the body is the bytes of the only input."""
    pixels = np.stack([image(8), image(9)])
    answer = requests.post(
        f"{server.url}/v2/models/tiny.features/infer",
        data=pixels.tobytes(),
        headers={"Inference-Header-Content-Length": "0"},
        timeout=10,
    )
    assert answer.status_code == 200, answer.text
    result = triton.InferenceServerClient.parse_response_body(
        answer.content, header_length=int(answer.headers["Inference-Header-Content-Length"])
    )
    np.testing.assert_allclose(result.as_numpy("features")[1], mean_colours(image(9)), rtol=1e-5)


def test_concurrent_calls_get_their_own_answers(client):
    calls = [client.async_infer("tiny.features", [tensor("image", image(seed)[None])]) for seed in range(32)]
    for seed, call in enumerate(calls):
        found = call.get_result().as_numpy("features")[0]
        np.testing.assert_allclose(found, mean_colours(image(seed)), rtol=1e-5)


def test_a_failed_engine_call_fails_its_request_alone(client):
    calls = [
        client.async_infer("tiny.features", [tensor("image", image(seed, fails=seed == 3)[None])])
        for seed in range(100, 108)
    ] + [client.async_infer("tiny.features", [tensor("image", image(99, fails=True)[None])])]
    for seed, call in enumerate(calls[:-1], 100):
        found = call.get_result().as_numpy("features")[0]
        np.testing.assert_allclose(found, mean_colours(image(seed)), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("nothing", lambda: [], "no model 'nothing' is served"),
        ("features", lambda: [tensor("picture", image(1)[None])], "features has no input 'picture'"),
        ("features", lambda: [tensor("image", np.zeros((1, 96, 96, 3), np.float32))], "image is UINT8"),
        ("features", lambda: [tensor("image", image(1))], "image has the shape"),
        ("features", lambda: [tensor("image", image(1)[None, :50])], "image has the shape"),
        ("features", lambda: [tensor("image", image(1)[None][:0])], "no images"),
        ("correspond", lambda: correspond_inputs(image(1), image(2))[:2], "points is missing"),
        ("correspond", lambda: correspond_inputs(image(1), image(2), POINTS * 2), "outside the source image"),
        ("correspond", lambda: correspond_inputs(image(1), image(2), POINTS * np.nan), "outside the source"),
        ("correspond", lambda: correspond_inputs(image(1)[:0], image(2)), "image array must be RGB"),
        (
            "correspond",
            lambda: correspond_inputs(image(1), image(2), np.zeros((5000, 2), np.float32)),
            "5,000 points are more than 4,096",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(client, name, inputs, message):
    with pytest.raises(InferenceServerException, match=message) as caught:
        client.infer(name, inputs())
    assert caught.value.status() in ("400", "404", "413")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"method": "best"}, "unknown method 'best'"),
        ({"method": 3}, "method is not a string"),
        ({"prompt": "a dog"}, "knows no 'a dog'"),
        ({"metod": "argmax"}, "takes no parameter 'metod'"),
    ],
)
def test_wrong_parameters(client, parameters, message):
    with pytest.raises(InferenceServerException, match=message):
        client.infer("correspond", correspond_inputs(image(1), image(2)), parameters=parameters)


def test_a_timeout_of_the_client(client, server):
    """A request that waits for longer than Triton's timeout, in microseconds, is not run."""
    slow = client.async_infer("tiny.features", [tensor("image", image(1, loops=250)[None])])
    while not server.service.worker.running:
        time.sleep(0.001)
    with pytest.raises(InferenceServerException, match="waited past its deadline") as caught:
        client.infer("tiny.features", [tensor("image", image(55)[None])], timeout=20_000)
    assert caught.value.status() == "504"
    slow.get_result()
