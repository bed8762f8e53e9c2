"""Small plans for sessions on the stand-in of tests/standin, registered there without a builder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from ditf.runtime.backends.engine_session import EngineSession
from ditf.runtime.backends.flavour import load_flavour
from tests.standin import registry

RTX = "tensorrt-rtx"
FULL = "tensorrt"
LIBRARIES = [(RTX, None), (FULL, "11.4.0.106"), (FULL, "10.3.0")]
"""(backend, version of full TensorRT that is installed)."""

FLAGS = ("REQUIRE_USER_ALLOCATION",)
Profiles = list[dict[str, list[list[int]]]]


def features_plan(batches: tuple[tuple[int, int], ...] = (), flags: tuple[str, ...] = FLAGS) -> bytes:
    """A plan that doubles an image; of batch 1, or with one profile for each range of batches."""
    shape = ["n" if batches else 1, 4, 6, 3]
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["float", "float"], ["features"]),
    ]
    inputs = [helper.make_tensor_value_info("image", TensorProto.UINT8, shape)]
    outputs = [helper.make_tensor_value_info("features", TensorProto.FLOAT, shape)]
    profiles = [{"image": [[low, 4, 6, 3], [low, 4, 6, 3], [high, 4, 6, 3]]} for low, high in batches]
    graph = helper.make_graph(nodes, "features", inputs, outputs)
    return registered(_model(graph), profiles, flags)


def match_plan() -> bytes:
    """A plan of `rows` [h, 5] times `columns` [w, 5], transposed: two dynamic sizes from 1 to 64."""
    nodes = [
        helper.make_node("Transpose", ["columns"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["rows", "turned"], ["scores"]),
    ]
    inputs = [
        helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["h", 5]),
        helper.make_tensor_value_info("columns", TensorProto.FLOAT, ["w", 5]),
    ]
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["h", "w"])]
    sizes = [[1, 5], [8, 5], [64, 5]]
    graph = helper.make_graph(nodes, "match", inputs, outputs)
    return registered(_model(graph), [{"rows": sizes, "columns": sizes}])


def _model(graph: Any) -> bytes:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content


def registered(model: bytes, profiles: Profiles, flags: tuple[str, ...] = FLAGS) -> bytes:
    """The bytes of a plan that the stand-in runs as this graph."""
    plan = b"a plan of the stand-in: " + repr((profiles, flags)).encode() + model
    registry.record(plan, model, registry.Built(profiles, "", list(flags), "1.7.1.116"))
    return plan


def open_plan(plan: bytes, library: str = RTX, kernels: Path | None = None, **options: Any) -> EngineSession:
    return EngineSession(load_flavour(library), Path("a.plan"), plan, "stand-in", None, kernels, **options)


@contextmanager
def opened(
    plan: bytes, library: str = RTX, kernels: Path | None = None, **options: Any
) -> Iterator[EngineSession]:
    """A session of a plan, closed at the end of the block."""
    session = open_plan(plan, library, kernels, **options)
    try:
        yield session
    finally:
        session.close()


def double(session: EngineSession, seed: int = 0, batch: int = 1) -> None:
    """Run a features plan and check its output."""
    image = np.random.default_rng(seed).integers(0, 256, (batch, 4, 6, 3), np.uint8)
    np.testing.assert_array_equal(session.run({"image": image})["features"], 2.0 * image)


def sides(h: int, w: int) -> dict[str, np.ndarray]:
    """Inputs of a match plan: small integers, whose products are exact."""
    return {
        name: np.random.default_rng(size).integers(-9, 9, (size, 5)).astype(np.float32)
        for name, size in (("rows", h), ("columns", w))
    }


def multiply(session: EngineSession, h: int, w: int) -> None:
    """Run a match plan and check its output."""
    feeds = sides(h, w)
    np.testing.assert_array_equal(session.run(feeds)["scores"], feeds["rows"] @ feeds["columns"].T)
