"""Reading numbers piece by piece gives the same as the json module for every JSON document."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest

from ditf.runtime.errors import InputError
from ditf.runtime.serving.protocol.json_numbers import cut_data, read_numbers, write_numbers

FLOAT, BYTE = np.dtype("f4"), np.dtype("u1")


def read(text, shape, dtype=FLOAT):
    body = b'{"name": "x", "data" : ' + text.encode() + b"}"
    rest, texts = cut_data(body, len(body))
    return read_numbers(json.loads(rest)["data"], texts, "x", shape, dtype)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 3), (1, 2, 3, 2), (40, 50, 30), (0,), (2, 0), (0, 2)])
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("indent", [None, 1])
def test_nested_and_flat_lists(shape, flat, indent):
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    text = json.dumps((array.ravel() if flat else array).tolist(), indent=indent)
    np.testing.assert_array_equal(read(text, shape), array)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("[1,,2]", (3,)),
        ("[1,2,]", (3,)),
        ("[,1,2]", (3,)),
        ("[1 2,3]", (2,)),
        ("[1,2]]", (2,)),
        ("[[1,2]", (2,)),
        ("[1[],[2]]", (2, 1)),
        ("[[]1,[2]]", (2, 1)),
        ("[[1,2],[3]]", (3,)),
        ("[[1,2],[3]]", (2, 2)),
        ("[[1],[2]]", (1, 2)),
        ("[]", (1,)),
        ("[[],[],[]]", (3,)),
        ("[1,2]", (3,)),
        ("[1-2]", (1,)),
        ("[01]", (1,)),
        ("[1e]", (1,)),
        ("[.5]", (1,)),
        ("[+5]", (1,)),
        ("[" + "9" * 100_000 + "]", (1,)),
        ("[null]", (1,)),
        ('["1"]', (1,)),
        ("[{}]", (1,)),
        ('"1"', (1,)),
        ("{}", (1,)),
        ("[1]", (1 << 40,)),
    ],
)
def test_what_is_no_array_of_this_shape(text, shape):
    with pytest.raises((InputError, json.JSONDecodeError)):
        read(text, shape)


@pytest.mark.parametrize("text", ["[256]", "[-1]", "[1.0]", "[1e2]", "[99999999999999999999999]"])
def test_integers(text):
    assert read("[255]", (1,), BYTE) == 255
    with pytest.raises(InputError):
        read(text, (1,), BYTE)


def test_only_the_values_of_data_are_cut_out():
    document = {"id": 'a "data": [1, 2]', '"data': [3], "data": [4], "shape": [5]}
    body = json.dumps(document).encode() + b"[6]"
    rest, texts = cut_data(body, len(body) - 3)
    kept = json.loads(rest)
    assert (kept["id"], kept["shape"]) == (document["id"], [5])
    assert texts[kept["data"]] == b"[4]"


def test_more_data_than_any_model_has():
    body = b'"data":[],' * 100
    with pytest.raises(InputError, match="more than 64 tensors"):
        cut_data(body, len(body))


@pytest.mark.parametrize("count", [0, 1, 4096, 10_000])
def test_writing(count):
    array = np.random.default_rng(0).standard_normal(count).astype(np.float32)
    assert json.loads(write_numbers(array)) == array.tolist()


@pytest.mark.parametrize(
    "shape", [(0, 1 << 27, 3), (0, 1 << 40, 3), (1 << 62, 0), (0, 1 << 62), (2, 1 << 40, 0)]
)
def test_a_shape_without_numbers_costs_nothing(shape):
    """A 0 in a shape makes the number of elements 0, however many lists it describes."""
    tracemalloc.start()
    with pytest.raises(InputError, match="has the shape"):
        read_numbers([[]], {}, "points", shape, np.dtype(np.float32))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
