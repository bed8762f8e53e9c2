"""TensorRT-RTX: parsing and compiling a graph, which needs no GPU (running an engine does)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditf.runtime.errors import BundleError, InputError, missing_extra

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]
"""{input: (smallest, usual, largest shape)} for inputs with dynamic dimensions."""


@dataclass(frozen=True)
class LayerType:
    """A layer of the parsed network: its name, its kind and the type of its first output."""

    name: str
    kind: str
    dtype: str


@dataclass(frozen=True)
class Engine:
    """A compiled graph: the plan's bytes, and the network it was compiled from."""

    plan: bytes
    layers: tuple[LayerType, ...]


def build_engine(onnx: Path, target: str | None = None, profile: Profile | None = None) -> Engine:
    """Compile an ONNX file, strongly typed.

    Args:
        onnx: the graph; its weights lie beside it.
        target: compute capability such as "sm_89", or None for an engine that fits any.
        profile: ranges of dynamic inputs.

    Raises:
        MissingComponent: tensorrt_rtx is not installed.
        InputError: unknown target.
        BundleError: the parser or the compiler refuses the graph; holds their first message.
    """
    trt = _import()
    log = _Log(trt)
    builder = trt.Builder(log.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(onnx)):
        raise BundleError(f"TensorRT-RTX cannot parse {onnx.name} ({_parse_error(parser) or log.last})")
    config = builder.create_builder_config()
    if target is not None:
        capability = getattr(trt.ComputeCapability, target.replace("_", "").upper(), None)
        if capability is None:
            raise InputError(
                f"unknown target {target!r}", "choose sm_75, sm_80, sm_86, sm_89, sm_120, sm_121"
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)
    if profile:
        shapes = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in profile.items():
            shapes.set_shape(name, smallest, usual, largest)
        config.add_optimization_profile(shapes)
    plan = builder.build_serialized_network(network, config)
    if plan is None:  # there is no exception
        raise BundleError(f"TensorRT-RTX cannot compile {onnx.name} for {target or 'any GPU'} ({log.last})")
    return Engine(bytes(plan), _layers(network))


def _parse_error(parser: Any) -> str:
    """The first error, with the operator it is about; "" if the parser kept none."""
    if not parser.num_errors:
        return ""
    error = parser.get_error(0)
    return f"{error.node_operator()} {error.node_name()}: {error.desc()}"


def _layers(network: Any) -> tuple[LayerType, ...]:
    layers = (network.get_layer(i) for i in range(network.num_layers))
    return tuple(
        LayerType(layer.name, layer.type.name, layer.get_output(0).dtype.name)
        for layer in layers
        if layer.num_outputs
    )


def _import() -> Any:
    try:
        import tensorrt_rtx
    except ImportError:
        raise missing_extra("tensorrt-rtx", "tensorrt-rtx") from None
    return tensorrt_rtx


class _Log:
    """Keeps TensorRT's last error message instead of printing it."""

    def __init__(self, trt: Any) -> None:
        log = self
        self.last = "no message"

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.Severity.ERROR:
                    log.last = message.split("\n")[0][:300]

        self.logger = Logger()
