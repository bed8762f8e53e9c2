"""Running the graph of a plan with ONNX Runtime, and the shapes of its tensors."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

Shape = tuple[int, ...]


class GraphSession:
    """The graph of one plan.

    Args:
        model: with its weights inside.

    Attributes:
        inputs, outputs: {name: (dtype, dimensions)}; a dynamic dimension is its name.
    """

    def __init__(self, model: bytes) -> None:
        import onnx

        graph = onnx.load_model_from_string(model).graph
        known = {tensor.name for tensor in graph.initializer}
        self.inputs = {one.name: _described(one) for one in graph.input if one.name not in known}
        self.outputs = {one.name: _described(one) for one in graph.output}
        self._model = model

    @functools.cached_property
    def _session(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(self._model, options, ["CPUExecutionProvider"])

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self.outputs, self._session.run(list(self.outputs), feeds), strict=True))

    def output_shapes(self, given: dict[str, Shape]) -> dict[str, Shape]:
        """The outputs' shapes for these input shapes."""
        sizes: dict[str, int] = {}
        for name, (_, dimensions) in self.inputs.items():
            sizes.update(
                (dimension, size)
                for dimension, size in zip(dimensions, given[name], strict=True)
                if isinstance(dimension, str)
            )
        if all(
            size in sizes or not isinstance(size, str) for _, dims in self.outputs.values() for size in dims
        ):
            return {
                name: tuple(sizes[size] if isinstance(size, str) else size for size in dimensions)
                for name, (_, dimensions) in self.outputs.items()
            }
        zeros = {name: np.zeros(given[name], dtype) for name, (dtype, _) in self.inputs.items()}
        return {name: value.shape for name, value in self.run(zeros).items()}


def _described(value: Any) -> tuple[np.dtype[Any], tuple[int | str, ...]]:
    import onnx

    tensor = value.type.tensor_type
    dimensions = tuple(one.dim_param or int(one.dim_value) for one in tensor.shape.dim)
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), dimensions
