"""The config.pbtxt of each model in a Triton repository.

The fields are defined in triton-inference-server/common, protobuf/model_config.proto, and explained in the
server's docs/user_guide/model_configuration.md. The backends' sources add rules:
    onnxruntime_backend, src/onnxruntime_utils.cc CompareDimsSupported: with max_batch_size the first
        dimension of *every* input is dynamic and left out of `dims`; without, `dims` is the graph's shape;
    onnxruntime_backend, src/onnxruntime.cc: parameters of the accelerator "cuda" are options of ONNX
        Runtime's CUDA provider (Triton 24.06 and newer);
    tensorrt_backend, src/model_state.cc: cc_model_filenames names the plans of several GPUs; `profile` is an
        index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ditf.engines.pbtxt import Enum, entries
from ditf.runtime.backends.engine_records import MATCH_PLAN_POINTS
from ditf.runtime.bundles.manifest import Manifest
from ditf.runtime.serving.protocol.contract import SERVED_FEATURES, TensorSpec, model_specs
from ditf.runtime.serving.triton import LARGEST_BATCH, MODEL

ONNX, PLAN = "onnxruntime_onnx", "tensorrt_plan"
MATCH_MODEL = "match_graph"
FEATURES_MODEL = "features_graph"

Config = dict[str, Any]
Inputs = Mapping[str, tuple[np.dtype, tuple[int, ...]]]

_TYPES = {"UINT8": "TYPE_UINT8", "INT64": "TYPE_INT64", "FP16": "TYPE_FP16", "FP32": "TYPE_FP32"}
_NUMPY_TYPES = {
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "bool": "TYPE_BOOL",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
}


@dataclass(frozen=True)
class Placement:
    """Where and how the graphs run.

    Attributes:
        gpu: whether they run on GPUs; on the CPU otherwise.
        instances: instances of each graph on each GPU.
        largest_batch: largest batch of a bundle with a dynamic batch.
        usual_batch: batch at which the plan is fastest.
        delay_us: how long an image waits for others, microseconds.
        index: the number of the one GPU that they run on; None for all.
    """

    gpu: bool
    instances: int
    largest_batch: int
    usual_batch: int
    delay_us: int
    index: int | None = None


@dataclass(frozen=True)
class Files:
    """The files that a graph's model loads.

    Attributes:
        platform: `ONNX` or `PLAN`.
        default: file in the version folder that any GPU can load, or None.
        by_capability: {"8.7": file} of plans.
        profile: index of the plans' optimisation profile; None for an ONNX file.
    """

    platform: str
    default: str | None
    by_capability: Mapping[str, str]
    profile: int | None = None


def features_config(
    name: str, manifest: Manifest, inputs: Inputs, files: Files, placement: Placement
) -> Config:
    """The config of features.onnx or its plan; it batches dynamically if the image is the only input."""
    output = model_specs(manifest)[SERVED_FEATURES].outputs[0]
    config = _graph(name, files)
    if batches(manifest, inputs):
        _, shape = inputs["image"]
        config |= {
            "max_batch_size": placement.largest_batch,
            "input": [_tensor("image", "TYPE_UINT8", shape[1:])],
            "output": [_tensor("features", _TYPES[output.datatype], output.shape[1:])],
        }
    else:
        config |= {
            "max_batch_size": 0,
            "input": [
                _tensor(key, _NUMPY_TYPES[dtype.name], shape) for key, (dtype, shape) in inputs.items()
            ],
            "output": [
                _tensor("features", _TYPES[output.datatype], (inputs["image"][1][0], *output.shape[1:]))
            ],
        }
    if config["max_batch_size"]:
        config["dynamic_batching"] = {"max_queue_delay_microseconds": placement.delay_us}
        # docs/user_guide/batcher.md advises preferred sizes for engines only.
        preferred = sorted({placement.usual_batch, placement.largest_batch} - {1})
        if files.platform == PLAN and preferred:
            config["dynamic_batching"]["preferred_batch_size"] = preferred
    config |= _float32(files, placement, tf32=manifest.precision != "float32")
    config["instance_group"] = [_instances(placement, files.profile)]
    config["model_warmup"] = _features_warmup(config, inputs, placement)
    return config


def match_config(name: str, manifest: Manifest, files: Files, placement: Placement) -> Config:
    """The config of match.onnx or its plan, which takes two maps and the `interpolation_inputs`."""
    datatype = _TYPES[model_specs(manifest)[SERVED_FEATURES].outputs[0].datatype]
    h, w = manifest.grid
    maps = (1, manifest.channels, h, w)
    listed = (
        ("source", datatype, maps),
        ("target", datatype, maps),
        ("point_rows", "TYPE_FP32", (-1, h)),
        ("point_columns", "TYPE_FP32", (-1, w)),
        ("rows", "TYPE_FP32", (-1, h)),
        ("columns", "TYPE_FP32", (-1, w)),
    )
    lengths = (1, 1, MATCH_PLAN_POINTS[1], MATCH_PLAN_POINTS[1], *manifest.size)
    return {
        **_graph(name, files),
        "max_batch_size": 0,
        "input": [_tensor(*one) for one in listed],
        "output": [_tensor("points", "TYPE_FP32", (-1, 2)), _tensor("scores", "TYPE_FP32", (-1,))],
        **_float32(files, placement, tf32=False),
        "instance_group": [_instances(placement, None if files.profile is None else 0)],
        "model_warmup": [
            {
                "name": "zeros",
                "batch_size": 1,
                "inputs": entries(
                    {
                        key: {"data_type": Enum(kind), "dims": [length, *shape[1:]], "zero_data": True}
                        for (key, kind, shape), length in zip(listed, lengths, strict=True)
                    }
                ),
            }
        ],
    }


def python_config(
    name: str, role: str, manifest: Manifest, graphs: Mapping[str, str], largest_batch: int, count: int
) -> Config:
    """The config of a model that Triton's Python backend runs.

    Args:
        role: the model's name in the serving contract.
        graphs: the models that run the graphs, by `FEATURES_GRAPH` and, where there is one, `MATCH_GRAPH`.
        count: number of processes.
    """
    spec = model_specs(manifest)[role]
    parameters = {MODEL: role, LARGEST_BATCH: str(largest_batch), **graphs}
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": 0,
        "input": list(map(_specified, spec.inputs)),
        "output": list(map(_specified, spec.outputs)),
        "instance_group": [{"count": count, "kind": Enum("KIND_CPU")}],
        "parameters": entries({key: {"string_value": value} for key, value in parameters.items()}),
    }


def batches(manifest: Manifest, inputs: Inputs) -> bool:
    """Whether Triton may batch requests for features, which needs a batch dimension in every input."""
    return manifest.batch == "dynamic" and set(inputs) == {"image"}


def _graph(name: str, files: Files) -> Config:
    config: Config = {"name": name, "platform": files.platform}
    if files.default is not None:
        config["default_model_filename"] = files.default
    if files.by_capability:
        config["cc_model_filenames"] = entries(files.by_capability)
    return config


def _float32(files: Files, placement: Placement, tf32: bool) -> Config:
    """Tell ONNX Runtime's CUDA provider how to compute float32 products; of a plan it is part.

    Args:
        tf32: whether their factors may be rounded to TF32, which is the provider's default.
    """
    if files.platform != ONNX or not placement.gpu or tf32:
        return {}
    cuda = {"name": "cuda", "parameters": entries({"use_tf32": "0"})}
    return {"optimization": {"execution_accelerators": {"gpu_execution_accelerator": [cuda]}}}


def _instances(placement: Placement, profile: int | None) -> Config:
    group: Config = {
        "count": placement.instances,
        "kind": Enum("KIND_GPU" if placement.gpu else "KIND_CPU"),
    }
    if placement.index is not None:
        group["gpus"] = [placement.index]
    return group if profile is None else {**group, "profile": [str(profile)]}


def _features_warmup(config: Config, inputs: Inputs, placement: Placement) -> list[Config]:
    """Warm-up with the golden image in batches of 1 and of the largest size."""
    sizes = sorted({1, config["max_batch_size"] or 1})
    shapes = {one["name"]: list(one["dims"]) for one in config["input"]}
    if shapes["image"][0] == -1:
        shapes["image"][0] = 1
    read = {
        name: {
            "data_type": Enum(_NUMPY_TYPES[dtype.name]),
            "dims": shapes[name],
            "input_data_file": name,
        }
        for name, (dtype, _) in inputs.items()
    }
    return [{"name": f"golden-{size}", "batch_size": size, "inputs": entries(read)} for size in sizes]


def _tensor(name: str, kind: str, dims: Sequence[int]) -> Config:
    return {"name": name, "data_type": Enum(kind), "dims": list(dims)}


def _specified(spec: TensorSpec) -> Config:
    return _tensor(spec.name, _TYPES[spec.datatype], spec.shape)
