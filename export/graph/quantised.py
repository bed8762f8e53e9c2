"""W8A8 linears as Q/DQ nodes, the only form of INT8 that TensorRT 11 takes, and what massive channels need.

Weights are symmetric int8 per output channel, activations symmetric int8 per tensor from the calibration's
largest values. One massive channel in an activation would leave the others a handful of steps; a factor for
each channel moves from the activation to the weights that read it, as in SmoothQuant (Xiao et al. 2023,
equation 4, alpha 0.5), which DiTAS (Dong et al. 2024) applies to Diffusion Transformers. Only where that is
free: into a norm's own affine parameters, into the values that an output projection reads, and into the
linear half of a gated feed-forward. Not between GELU and the down-projection, nor before a query that reads
the residual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from onnxscript import opset20
from torch import nn

from ditf.export.graph.blocks.adaln import ModulatedNorm, ModulatedRMSNorm
from ditf.export.graph.blocks.dit import FoldedCrossAttention
from ditf.export.graph.blocks.layers import Linear, constant
from ditf.export.graph.blocks.smoothing import Channels, Smoothing

ALPHA = 0.5
_LEVELS = 127.0

InputMaxima = Mapping[str, torch.Tensor]
"""Largest |x| of every input channel [C_in] of a linear, by the linear's path in the trunk."""


@torch.library.custom_op("ditf::quantize", mutates_args=())
def quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """ONNX QuantizeLinear: round half to even, saturate. Float32 to int8; the scale is a scalar."""
    levels = torch.round(x / scale) + zero_point
    return levels.clamp(-128, 127).to(torch.int8)


@quantize.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, dtype=torch.int8)


@torch.library.custom_op("ditf::dequantize", mutates_args=())
def dequantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """ONNX DequantizeLinear: int8 to float32; the scale is a scalar, or one for each of the last axis."""
    return (x.to(torch.float32) - zero_point) * scale


@dequantize.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, dtype=torch.float32)


def _onnx_quantize(x: Any, scale: Any, zero_point: Any) -> Any:
    return opset20.QuantizeLinear(x, scale, zero_point)


def _onnx_dequantize(x: Any, scale: Any, zero_point: Any) -> Any:
    return opset20.DequantizeLinear(x, scale, zero_point, axis=-1)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.ditf.quantize.default: _onnx_quantize,
    torch.ops.ditf.dequantize.default: _onnx_dequantize,
}
"""For torch.onnx.export."""


class QuantisedLinear(nn.Module):
    """x W + b with x and W in int8, in the type of the linear that it replaces.

    Args:
        linear: weight [in, out].
        largest: |x| that the activation reaches.
    """

    def __init__(self, linear: Linear, largest: float) -> None:
        super().__init__()
        weight = linear.weight.to(torch.float32)
        scale = weight.abs().amax(dim=0).clamp(min=1e-12) / _LEVELS
        self.dtype = linear.weight.dtype
        self.where = linear.where
        self.weight = constant(torch.round(weight / scale).clamp(-_LEVELS, _LEVELS).to(torch.int8))
        self.weight_scale = constant(scale)
        self.weight_zero = constant(torch.zeros(len(scale), dtype=torch.int8))
        self.input_scale = constant(torch.tensor(max(largest, 1e-12) / _LEVELS))
        # Written out: where it is left out ONNX Runtime reads uint8.
        self.input_zero = constant(torch.zeros((), dtype=torch.int8))
        self.bias = None if linear.bias is None else constant(linear.bias.to(torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        short = quantize(x.to(torch.float32), self.input_scale, self.input_zero)
        activation = dequantize(short, self.input_scale, self.input_zero)
        y = activation @ dequantize(self.weight, self.weight_scale, self.weight_zero)
        return (y if self.bias is None else y + self.bias).to(self.dtype)


@torch.no_grad()
def quantise(trunk: nn.Module, maxima: InputMaxima, smooth: bool = True) -> list[str]:
    """Replace the linears of a trunk's blocks by quantised ones, in place.

    Args:
        trunk: its blocks say what `smoothings` they allow.
        maxima: of every linear, measured on the same trunk unsmoothed.
        smooth: False for a naive quantisation, to compare with.

    Returns:
        Paths of the linears that were quantised: those in float16; the recipe's float32 ones stay.
    """
    largest = {name: values.clone() for name, values in maxima.items()}
    if smooth:
        for name, block in trunk.named_modules():
            for smoothing in getattr(block, "smoothings", tuple)():
                _apply(block, f"{name}." if name else "", smoothing, largest)
    quantised = []
    # A softmax over few tokens needs more levels than 128 of them.
    kept = tuple(f"{name}." for name, m in trunk.named_modules() if isinstance(m, FoldedCrossAttention))
    for name, linear in list(trunk.named_modules()):
        if not isinstance(linear, Linear) or name not in largest or name.startswith(kept):
            continue
        if linear.weight.dtype == torch.float16:
            parent, _, child = name.rpartition(".")
            setattr(trunk.get_submodule(parent), child, QuantisedLinear(linear, float(largest[name].max())))
            quantised.append(name)
    return quantised


def _apply(block: nn.Module, prefix: str, smoothing: Smoothing, largest: dict[str, torch.Tensor]) -> None:
    """Move the factors of one smoothing; the maxima follow."""
    span = smoothing.channels
    parts = []  # of each reader: its weights' rows and its maxima, both views
    for reader in smoothing.readers:
        rows = slice(reader.start, reader.start + span)
        parts.append((_linear(block, reader).weight[rows], largest[prefix + reader.path][rows]))
    activation = torch.stack([maxima for _, maxima in parts]).amax(dim=0)
    weight = torch.stack([w.to(torch.float32).abs().amax(dim=1) for w, _ in parts]).amax(dim=0)
    factor = activation.clamp(min=1e-5) ** ALPHA / weight.clamp(min=1e-5) ** (1 - ALPHA)
    factor = torch.where(activation > 0, factor, 1.0).clamp(1e-3, 1e3)
    for rows_of_weight, maxima in parts:
        rows_of_weight.copy_(rows_of_weight.to(torch.float32) * factor[:, None])
        maxima /= factor
    if smoothing.norm:
        norm = block.get_submodule(smoothing.norm)
        assert isinstance(norm, (ModulatedNorm, ModulatedRMSNorm))
        norm.divide(factor)
    for maker in smoothing.makers:
        for parameter in _linear(block, maker).parameters():
            made = parameter[..., maker.start : maker.start + span]
            made.copy_(made.to(torch.float32) / factor)
    for name in smoothing.constants:
        value = block.get_parameter(name)
        heads = factor.unflatten(0, (value.shape[1], 1, value.shape[3]))
        value.copy_(value.to(torch.float32) / heads)


def _linear(block: nn.Module, channels: Channels) -> Linear:
    linear = block.get_submodule(channels.path)
    assert isinstance(linear, Linear)
    return linear
