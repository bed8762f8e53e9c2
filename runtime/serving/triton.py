"""The Python models of a Triton repository, which run a bundle's graphs as other models of the same server.

Triton's Python backend (triton-inference-server/python_backend, README.md) imports a model.py whose class
comes from here. Resizing images, choosing conditions, computing matrices and matching points is done by the
same code as everywhere in ditf. Only the graphs run elsewhere and are called by name ("business logic
scripting").
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ditf.runtime.backends import Probe, Session
from ditf.runtime.bundles.bundle import CONDITIONS, FEATURES, NOISE, Bundle
from ditf.runtime.errors import DitfError, InputError, NoPlan
from ditf.runtime.features import FeatureMap
from ditf.runtime.model import Model
from ditf.runtime.serving.limits import Limits
from ditf.runtime.serving.protocol.contract import (
    METHOD,
    PROMPT,
    SERVED_CORRESPOND,
    SERVED_FEATURES,
    SERVED_MATCH,
    Results,
)

MODEL, FEATURES_GRAPH, MATCH_GRAPH, LARGEST_BATCH = (
    "ditf_model",
    "ditf_features_graph",
    "ditf_match_graph",
    "ditf_largest_batch",
)
"""Parameters in a Python model's config.pbtxt: which of the contract's models it is; the names of the models
that run features.onnx and match.onnx (without the latter, numpy matches); the largest batch of the former."""

_POINTS = 100_000


def graph_inputs(bundle: Bundle) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """The inputs of a bundle's features graph, {name: (dtype, shape)}; a dynamic batch is -1."""
    manifest = bundle.manifest
    batch = -1 if manifest.batch == "dynamic" else manifest.batch
    inputs: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    inputs["image"] = (np.dtype(np.uint8), (batch, *manifest.size, 3))
    if manifest.noise == "input":
        noise = bundle.read_array(NOISE)
        inputs["noise"] = (noise.dtype, noise.shape)
    if manifest.conditioning != "bake":
        for key, array in bundle.read_arrays(CONDITIONS).items():
            inputs[key.partition(".")[2]] = (array.dtype, array.shape)
    return inputs


class BundleModel:
    """The class that a repository's model.py names TritonPythonModel.

    Attributes:
        folder: the folder of model.py, which also holds the bundle's manifest, noise and conditions.
    """

    folder: ClassVar[Path]

    def initialize(self, args: Mapping[str, str]) -> None:
        """Triton calls this with the model's configuration as JSON in `model_config`."""
        self._utils = importlib.import_module("triton_python_backend_utils")
        listed = json.loads(args["model_config"])["parameters"]
        parameters = {name: value["string_value"] for name, value in listed.items()}
        self._answer = _ANSWERS[parameters[MODEL]]
        self._outputs = _OUTPUTS[parameters[MODEL]]
        self._model = Model(Bundle.open(self.folder), TritonGraphs(self._utils, parameters))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request, in order. An error in one request is the answer to that request."""
        return [self._execute(request) for request in requests]

    def finalize(self) -> None:
        """Triton calls this when the model is unloaded."""
        self._model.close()

    def _execute(self, request: Any) -> Any:
        utils = self._utils
        try:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            parameters = json.loads(request.parameters() or "{}")
            results = self._answer(self._model, inputs, parameters)
        except DitfError as error:
            kind = utils.TritonError
            code = kind.INVALID_ARG if isinstance(error, InputError) else kind.INTERNAL
            return utils.InferenceResponse(error=kind(str(error), code))
        wanted = set(request.requested_output_names())
        tensors = [utils.Tensor(name, results[name]) for name in self._outputs if name in wanted]
        return utils.InferenceResponse(output_tensors=tensors)


class TritonGraphs:
    """A backend (`ditf.runtime.backends.Backend`) that runs a bundle's graphs as models of this server."""

    def __init__(self, utils: Any, parameters: Mapping[str, str]) -> None:
        self._utils = utils
        self._parameters = parameters

    def probe(self) -> Probe:
        return Probe(True, "Triton")

    def prepared(self, bundle: Bundle) -> bool:
        return True

    def open_session(self, bundle: Bundle, graph: str) -> Session:
        if graph == FEATURES:
            inputs = {name: shape for name, (_, shape) in graph_inputs(bundle).items()}
            largest = int(self._parameters[LARGEST_BATCH])
            manifest = bundle.manifest
            return _GraphSession(
                self._utils,
                self._parameters[FEATURES_GRAPH],
                {name: tuple(None if n == -1 else n for n in shape) for name, shape in inputs.items()},
                {"features": (None, manifest.channels, *manifest.grid)},
                ((1, largest),) if bundle.manifest.batch == "dynamic" else (),
            )
        if MATCH_GRAPH not in self._parameters:
            raise NoPlan("the repository has no match.onnx", "numpy matches")
        outputs = {"points": (None, 2), "scores": (None,)}
        return _GraphSession(self._utils, self._parameters[MATCH_GRAPH], {}, outputs, ())


