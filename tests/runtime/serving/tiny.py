"""A bundle whose engine fails or takes long if its image says so, and servers in a thread."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ditf.runtime.model import Model, load
from ditf.runtime.serving.http.app import make_app
from ditf.runtime.serving.http.metrics import ServerMetrics
from ditf.runtime.serving.http.server import LOOPBACK, Server, bind, url
from ditf.runtime.serving.limits import Batching, Limits
from ditf.runtime.serving.service import Service

SIDE = 96
CELLS = 12
FAILS = 255  # red of the first pixel
LIMITS, BATCHING = Limits(), Batching()
LOOPS = 10  # for each step of green of the first pixel of any image of a batch: about a millisecond each


def tiny_bundle(demo: Path, path: Path) -> Path:
    """A copy of the demo's bundle with a dynamic batch, whose graph computes the mean colours of cells."""
    shutil.copytree(demo, path)
    onnx.save(_graph(), path / "features.onnx")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.update(channels=3, batch="dynamic", features_dtype="float32")
    manifest["files"]["features.onnx"] = {
        "bytes": (path / "features.onnx").stat().st_size,
        "sha256": hashlib.sha256((path / "features.onnx").read_bytes()).hexdigest(),
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def image(seed: int, loops: int = 0, fails: bool = False) -> np.ndarray:
    """RGB noise at the engine's size, whose first pixel tells the engine what to do."""
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    pixels[0, 0] = (FAILS if fails else 0, loops, 0)
    return pixels


def mean_colours(pixels: np.ndarray) -> np.ndarray:
    """The graph's result for an image, float32 [3, 12, 12]."""
    cell = SIDE // CELLS
    cells = pixels.astype(np.float32).reshape(CELLS, cell, CELLS, cell, 3)
    return cells.mean(axis=(1, 3)).transpose(2, 0, 1)


@contextmanager
def serving(
    *bundles: Path,
    limits: Limits = LIMITS,
    batching: Batching = BATCHING,
    cache_bytes: int = 1 << 20,
    api_key: str | None = None,
) -> Iterator[Running]:
    """A server on a free port of the loopback, in a thread."""
    models: dict[str, Model] = {path.name: load(path) for path in bundles}
    metrics = ServerMetrics()
    service = Service(models, limits, batching, cache_bytes, metrics)
    gate = make_app(service, metrics, api_key, LOOPBACK)
    listening = bind("127.0.0.1", 0)
    server = Server(gate, limits)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    running = Running(url(listening), service, gate, server)
    try:
        while not server.started:
            time.sleep(0.005)
        yield running
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join(20)
        assert not thread.is_alive()
        assert service.close(5)


class Running:
    """A running server; `address` is host:port."""

    def __init__(self, where: str, service: Service, gate: object, server: Server) -> None:
        self.url = where
        self.address = where.removeprefix("http://")
        self.port = int(where.rpartition(":")[2])
        self.service = service
        self.gate = gate
        self.server = server


def _graph() -> onnx.ModelProto:
    size = 256
    constants = {
        "table": np.zeros(FAILS, np.float32),  # looking up FAILS is out of its bounds
        "corner": np.array([0, 0, 0], np.int64),
        "red_end": np.array([1, 1, 1], np.int64),
        "green": np.array([0, 0, 1], np.int64),
        "green_end": np.array([1, 1, 2], np.int64),
        "axes": np.array([1, 2, 3], np.int64),
        "one": np.array([-1], np.int64),
        "loops": np.array(LOOPS, np.int64),
        "scalar": np.zeros(0, np.int64),
        "begin": np.zeros((size, size), np.float32),
        "eye": np.eye(size, dtype=np.float32),
        "true": np.array(True),
        "batch": np.array([-1, 1, 1, 1], np.int64),
    }
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["value", "eye"], ["next"]),
            helper.make_node("Identity", ["go"], ["go_on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, [size, size]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [size, size]),
        ],
    )
    nodes = [
        helper.make_node("Slice", ["image", "corner", "red_end", "axes"], ["red"]),
        helper.make_node("Cast", ["red"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["zero"]),
        helper.make_node("Slice", ["image", "green", "green_end", "axes"], ["pause"]),
        helper.make_node("Cast", ["pause"], ["pauses"], to=TensorProto.INT64),
        helper.make_node("ReduceMax", ["pauses"], ["most"], keepdims=0),
        helper.make_node("Mul", ["most", "loops"], ["count"]),
        helper.make_node("Loop", ["count", "true", "begin"], ["end"], body=body),
        helper.make_node("ReduceMax", ["end"], ["nothing"], keepdims=0),
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["first"], perm=[0, 3, 1, 2]),
        helper.make_node(
            "AveragePool", ["first"], ["cells"],
            kernel_shape=[SIDE // CELLS] * 2, strides=[SIDE // CELLS] * 2,
        ),
        helper.make_node("Add", ["cells", "zero"], ["sum"]),
        helper.make_node("Add", ["sum", "nothing"], ["features"]),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["B", 3, CELLS, CELLS])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
