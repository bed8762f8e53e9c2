"""Weights that bitsandbytes has quantised to 8 bits (LLM.int8) or 4 bits (NF4, FP4).

8 bits: `weight` [n, k] int8 and `SCB` [n], the largest absolute value of each row. The number is
weight * SCB / 127.

4 bits: `weight` holds two indices a byte, the first in the high half. An index selects one of the 16 numbers
of `weight.quant_map`, which is multiplied by the `weight.absmax` of its block of consecutive elements. If
absmax is quantised too, its bytes index the 256 numbers of `weight.nested_quant_map`, which are multiplied by
the `weight.nested_absmax` of their block; then nested_offset is added. Block sizes, offset and shape are JSON
in `weight.quant_state.bitsandbytes__nf4` (or `__fp4`). ComfyUI's NF4 files are the same.

Sources: `bitsandbytes.functional` (QuantState, int8_vectorwise_dequant) and `backends/default/ops.py` of
bitsandbytes. It rounds the numbers to the type that was quantised; here they stay float32.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ditf.export.checkpoints.formats.quantised.tensor import SAVE_DEQUANTISED, QuantisedTensor, damaged
from ditf.export.checkpoints.formats.safetensors_weights import SafetensorsWeights
from ditf.runtime.errors import InputError

_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(?:nf4|fp4)")


def bitsandbytes_tensors(stored: SafetensorsWeights) -> dict[str, QuantisedTensor]:
    """The weights that bitsandbytes has quantised: {name: how to read it}.

    Raises:
        InputError: the parts of a weight do not fit together.
    """
    names = [name for name in stored.shapes if name.rpartition(".")[2] == "SCB"]
    formats = [name.removesuffix("SCB") + "weight_format" for name in names]
    laid_out = stored.raws([name for name in formats if name in stored])
    found = {}
    for name, laid in zip(names, formats, strict=True):
        weight = name.removesuffix("SCB") + "weight"
        if laid in laid_out and laid_out[laid].any():  # 0: row after row
            raise InputError(f"{stored.source(weight)} is in a GPU's own order of elements", SAVE_DEQUANTISED)
        found[weight] = _eight_bits(stored, weight, name, (laid,) if laid in laid_out else ())
    states = {name: match[1] for name in stored.shapes if (match := _STATE.fullmatch(name))}
    for name, state in stored.raws(list(states)).items():
        found[states[name]] = _four_bits(stored, states[name], name, state)
    return found


def _eight_bits(
    stored: SafetensorsWeights, weight: str, scale: str, ignored: tuple[str, ...]
) -> QuantisedTensor:
    shape = stored.shapes.get(weight, ())
    if stored.dtypes.get(weight) != "I8" or len(shape) != 2 or math.prod(stored.shapes[scale]) != shape[0]:
        raise damaged(stored.source(scale), f"{weight} is {stored.dtypes.get(weight)} {list(shape)}")
    return QuantisedTensor(shape, weight, (scale,), ignored, _decoded_eight)


def _decoded_eight(values: torch.Tensor, largest: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return values.float().mul_(largest.float().reshape(-1, 1)[start:stop] / 127)


def _four_bits(stored: SafetensorsWeights, weight: str, name: str, state: torch.Tensor) -> QuantisedTensor:
    parts = [weight, f"{weight}.absmax", f"{weight}.quant_map"]
    try:
        found = json.loads(bytes(state.to(torch.uint8).tolist()))
        shape = tuple(_size(length) for length in found["shape"])
        block = 2 * _size(found["blocksize"] / 2)  # of whole bytes
        nested: dict[str, Any] = {}
        if f"{weight}.nested_absmax" in stored:
            parts += [f"{weight}.nested_absmax", f"{weight}.nested_quant_map"]
            nested = {
                "nested_block": _size(found["nested_blocksize"]),
                "offset": float(found["nested_offset"]),
            }
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise damaged(stored.source(name), f"it cannot be read ({error!a:.80})") from error
    for part, size in _expected_sizes(parts, shape, block, nested).items():
        if part not in stored:
            raise damaged(stored.source(name), f"{part} is missing")
        # The packed bytes may be stored under the name of a wider type.
        stored_size = stored.bytes_of[part] if part == weight else math.prod(stored.shapes[part])
        if stored_size != size or not stored.shapes[part]:
            raise damaged(stored.source(weight), f"{part} has the size {stored_size}, not {size}")
    packed = _Packed(shape, block, stored.shapes[weight], stored.bytes_of[weight], **nested)
    return QuantisedTensor(shape, weight, tuple(parts[1:]), (name,), packed.decoded, packed.stored_rows)


def _size(value: Any) -> int:
    if isinstance(value, bool) or value != int(value) or value <= 0:
        raise ValueError(f"{value!r} is no size")
    return int(value)


def _expected_sizes(
    parts: list[str], shape: tuple[int, ...], block: int, nested: Mapping[str, Any]
) -> dict[str, int]:
    elements = math.prod(shape)
    blocks = -(-elements // block)
    sizes = [-(-elements // 2), blocks, 16]
    if nested:
        sizes += [-(-blocks // nested["nested_block"]), 256]
    return dict(zip(parts, sizes, strict=True))


@dataclass(frozen=True)
class _Packed:
    """Where the elements of a tensor of 4 bits lie.

    Attributes:
        shape: of the tensor.
        block: elements that share a factor; an even number.
        stored: shape of the stored bytes, mostly [bytes, 1].
        size: number of the stored bytes.
        nested_block: blocks that share a factor of second order, or 0.
        offset: of the factors, where they are quantised too.
    """

    shape: tuple[int, ...]
    block: int
    stored: tuple[int, ...]
    size: int
    nested_block: int = 0
    offset: float = 0.0

    def _blocks(self, start: int, stop: int) -> tuple[int, int]:
        """The blocks that hold rows start..stop-1."""
        row = math.prod(self.shape[1:])
        return start * row // self.block, -(-stop * row // self.block)

    def stored_rows(self, start: int, stop: int) -> tuple[int, int]:
        first, last = self._blocks(start, stop)
        row = self.size // self.stored[0]  # bytes; one, unless they are stored as a wider type
        if self.stored[0] == 1 or self.block // 2 % row:
            return 0, self.stored[0]
        return first * self.block // 2 // row, min(-(-last * self.block // 2 // row), self.stored[0])

    def decoded(
        self,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        code: torch.Tensor,
        *nested: torch.Tensor,
        start: int,
        stop: int,
    ) -> torch.Tensor:
        first, last = self._blocks(start, stop)
        if nested:
            numbers = nested[1].float()[absmax.reshape(-1).int()]
            absmax = _by_blocks(numbers, nested[0], self.nested_block) + self.offset
        code = code.float().reshape(16)
        pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)  # [256, 2]: of each byte
        indices = packed.reshape(-1).view(torch.uint8)
        if len(indices) == self.size:  # the whole was read
            indices = indices[first * self.block // 2 : -(-last * self.block // 2)]
        values = pairs.index_select(0, indices.int()).reshape(-1)
        row = math.prod(self.shape[1:])
        begin = first * self.block
        values = values[: min(last * self.block, math.prod(self.shape)) - begin]
        values = _by_blocks(values, absmax.reshape(-1)[first:last], self.block)
        return values[start * row - begin : stop * row - begin].reshape(stop - start, *self.shape[1:])


def _by_blocks(values: torch.Tensor, factors: torch.Tensor, block: int) -> torch.Tensor:
    """Multiply consecutive blocks of values by their factors, in place; the last block may be shorter."""
    factors = factors.float().reshape(-1)
    whole = len(values) // block
    values[: whole * block].view(-1, block).mul_(factors[:whole, None])
    if whole < len(factors):
        values[whole * block :].mul_(factors[whole])
    return values
