"""Quantised weights as the numbers that they stand for, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ditf.export.checkpoints.formats.quantised.bitsandbytes import bitsandbytes_tensors
from ditf.export.checkpoints.formats.quantised.refused import refuse_known, refuse_rest
from ditf.export.checkpoints.formats.quantised.scales import MARKER, comfy_layers, scaled_tensors
from ditf.export.checkpoints.formats.quantised.tensor import QuantisedTensor, damaged
from ditf.export.checkpoints.formats.safetensors_weights import SafetensorsWeights
from ditf.export.checkpoints.weights import Weights


def dequantised(stored: Weights, quantization_config: Mapping[str, Any] | None = None) -> Weights:
    """The numbers that stored tensors stand for.

    FP8 without scales is a type like any other. bitsandbytes, Quanto with 8 bits, and FP8 or int8 with scales
    are dequantised when a tensor is asked for. What else is quantised is refused here, before work starts.

    Args:
        stored: tensors as files hold them; a GGUF file decodes its own, and is returned as it is.
        quantization_config: that of the component's config.json; None if it has none.

    Returns:
        `stored` itself if nothing in it is quantised, else weights whose `shapes` are those of the model.
        Scales and other companions have no names there; their bytes are counted with their weight's.

    Raises:
        InputError: weights are quantised in a way that is not supported, or lack a scale; the message names
            the first such tensor.
    """
    if not isinstance(stored, SafetensorsWeights):
        return stored
    config = quantization_config or {}
    refuse_known(stored)
    layers, notes = comfy_layers(stored)
    marked = bool(layers or notes)
    found = {**scaled_tensors(stored, config, layers, marked), **bitsandbytes_tensors(stored)}
    scaled = next((name for name in notes if name.rpartition(".")[2] == MARKER), None)
    if scaled is not None and not any(tensor.factors for tensor in found.values()):
        raise damaged(stored.source(scaled), "it says that FP8 weights have scales, and none has one")
    claimed = {part for tensor in found.values() for part in tensor.parts}
    plain_fp8 = marked or not (found or config.get("quant_method"))
    refuse_rest(stored, [name for name in stored.shapes if name not in claimed | notes], config, plain_fp8)
    return _Dequantised(stored, found, claimed | notes) if found or notes else stored


class _Dequantised(Weights):
    """Weights of which some are dequantised when they are read.

    Args:
        stored: the tensors as stored.
        found: {name: how to read it}.
        hidden: names of stored tensors that are no tensors of the model.
    """

    def __init__(
        self, stored: SafetensorsWeights, found: Mapping[str, QuantisedTensor], hidden: set[str]
    ) -> None:
        self._stored = stored
        self._found = found
        plain = [name for name in stored.shapes if name not in hidden]
        super().__init__(
            {name: stored.shapes[name] for name in plain} | {name: found[name].shape for name in found},
            {name: stored.bytes_of[name] for name in plain}
            | {name: sum(stored.bytes_of[part] for part in tensor.parts) for name, tensor in found.items()},
            {name: stored.dtypes[name] for name in plain} | dict.fromkeys(found, "F32"),
        )

    def source(self, name: str) -> str:
        return self._stored.source(self._found[name].values if name in self._found else name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name not in self._found:
            return self._stored.rows(name, start, stop)
        tensor = self._found[name]
        values = self._stored.raw_rows(tensor.values, *tensor.stored_rows(start, stop))
        factors = self._stored.raws(tensor.factors)
        return tensor.decode(values, *(factors[part] for part in tensor.factors), start=start, stop=stop)

    def _load(self, name: str) -> torch.Tensor:
        if name not in self._found:
            return self._stored.raw(name).to(torch.float32)
        return self.rows(name, 0, self.shapes[name][0])
