"""Reading the compiled layers from the builder's log, without a GPU.

With `ProfilingVerbosity.DETAILED` the builder ends its log with one line for each compiled layer:

    Name: _gemm_mha_v2_myl0_7, LayerType: kgen, Inputs: [ { Name: q, Dimensions: [2,144,64], ..., Datatype:
    Half, ... }], Constants: [...], Outputs: [...], TacticName: ..., Metadata: [ONNX Layer: trunk.blocks.0...]

The form is not documented. It was read from TensorRT-RTX 1.7.1; a log without such lines is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ditf.runtime.errors import DitfError

_LAYER = re.compile(
    r"^\s*Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: (?P<inputs>\[.*?\])"
    r"(?:, Constants: (?P<constants>\[.*?\]))?, Outputs: (?P<outputs>\[.*?\]), (?:Tactic|Parameter)\w+:"
)
_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([\d,\- ]*)\],.*?Datatype: (\w+)")
_SOURCE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_TOTAL = re.compile(r"^Total (Activation|Weights) Memory: (\d+) bytes")
_BYTES = {
    "Double": 8, "Int64": 8, "Float": 4, "Int32": 4, "Half": 2, "BFloat16": 2, "Int8": 1, "UInt8": 1,
    "Bool": 1, "FP8": 1, "E4M3": 1, "Int4": 0.5, "FP4": 0.5, "E8M0": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """A tensor that a compiled layer reads or writes.

    Attributes:
        dtype: as the log names it, such as "Half".
        nbytes: of its elements.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class CompiledLayer:
    """One layer of the compiled engine: a kernel, or a few that the library launches together.

    Attributes:
        name: as the compiler named it; a generated kernel is named after its operations.
        type: such as "kgen" (generated), "gemm", "correlation" (a convolution), "signal".
        inputs, constants, outputs: what it reads, of which constants are weights, and what it writes.
        sources: the ONNX nodes that it came from.
    """

    name: str
    type: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    sources: tuple[str, ...]

    @property
    def read(self) -> int:
        """Bytes read, weights included."""
        return sum(tensor.nbytes for tensor in (*self.inputs, *self.constants))

    @property
    def written(self) -> int:
        """Bytes written."""
        return sum(tensor.nbytes for tensor in self.outputs)


@dataclass(frozen=True)
class EngineLayers:
    """The compiled layers of an engine, in the order in which they run.

    Attributes:
        activation_bytes: GPU memory that holds what passes between layers.
        weight_bytes: GPU memory of the weights.
    """

    layers: tuple[CompiledLayer, ...]
    activation_bytes: int
    weight_bytes: int


def read_layers(messages: Sequence[str]) -> EngineLayers:
    """Read the compiled layers from the messages of a build with detailed profiling.

    A dynamic dimension counts as 1: it can be a product of several, which the log does not tell.

    Raises:
        DitfError: the log lists no layers, or in a form that is not known.
    """
    lines = [line for message in messages for line in message.split("\n")]
    totals = {match[1]: int(match[2]) for line in lines if (match := _TOTAL.match(line))}
    layers = [_layer(line) for line in lines if "LayerType:" in line and line.lstrip().startswith("Name:")]
    if not layers:
        raise DitfError("the builder's log lists no compiled layers", "leave --report out")
    return EngineLayers(tuple(layers), totals.get("Activation", 0), totals.get("Weights", 0))


def _layer(line: str) -> CompiledLayer:
    match = _LAYER.match(line)
    if match is None:
        raise DitfError(
            f"the builder's log has a layer in an unknown form ({line[:80]})", "leave --report out"
        )
    return CompiledLayer(
        match["name"],
        match["type"],
        _tensors(match["inputs"]),
        _tensors(match["constants"] or ""),
        _tensors(match["outputs"]),
        tuple(_SOURCE.findall(line)),
    )


def _tensors(text: str) -> tuple[Tensor, ...]:
    found = []
    for name, dimensions, dtype in _TENSOR.findall(text):
        sizes = (int(size) for size in dimensions.split(",") if size.strip())
        shape = tuple(abs(size) for size in sizes)
        if dtype not in _BYTES:
            raise DitfError(f"the builder's log has the unknown type {dtype}", "leave --report out")
        found.append(Tensor(name, shape, dtype, math.ceil(math.prod(shape) * _BYTES[dtype])))
    return tuple(found)
