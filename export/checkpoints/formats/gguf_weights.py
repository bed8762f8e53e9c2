"""Weights in a GGUF file, as ComfyUI-GGUF writes them; each tensor is decoded when it is asked for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ditf.export.checkpoints.formats.gguf_header import read_header
from ditf.export.checkpoints.weights import Weights
from ditf.runtime.errors import InputError
from ditf.runtime.files.reading import open_regular

_PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
"""Types whose elements are stored one by one, as numpy names them; the others are stored in blocks."""

_AT_ONCE = 4096
"""Blocks that are decoded at once, which bounds the memory beside the result."""


class GGUFWeights(Weights):
    """The tensors of a GGUF file, under the names that it stores.

    Blocks are decoded by the gguf package. Shapes are those of torch: GGUF lists the fastest dimension first.

    Attributes:
        architecture: what the file says the model is, such as "flux" or "sd3"; None if it does not say.
        metadata: {key: value} of the header, without long arrays.

    Raises (when made and when a tensor is read):
        InputError: the file is not readable GGUF, is truncated, is one of several parts, or holds a type that
            the installed gguf package cannot decode.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGMLQuantizationType

        header = read_header(path)
        self._path = path
        self._tensors = header.tensors
        self._kinds = {name: GGMLQuantizationType(tensor.kind) for name, tensor in header.tensors.items()}
        self.metadata = header.metadata
        architecture = header.metadata.get("general.architecture")
        self.architecture = architecture if isinstance(architecture, str) else None
        parts = header.metadata.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            raise InputError(f"{path} is one of {parts} parts", "join them with llama-gguf-split --merge")
        self._check_types()
        super().__init__(
            {name: tensor.shape for name, tensor in header.tensors.items()},
            {name: tensor.size for name, tensor in header.tensors.items()},
            {
                name: kind.name if kind.name in (*_PLAIN, "BF16") else "F32"
                for name, kind in self._kinds.items()
            },
        )

    def source(self, name: str) -> str:
        return f"tensor {name} of {self._path}"

    def _check_types(self) -> None:
        """Decode an empty block of each type that occurs."""
        first = {kind: name for name, kind in self._kinds.items()}
        for kind, name in first.items():
            try:
                _decoded(bytes(_block(kind)[1]), kind)
            except NotImplementedError as error:
                raise InputError(
                    f"{self.source(name)} has the type {kind.name}, which the gguf package cannot decode",
                    "use a file of another type, such as Q8_0, or the bf16 files",
                ) from error

    def _load(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        values = _decoded(self._bytes(tensor.start, tensor.size), self._kinds[name])
        return torch.from_numpy(values).reshape(tensor.shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor, kind = self._tensors[name], self._kinds[name]
        elements, size = _block(kind)
        first, last = (row * math.prod(tensor.shape[1:]) for row in (start, stop))
        if not tensor.shape or first % elements or last % elements:
            return super().rows(name, start, stop)  # a block may lie across rows that ComfyUI-GGUF has noted
        taken = self._bytes(tensor.start + first // elements * size, (last - first) // elements * size)
        return torch.from_numpy(_decoded(taken, kind)).reshape(stop - start, *tensor.shape[1:])

    def _bytes(self, start: int, count: int) -> bytes:
        try:
            with open_regular(self._path) as file:
                file.seek(start)
                taken = file.read(count)
        except OSError as error:
            raise InputError(f"{self._path} cannot be read ({error.strerror})", "check the path") from error
        if len(taken) < count:
            raise InputError(f"{self._path} was cut off while it was read", "download the file again")
        return taken


def _block(kind: Any) -> tuple[int, int]:
    """Elements and bytes of a block."""
    from gguf import GGML_QUANT_SIZES

    elements, size = GGML_QUANT_SIZES[kind]
    return int(elements), int(size)


def _decoded(stored: bytes, kind: Any) -> np.ndarray:
    """Whole blocks of a type as float32, in one dimension.

    Raises:
        NotImplementedError: the gguf package cannot decode the type.
    """
    from gguf.quants import dequantize

    if kind.name in _PLAIN:
        return np.frombuffer(stored, _PLAIN[kind.name]).astype(np.float32)
    if kind.name == "BF16":
        return (np.frombuffer(stored, "<u2").astype(np.uint32) << 16).view(np.float32)
    elements, size = _block(kind)
    blocks = np.frombuffer(stored, np.uint8).reshape(-1, size)
    values = np.empty(len(blocks) * elements, np.float32)
    for first in range(0, len(blocks), _AT_ONCE):
        part = blocks[first : first + _AT_ONCE]
        if len(part) == _AT_ONCE:  # dequantize works through 16 rows at a time
            part = part.reshape(16, -1)
        with np.errstate(over="ignore", invalid="ignore"):  # `Weights.tensor` finds NaN and infinity
            values[first * elements : (first + _AT_ONCE) * elements] = dequantize(part, kind).ravel()
    return values
