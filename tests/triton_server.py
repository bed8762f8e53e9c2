"""As much of Triton as a repository of ours needs, where there is none.

No stand-in for Triton's scheduling, memory or protocols. It reads config.pbtxt with NVIDIA's own protobuf,
compares it with the ONNX files by the rule of onnxruntime_backend (src/onnxruntime_utils.cc,
CompareDimsSupported), runs them in ONNX Runtime, and imports model.py with a module that has the names of
python_backend's `triton_python_backend_utils` (src/pb_stub.cc) which it uses.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import onnxruntime
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

_TYPES = {"tensor(uint8)": "TYPE_UINT8", "tensor(int64)": "TYPE_INT64", "tensor(float16)": "TYPE_FP16",
          "tensor(float)": "TYPE_FP32", "tensor(int32)": "TYPE_INT32"}  # fmt: skip
_DTYPES = {"TYPE_UINT8": np.uint8, "TYPE_INT64": np.int64, "TYPE_FP16": np.float16, "TYPE_FP32": np.float32,
           "TYPE_INT32": np.int32}  # fmt: skip


def read_config(folder):
    """A model's config.pbtxt; whatever is no field of Triton's raises."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


class ModelError(Exception):
    pass


class Tensor:
    def __init__(self, name, array):
        assert array.flags.c_contiguous
        self._name, self._array = name, array

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array


class TritonError:
    INTERNAL, INVALID_ARG = 1, 3

    def __init__(self, message, code=INTERNAL):
        self._message, self._code = message, code

    def message(self):
        return self._message

    def code(self):
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None):
        self._tensors, self._error = list(output_tensors), error

    def output_tensors(self):
        return self._tensors

    def has_error(self):
        return self._error is not None

    def error(self):
        return self._error


class PreferredMemory:
    def __init__(self, kind, device=0):
        self.kind = kind


class Request:
    """What a Python model is given."""

    def __init__(self, inputs, outputs, parameters):
        self._inputs, self._outputs, self._parameters = inputs, outputs, parameters

    def inputs(self):
        return self._inputs

    def requested_output_names(self):
        return self._outputs

    def parameters(self):
        return json.dumps(self._parameters)


class Server:
    """A repository's models, loaded."""

    def __init__(self, repository):
        self.repository = repository
        self.configs = {path.name: read_config(path) for path in sorted(repository.iterdir())}
        self.calls = []
        self._graphs, self._python = {}, {}
        for name, config in self.configs.items():
            assert config.name == name
            if config.platform == "onnxruntime_onnx":
                self._graphs[name] = _load_onnx(repository / name, config)
        with self._utils():
            for name, config in self.configs.items():
                if config.backend == "python":
                    self._python[name] = _load_python(repository / name, config)

    def infer(self, name, inputs, parameters=None, outputs=None):
        """Results by name; ModelError where the model answers with one."""
        config = self.configs[name]
        _check_request(config, inputs)
        wanted = outputs or [one.name for one in config.output]
        self.calls.append((name, {key: array.shape for key, array in inputs.items()}))
        if name in self._graphs:
            values = self._graphs[name].run(wanted, inputs)
            results = dict(zip(wanted, values, strict=True))
        else:
            tensors = [Tensor(key, array) for key, array in inputs.items()]
            [response] = self._python[name].execute([Request(tensors, wanted, parameters or {})])
            if response.has_error():
                raise ModelError(response.error().code(), response.error().message())
            results = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        for one in config.output:
            array = results[one.name]
            assert array.dtype == _DTYPES[_type(one)], (name, one.name)
            shape = array.shape[1:] if config.max_batch_size else array.shape
            assert len(shape) == len(one.dims)
            assert all(dim in (-1, n) for dim, n in zip(one.dims, shape, strict=True)), (name, one.name)
        return results

    def warm_up(self):
        """Results of every warm-up, made as core's src/backend_model_instance.cc makes it."""
        return {
            (name, sample.name): self._warm(name, config, sample)
            for name, config in self.configs.items()
            for sample in config.model_warmup
        }

    def close(self):
        for model in self._python.values():
            model.finalize()

    def _warm(self, name, config, sample):
        inputs = {}
        for key, value in sample.inputs.items():
            dtype = _DTYPES[model_config_pb2.DataType.Name(value.data_type)]
            if value.WhichOneof("input_data_type") == "zero_data":
                array = np.zeros(tuple(value.dims), dtype)
            else:
                data = (self.repository / name / "warmup" / value.input_data_file).read_bytes()
                array = np.frombuffer(data, dtype).reshape(tuple(value.dims))
            inputs[key] = np.stack([array] * sample.batch_size) if config.max_batch_size else array
        return self.infer(name, inputs)

    @contextmanager
    def _utils(self):
        """`triton_python_backend_utils`, importable."""
        server = self

        class InferenceRequest:
            def __init__(self, model_name, requested_output_names, inputs, preferred_memory):
                assert preferred_memory.kind == "cpu"
                self._call = (model_name, {one.name(): one.as_numpy() for one in inputs})
                self._outputs = requested_output_names

            def exec(self):
                try:
                    results = server.infer(*self._call, outputs=self._outputs)
                except ModelError as error:
                    return InferenceResponse(error=TritonError(error.args[1], error.args[0]))
                return InferenceResponse([Tensor(name, array) for name, array in results.items()])

        module = ModuleType("triton_python_backend_utils")
        module.__dict__.update(
            Tensor=Tensor, TritonError=TritonError, InferenceRequest=InferenceRequest,
            InferenceResponse=InferenceResponse, PreferredMemory=PreferredMemory,
            TRITONSERVER_MEMORY_CPU="cpu",
        )  # fmt: skip
        sys.modules[module.__name__] = module
        try:
            yield
        finally:
            del sys.modules[module.__name__]


def _load_onnx(folder, config):
    path = folder / "1" / (config.default_model_filename or "model.onnx")
    if path.is_dir():
        path = path / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for graph, listed in ((session.get_inputs(), config.input), (session.get_outputs(), config.output)):
        specs = {one.name: one for one in listed}
        assert specs.keys() == {one.name for one in graph}
        for one in graph:
            assert _type(specs[one.name]) == _TYPES[one.type], one.name
            shape = [n if isinstance(n, int) else -1 for n in one.shape]
            whole = [-1, *specs[one.name].dims] if config.max_batch_size else list(specs[one.name].dims)
            assert not config.max_batch_size or shape[0] == -1, one.name
            assert len(shape) == len(whole), one.name
            assert all(n in (-1, dim) for n, dim in zip(shape, whole, strict=True)), (one.name, shape, whole)
    return session


def _load_python(folder, config):
    spec = importlib.util.spec_from_file_location(f"model_{config.name}", folder / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize({"model_config": json_format.MessageToJson(config, preserving_proto_field_name=True)})
    return model


def _check_request(config, inputs):
    """What Triton's core refuses: other names, types and shapes than the configuration's."""
    assert inputs.keys() == {one.name for one in config.input}, (config.name, list(inputs))
    for one in config.input:
        array = inputs[one.name]
        assert array.dtype == _DTYPES[_type(one)], (config.name, one.name, array.dtype)
        shape = array.shape
        if config.max_batch_size:
            assert 1 <= shape[0] <= config.max_batch_size
            shape = shape[1:]
        assert len(shape) == len(one.dims), (config.name, one.name, shape)
        assert all(dim in (-1, n) for dim, n in zip(one.dims, shape, strict=True)), (one.name, shape)


def _type(spec):
    return model_config_pb2.DataType.Name(spec.data_type)
