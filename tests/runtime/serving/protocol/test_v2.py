"""What NVIDIA's client writes is read back, and contradictory messages are refused."""

from __future__ import annotations

import gzip
import json
import zlib

import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ditf.runtime.errors import InputError
from ditf.runtime.serving.errors import TooLarge
from ditf.runtime.serving.protocol.contract import ModelSpec, TensorSpec
from ditf.runtime.serving.protocol.v2 import NUMPY_TYPES, encode_response, inflate, parse_request

LIMIT = 1 << 20

DATATYPES = st.sampled_from(sorted(NUMPY_TYPES))


def any_array(datatype):
    dtype = np.dtype(NUMPY_TYPES[datatype])
    shapes = arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4)
    finite = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else {}
    return arrays.arrays(dtype, shapes, elements=arrays.from_dtype(dtype, **finite))


one_tensor = DATATYPES.flatmap(lambda name: st.tuples(st.just(name), any_array(name), st.booleans()))
tensors = st.lists(one_tensor, min_size=1, max_size=3)


def model_of(given_tensors):
    specs = tuple(
        TensorSpec(f"t{index}", datatype, (-1,) * array.ndim)
        for index, (datatype, array, _) in enumerate(given_tensors)
    )
    return ModelSpec("model", specs, specs, ("method",))


def written(given_tensors):
    inputs = []
    for index, (datatype, array, binary) in enumerate(given_tensors):
        one = triton.InferInput(f"t{index}", list(array.shape), datatype)
        inputs.append(one.set_data_from_numpy(array, binary_data=binary))
    return triton.InferenceServerClient.generate_request_body(inputs)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tensors)
def test_what_the_client_writes_is_read_and_what_is_written_it_reads(given_tensors):
    body, header = written(given_tensors)
    model = model_of(given_tensors)
    request = parse_request(body, None if header is None else str(header), model, LIMIT)
    for index, (_, array, _) in enumerate(given_tensors):
        assert request.inputs[f"t{index}"].dtype == array.dtype
        np.testing.assert_array_equal(request.inputs[f"t{index}"], array)
    content, header = encode_response("model", "1", request, request.inputs)
    answer = triton.InferenceServerClient.parse_response_body(content, header_length=header)
    for index, (_, array, _) in enumerate(given_tensors):
        np.testing.assert_array_equal(answer.as_numpy(f"t{index}"), array)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(tensors, st.data())