class _Kept:
    """A `ditf.runtime.features.Resident` array, which a graph matches if the repository has one.

    It lies in host memory nevertheless. Cutting an array in GPU memory would need a framework in Triton's
    Python, which is too much for saving a copy of a megabyte.
    """

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.shape = array.shape
        self.dtype = array.dtype

    def numpy(self) -> np.ndarray:
        return self._array

    def reshape(self, *shape: int) -> _Kept:
        return _Kept(self._array.reshape(shape))

    def __getitem__(self, index: int) -> _Kept:
        return _Kept(self._array[index])


class _GraphSession:
    """A graph that another model of the server runs; see `ditf.runtime.backends.Session`."""

    device_seconds = device_bytes = None

    def __init__(
        self,
        utils: Any,
        name: str,
        inputs: dict[str, tuple[int | None, ...]],
        outputs: dict[str, tuple[int | None, ...]],
        batches: tuple[tuple[int, int], ...],
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.detail = f"Triton's model {name}"
        self.batches = batches
        self._utils = utils
        self._name = name

    def run(self, feeds: Mapping[str, Any], keep: Collection[str] = ()) -> dict[str, Any]:
        """Run the graph. The results come to host memory, whatever device the graph runs on."""
        utils = self._utils
        arrays = {name: value.numpy() if isinstance(value, _Kept) else value for name, value in feeds.items()}
        response = utils.InferenceRequest(
            model_name=self._name,
            requested_output_names=list(self.outputs),
            inputs=[utils.Tensor(name, np.ascontiguousarray(array)) for name, array in arrays.items()],
            preferred_memory=utils.PreferredMemory(utils.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()
        if response.has_error():
            raise DitfError(f"{self._name} failed ({response.error().message()})", "see Triton's log")
        arrays = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        return {name: _Kept(array) if name in keep else array for name, array in arrays.items()}

    def close(self) -> None:
        """Do nothing, because Triton owns the graph."""


def _features(model: Model, inputs: Results, parameters: Mapping[str, Any]) -> Results:
    return {"features": model.run(inputs["image"], prompt=parameters.get(PROMPT))}


def _match(model: Model, inputs: Results, parameters: Mapping[str, Any]) -> Results:
    sides = []
    for name in ("source", "target"):
        height, width = (int(length) for length in inputs[f"{name}_size"])
        _check_size(f"{name}_size", height, width)
        sides.append(FeatureMap(_Kept(inputs[name]), (height, width)))
    return _matched(model, sides, inputs["points"], parameters)


def _correspond(model: Model, inputs: Results, parameters: Mapping[str, Any]) -> Results:
    pictures = [inputs["source"], inputs["target"]]
    for name, picture in zip(("source", "target"), pictures, strict=True):
        _check_size(name, *picture.shape[:2])
    sides = model.features_of(pictures, prompt=parameters.get(PROMPT))
    return _matched(model, sides, inputs["points"], parameters)


def _matched(
    model: Model, sides: Sequence[FeatureMap], points: np.ndarray, parameters: Mapping[str, Any]
) -> Results:
    if len(points) > _POINTS:
        raise InputError(f"{len(points):,} points are more than {_POINTS:,}", "send fewer")
    found = model.match(sides[0], sides[1], points, parameters.get(METHOD, "argmax"))
    return {"matches": found.points, "scores": found.scores}


def _check_size(name: str, height: int, width: int) -> None:
    if height < 1 or width < 1 or height * width > Limits.pixels:
        raise InputError(
            f"{name} is {height}x{width}, (height, width) in pixels", f"at most {Limits.pixels:,} pixels"
        )


_ANSWERS: dict[str, Callable[[Model, Results, Mapping[str, Any]], Results]] = {
    SERVED_FEATURES: _features,
    SERVED_MATCH: _match,
    SERVED_CORRESPOND: _correspond,
}
_OUTPUTS = {
    SERVED_FEATURES: ("features",),
    SERVED_MATCH: ("matches", "scores"),
    SERVED_CORRESPOND: ("matches", "scores"),
}
