"""Which graph a plan was built from: a folder with one entry for each plan, named after the plan's hash.

It is a folder so that a plan that one process built can be run by another.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = "DITF_STANDIN_PLANS"
"""The environment variable that names the folder."""


@dataclass(frozen=True)
class Built:
    """What a plan was built from.

    Attributes:
        profiles: of each profile, {input: (smallest, usual, largest shape)}.
        target: such as "sm_89"; "portable"; "" for the GPU that built it.
        flags: names of the builder's flags that were set.
        version: of the library.
    """

    profiles: list[dict[str, list[list[int]]]]
    target: str
    flags: list[str]
    version: str


def folder() -> Path:
    """The registry's folder, which is made if it is not there."""
    path = Path(os.environ.get(FOLDER) or Path(tempfile.gettempdir()) / f"ditf-standin-{os.getuid()}")
    path.mkdir(parents=True, exist_ok=True)
    return path


def digest(plan: Any) -> str:
    return hashlib.sha256(plan).hexdigest()


def record(plan: bytes, model: bytes, built: Built) -> None:
    """Keep the graph of a plan, with its weights inside."""
    place = folder() / digest(plan)
    with tempfile.TemporaryDirectory(dir=folder()) as made:  # another process may record the same plan
        working = Path(made, "plan")
        working.mkdir()
        (working / "graph.onnx").write_bytes(model)
        (working / "built.json").write_text(json.dumps(asdict(built)))
        with suppress(OSError):  # it is there already
            working.rename(place)


def find(plan: Any) -> tuple[bytes, Built] | None:
    """The graph of a plan; None if it is not one that was recorded."""
    place = folder() / digest(plan)
    try:
        return (place / "graph.onnx").read_bytes(), Built(**json.loads((place / "built.json").read_text()))
    except FileNotFoundError:
        return None


def with_weights(model: bytes, weights: dict[str, bytes]) -> bytes:
    """A graph whose external initializers are inside it."""
    import onnx

    proto = onnx.load_model_from_string(model)
    for tensor in proto.graph.initializer:
        if tensor.name in weights:
            tensor.ClearField("external_data")
            tensor.data_location = onnx.TensorProto.DEFAULT
            tensor.raw_data = weights[tensor.name]
    return proto.SerializeToString()


def without_weights(model: bytes) -> bytes:
    """A graph whose larger initializers are gone; `with_weights` puts them back."""
    import onnx

    proto = onnx.load_model_from_string(model)
    for tensor in proto.graph.initializer:
        if len(tensor.raw_data) > 64:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
    return proto.SerializeToString()
