"""What a compiled layer does: attention, a product, a convolution, arithmetic, or only moving data."""

from __future__ import annotations

import math
import re

from ditf.engines.report.layer_log import CompiledLayer, Tensor

ATTENTION = "fused attention"
PRODUCT = "product"
CONVOLUTION = "convolution"
POINTWISE = "norm or arithmetic"
COPY = "copy"
CAST = "cast"
SYNC = "synchronisation"
SHAPE = "shape"

NO_KERNELS = (SYNC, SHAPE)
"""Kinds that launch nothing: waiting for another stream, and working out a dynamic shape on the host."""

_OPERATIONS = re.compile(r"[A-Z][a-z]+")
_PRODUCTS = {"Fc", "Matm", "Dot", "Gemm"}
_MOVES = {"Move", "Tran", "Slic", "Conc", "Copy", "Repl", "Resh", "Shuf", "Gath"}
_BESIDE_A_MOVE = {"Add", "Cast", "Mul"}  # what rides on a kernel whose work is to move data
_LONG = {"Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Int8": "int8", "FP8": "fp8"}


def kind_of(layer: CompiledLayer) -> str:
    """The kind of a layer. A generated kernel is named after its operations, which decide."""
    if layer.type in ("signal", "wait", "signal_wait", "barrier"):
        return SYNC
    if layer.type.lower().startswith(("shape", "reshape")) or layer.name.startswith("cast_hvar"):
        return SHAPE
    if "mha" in layer.name or "fmha" in layer.name:
        return ATTENTION
    if layer.type in ("correlation", "convolution", "deconvolution"):
        return CONVOLUTION
    if layer.type == "gemm":
        return PRODUCT
    listed = _operations(layer)
    kinds = set(listed)
    if layer.type == "runtime_fusion" or kinds & _PRODUCTS:
        return PRODUCT
    if kinds == {"Cast"}:
        return CAST
    if kinds & _MOVES and kinds <= _MOVES | _BESIDE_A_MOVE and listed.count("Mul") < 2:
        return COPY
    return COPY if layer.type in ("move", "copy", "reformat", "shuffle") else POINTWISE


def computes_in(layer: CompiledLayer) -> str:
    """The type of what a product, a convolution or an attention multiplies.

    The weight decides where there is one: a fused product also reads the residual that it is added to.
    """
    weight = _weight(layer)
    factors = (weight,) if weight else layer.inputs or layer.constants
    return _LONG.get(factors[0].dtype, factors[0].dtype.lower()) if factors else ""


def operations(layer: CompiledLayer) -> int:
    """Operations of a product, convolution or attention, two for a multiply-add; 0 for other layers.

    A product of activations has no weight whose shape tells K. There the numbers of elements do:
    [M, K] x [K, N] -> [M, N] has K = sqrt(MK KN / MN).
    """
    kind, weight = kind_of(layer), _weight(layer)
    if kind == PRODUCT and weight and layer.outputs and layer.outputs[0].shape[-1] in weight.shape[-2:]:
        first, second = weight.shape[-2:]
        inner = first if layer.outputs[0].shape[-1] == second else second
        return 2 * _elements(layer.outputs[0].shape) * inner
    if kind == PRODUCT and layer.inputs and layer.outputs:
        factors = sorted(_elements(tensor.shape) for tensor in (*layer.inputs, *layer.constants))
        result = _elements(layer.outputs[0].shape)
        return int(2 * result * math.sqrt(math.prod(factors[-2:]) / result)) if len(factors) > 1 else 0
    if kind == CONVOLUTION and weight and layer.outputs:
        return 2 * _elements(layer.outputs[0].shape) * _elements(weight.shape[1:])
    if kind == ATTENTION and len(layer.inputs) >= 2 and layer.outputs:
        *heads, _, size = layer.outputs[0].shape  # of a head, as in the value
        query, key = (_elements(tensor.shape) for tensor in layer.inputs[:2])
        return 4 * query * key // _elements((*heads, size))
    return 0


def _weight(layer: CompiledLayer) -> Tensor | None:
    """The largest constant that is a matrix or a filter; biases and scales are [1, 1, N] or smaller."""
    matrices = [one for one in layer.constants if len(one.shape) > 1 and math.prod(one.shape[:-1]) > 1]
    return max(matrices, key=lambda one: _elements(one.shape), default=None)


def _elements(shape: tuple[int, ...]) -> int:
    return max(1, math.prod(shape))


def _operations(layer: CompiledLayer) -> list[str]:
    """What a generated kernel does, in order, by its name; [] for other layers."""
    name = layer.name.removeprefix("__myl_").split("_")[0]
    return _OPERATIONS.findall(name) if layer.name.startswith("__myl_") else []