def test_a_damaged_request_is_refused_or_read_never_a_crash(given_tensors, data):
    body, header = written(given_tensors)
    model = model_of(given_tensors)
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    length = data.draw(
        st.sampled_from([None, header and str(header), "0", "-1", "1e3", "99999999999999999999"])
    )
    try:
        request = parse_request(bytes(damaged), length, model, LIMIT)
    except InputError:
        return
    for spec in model.inputs:
        assert request.inputs[spec.name].dtype == np.dtype(NUMPY_TYPES[spec.datatype])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["name", "shape", "datatype", "data", "parameters", "inputs", "outputs", "id",
                         "binary_data_size", "binary_data", "t0", "FP32"]), inner, max_size=5),
    max_leaves=20,
)  # fmt: skip
POINTS = ModelSpec(
    "model", (TensorSpec("t0", "FP32", (-1, 2)),), (TensorSpec("out", "FP32", (-1,)),), ("method",)
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(json_values, json_values)
def test_any_json_is_refused_or_read(value, entry):
    for document in (value, {"inputs": [value, entry]}, {"inputs": [{"name": "t0", "datatype": "FP32",
                     "shape": value, "data": entry}], "outputs": value, "parameters": entry}):  # fmt: skip
        with pytest.raises(InputError):
            parse_request(json.dumps(document).encode(), None, POINTS, LIMIT)


def request_of(**changes):
    entry = {"name": "t0", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}
    whole = {name: value for name, value in {**entry, **changes}.items() if value is not None}
    return {"inputs": [whole]}


@pytest.mark.parametrize(
    ("document", "binary", "message"),
    [
        (request_of(data=None, parameters={"binary_data_size": 8}), b"12345678", None),
        (request_of(data=[[1, 2.5]]), b"", None),
        (request_of(data=[1, 2, 3]), b"", "its data"),
        (request_of(data=[[1], [2]]), b"", "its data"),
        (request_of(data=[True, False]), b"", "not an array of numbers"),
        (request_of(data=["1", "2"]), b"", "not an array of numbers"),
        (request_of(data=[[1], 2]), b"", "in other lists"),
        (request_of(data=None), b"", "needs data or binary_data_size"),
        (request_of(parameters={"binary_data_size": 8}), b"12345678", "one of the two"),
        (request_of(data=None, parameters={"binary_data_size": 12}), b"x" * 12, "has 8 bytes, not the 12"),
        (request_of(data=None, parameters={"binary_data_size": 8}), b"1234567", "of which 7 arrived"),
        (request_of(data=None, parameters={"binary_data_size": 8}), b"123456789", "1 bytes follow"),
        (request_of(data=None, parameters={"binary_data_size": -8}), b"", "not a number of bytes"),
        (request_of(data=None, parameters={"binary_data_size": 8.0}), b"12345678", "not a number of bytes"),
        (
            request_of(shape=[2**40, 2], data=None, parameters={"binary_data_size": 8}),
            b"12345678",
            "not the 8",
        ),
        (request_of(shape=[-1, 2]), b"", "has the shape"),
        (request_of(shape=[1, 3]), b"", "has the shape"),
        (request_of(shape=[1, True]), b"", "has the shape"),
        (request_of(shape="[1, 2]"), b"", "has the shape"),
        (request_of(datatype="BYTES"), b"", "t0 is FP32"),
        (request_of(datatype=None), b"", "t0 is FP32"),
        (request_of(parameters={"shared_memory_region": "r"}), b"", "not supported"),
        ({"inputs": request_of()["inputs"] * 2}, b"", "given twice"),
        ({"inputs": []}, b"", "not a list of tensors"),
        ({**request_of(), "outputs": [{"name": "other"}]}, b"", "no output 'other'"),
        ({**request_of(), "outputs": [{"name": "out"}] * 2}, b"", "asked for twice"),
        ({**request_of(), "id": 7}, b"", "id is not a string"),
        ({**request_of(), "parameters": {"timeout": "soon"}}, b"", "microseconds"),
        ({**request_of(), "parameters": {"binary_data_output": 1}}, b"", "not true or false"),
        ({**request_of(), "parameters": {"priority": 1, "sequence_id": 3}}, b"", None),
    ],
)
def test_what_lies_is_refused(document, binary, message):
    head = json.dumps(document).encode()
    if message is None:
        parse_request(head + binary, str(len(head)), POINTS, LIMIT)
    else:
        with pytest.raises(InputError, match=message):
            parse_request(head + binary, str(len(head)), POINTS, LIMIT)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{",
        b"[" * 100_000,
        b'{"inputs": NaN}',
        b"1" * 5000,
        b'{"id": "\\ud800"',
    ],
)
def test_not_json(body):
    with pytest.raises(InputError):
        parse_request(body, None, POINTS, LIMIT)


def test_json_has_its_own_limit():
    with pytest.raises(TooLarge):
        parse_request(b" " * 101, None, POINTS, 100)


@pytest.mark.parametrize("bad", [[256], [-1], [2**70], [1.0]])
def test_integers_fit(bad):
    model = ModelSpec("model", (TensorSpec("t0", "UINT8", (-1,)),), (), ())
    document = {"inputs": [{"name": "t0", "shape": [1], "datatype": "UINT8", "data": bad}]}
    with pytest.raises(InputError):
        parse_request(json.dumps(document).encode(), None, model, LIMIT)


def test_a_large_answer_is_not_json():
    request = parse_request(json.dumps(request_of()).encode(), None, POINTS, LIMIT)
    with pytest.raises(InputError, match="ask for binary_data"):
        encode_response("model", "1", request, {"out": np.zeros((1 << 22) + 1, np.float32)})


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.binary(max_size=2000))
def test_inflate(body):
    assert inflate(gzip.compress(body), "gzip", 2000) == body
    assert inflate(zlib.compress(body), "deflate", 2000) == body
    assert inflate(body, "identity", 0) == body


@pytest.mark.parametrize(
    ("body", "encoding", "error"),
    [
        (gzip.compress(bytes(1 << 20), mtime=0), "gzip", TooLarge),  # a bomb: 1 MiB in 1 kB
        (b"plain", "gzip", InputError),
        (gzip.compress(b"text", mtime=0)[:-1], "gzip", InputError),
        (gzip.compress(b"text", mtime=0) + b"more", "gzip", InputError),
        (zlib.compress(b"text"), "br", InputError),
    ],
)
def test_inflate_refuses(body, encoding, error):
    with pytest.raises(error):
        inflate(body, encoding, 1000)


@pytest.mark.parametrize(
    "body", [b'{"inputs":[' + b"{}," * 400_000 + b"{}]}", b'{"id": "' + b"a" * 1_100_000 + b'"}']
)
def test_json_beside_the_numbers_is_bounded(body):
    model = ModelSpec("model", (TensorSpec("t0", "FP32", (-1,)),), (), ())
    with pytest.raises(TooLarge, match="beside the tensors' numbers"):
        parse_request(body, None, model, 1 << 24)
