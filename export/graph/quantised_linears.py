"""W8A8 linears as Q/DQ nodes, which is the only form of INT8 that TensorRT 11 takes, and their smoothing.

Weights are symmetric int8 per output channel. Activations are symmetric int8 per tensor, scaled by the
largest values of the calibration. One massive channel in an activation would leave the others a handful of
steps, so a factor for each channel moves from the activation to the weights that read it, as in SmoothQuant
(Xiao et al. 2023, equation 4, alpha 0.5), which DiTAS (Dong et al. 2024) applies to Diffusion Transformers.
ditf does so where it costs nothing: into a norm's affine parameters, into the values that an output
projection reads, and into the linear half of the gated feed-forwards of AuraFlow, Lumina-Image 2.0 and
Z-Image. It does not do so between GELU and the down-projection, in FLUX.2's gated feed-forwards, or before a
query that reads the residual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
"""The largest |x| of every input channel [C_in] of each linear, by the linear's path in the trunk."""


@torch.library.custom_op("ditf::quantize", mutates_args=())
def quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """ONNX QuantizeLinear from float32 to int8: rounds half to even and saturates. The scale is a scalar."""
    levels = torch.round(x / scale) + zero_point
    return levels.clamp(-128, 127).to(torch.int8)


@quantize.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, dtype=torch.int8)


@torch.library.custom_op("ditf::dequantize", mutates_args=())
def dequantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """ONNX DequantizeLinear from int8 to float32. The scale is a scalar, or as long as the last axis."""
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
"""How torch.onnx.export writes the operators above."""


class QuantisedLinear(nn.Module):
    """Computes x W + b with x and W in int8; the result has the type of the linear that it replaces.

    Args:
        linear: the linear, its weight [in, out].
        largest: the largest |x| that the activation reaches.
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
        # ONNX Runtime reads uint8 where there is no zero point, so it is written out.
        self.input_zero = constant(torch.zeros((), dtype=torch.int8))
        self.bias = None if linear.bias is None else constant(linear.bias.to(torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        short = quantize(x.to(torch.float32), self.input_scale, self.input_zero)
        activation = dequantize(short, self.input_scale, self.input_zero)
        y = activation @ dequantize(self.weight, self.weight_scale, self.weight_zero)
        return (y if self.bias is None else y + self.bias).to(self.dtype)


def quantisable(trunk: nn.Module) -> Iterator[tuple[str, Linear]]:
    """The linears of a trunk that int8 quantises, by path: those in float16.

    Linears that the recipe keeps in float32 are not quantised, nor is the folded cross-attention, whose
    softmax over few tokens needs more than 8 bits.
    """
    kept = tuple(f"{name}." for name, m in trunk.named_modules() if isinstance(m, FoldedCrossAttention))
    for name, module in trunk.named_modules():
        if isinstance(module, Linear) and module.weight.dtype == torch.float16 and not name.startswith(kept):
            yield name, module


@torch.no_grad()
def quantise(trunk: nn.Module, maxima: InputMaxima, smooth: bool = True) -> list[str]:
    """Replace the linears of a trunk's blocks by quantised ones, in place.

    Args:
        trunk: its blocks name the `smoothings` that they allow.
        maxima: of every linear, measured on the same trunk before it is smoothed.
        smooth: False for a naive quantisation, to compare with.

    Returns:
        Paths of the linears that were quantised: the `quantisable` ones that were measured.
    """
    largest = {name: values.clone() for name, values in maxima.items()}
    if smooth:
        for name, block in trunk.named_modules():
            for smoothing in getattr(block, "smoothings", tuple)():
                _apply(block, f"{name}." if name else "", smoothing, largest)
    quantised = [(name, linear) for name, linear in quantisable(trunk) if name in largest]
    for name, linear in quantised:
        parent, _, child = name.rpartition(".")
        setattr(trunk.get_submodule(parent), child, QuantisedLinear(linear, float(largest[name].max())))
    return [name for name, _ in quantised]


def _apply(block: nn.Module, prefix: str, smoothing: Smoothing, largest: dict[str, torch.Tensor]) -> None:
    """Move the factors of one smoothing from activations to weights; `largest` follows, in place."""
    span = smoothing.channels
    parts = []  # the rows of each reader's weight and its maxima, as views
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
