"""What a compiled layer does: attention, a product, a convolution, arithmetic, or only moving data."""

from __future__ import annotations

import math
import re

from ditf.engines.report.layer_log import CompiledLayer

ATTENTION = "fused attention"
PRODUCT = "product"
CONVOLUTION = "convolution"
POINTWISE = "norm or arithmetic"
COPY = "copy"
CAST = "cast"
SYNC = "synchronisation"
SHAPE = "shape"

_OPERATIONS = re.compile(r"[A-Z][a-z]+")
_PRODUCTS = {"Fc", "Matm", "Dot", "Gemm"}
_MOVES = {"Move", "Tran", "Slic", "Conc", "Copy", "Repl", "Resh", "Shuf", "Gath"}
_BESIDE_A_MOVE = {"Add", "Cast", "Mul"}  # what rides on a kernel whose work is to move data
_LONG = {"Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Int8": "int8", "FP8": "fp8"}


def kind_of(layer: CompiledLayer) -> str:
    """The kind of a layer. A generated kernel is named after its operations, which decide."""
    if layer.type in ("signal", "wait", "signal_wait", "barrier"):
        return SYNC
    if layer.type.lower().startswith("shape"):
        return SHAPE
    if "mha" in layer.name or "fmha" in layer.name:
        return ATTENTION
    if layer.type in ("correlation", "convolution", "deconvolution"):
        return CONVOLUTION
    if layer.type == "gemm":
        return PRODUCT
    operations = _operations(layer)
    if layer.type == "runtime_fusion" or operations & _PRODUCTS:
        return PRODUCT
    if operations == {"Cast"}:
        return CAST
    if (
        operations & _MOVES
        and operations <= _MOVES | _BESIDE_A_MOVE
        and _operations_list(layer).count("Mul") < 2
    ):
        return COPY
    return COPY if layer.type in ("move", "copy", "reformat", "shuffle") else POINTWISE


def computes_in(layer: CompiledLayer) -> str:
    """The type of what a product, a convolution or an attention multiplies."""
    tensors = layer.inputs or layer.constants
    return _LONG.get(tensors[0].dtype, tensors[0].dtype.lower()) if tensors else ""


def operations(layer: CompiledLayer) -> int:
    """Operations of a product, convolution or attention, two for a multiply-add; 0 for other layers.

    They follow from the numbers of elements: [M, K] x [K, N] -> [M, N] has K = sqrt(MK KN / MN).
    """
    kind = kind_of(layer)
    if kind == PRODUCT and layer.inputs and layer.outputs:
        factors = [_elements(tensor.shape) for tensor in (*layer.inputs, *layer.constants)]
        first = _elements(layer.inputs[0].shape)
        factors.remove(first)
        result = _elements(layer.outputs[0].shape)
        if not factors:
            return 0
        return int(2 * result * math.sqrt(first * max(factors) / result))
    if kind == CONVOLUTION and layer.constants and layer.outputs:
        filters = max(layer.constants, key=lambda tensor: _elements(tensor.shape)).shape
        return 2 * _elements(layer.outputs[0].shape) * _elements(filters) // max(1, filters[0])
    if kind == ATTENTION and len(layer.inputs) >= 2 and layer.outputs:
        *heads, _, size = layer.outputs[0].shape  # of a head, as in the value
        query, key = (_elements(tensor.shape) for tensor in layer.inputs[:2])
        return 4 * query * key // _elements((*heads, size))
    return 0


def _elements(shape: tuple[int, ...]) -> int:
    return max(1, math.prod(shape))


def _operations_list(layer: CompiledLayer) -> list[str]:
    name = layer.name.removeprefix("__myl_").split("_")[0]
    return _OPERATIONS.findall(name) if layer.name.startswith("__myl_") else []


def _operations(layer: CompiledLayer) -> set[str]:
    return set(_operations_list(layer))
