"""Weights in safetensors files; each tensor is read when it is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ditf.export.checkpoints.formats.file_kinds import unreadable
from ditf.export.checkpoints.weights import Weights
from ditf.runtime.files.reading import open_regular

_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4},
    **{"F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1},
}
"""Bytes of an element, by the name of its type in the format; all other types are floats of one byte."""


class SafetensorsWeights(Weights):
    """The tensors of safetensors files, as they are stored.

    Attributes:
        metadata: {key: text} of the files' headers.

    Raises (when made and when a tensor is read):
        InputError: a file is missing, truncated or not safetensors.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        bytes_of: dict[str, int] = {}
        self.metadata: dict[str, str] = {}
        self._file_of: dict[str, Path] = {}
        for path in files:
            with _open_safetensors(path) as file:
                self.metadata.update(file.metadata() or {})
                for name in file.keys():  # noqa: SIM118  (safe_open is no dict)
                    part = file.get_slice(name)
                    shapes[name], dtypes[name] = tuple(part.get_shape()), part.get_dtype()
                    bytes_of[name] = _BYTES.get(dtypes[name], 1) * math.prod(shapes[name])
                    self._file_of[name] = path
        super().__init__(shapes, bytes_of, dtypes)

    def raw(self, name: str) -> torch.Tensor:
        """Read one tensor in the type that it is stored in."""
        return self.raws([name])[name]

    def raws(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Read small tensors in the types that they are stored in; every file is opened once."""
        found: dict[str, torch.Tensor] = {}
        for path in {self._file_of[name]: None for name in names}:
            with _open_safetensors(path) as file:
                found.update({name: file.get_tensor(name) for name in names if self._file_of[name] == path})
        return found

    def source(self, name: str) -> str:
        return f"tensor {name} of {self._file_of[name]}"

    def _load(self, name: str) -> torch.Tensor:
        return self.raw(name).to(torch.float32)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if not self.shapes[name]:
            return self._load(name)
        return self.raw_rows(name, start, stop).to(torch.float32)

    def raw_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read rows start..stop-1 of a tensor in the type that it is stored in."""
        with _open_safetensors(self._file_of[name]) as file:
            part: torch.Tensor = file.get_slice(name)[start:stop]
        return part


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        open_regular(path).close()  # safe_open would wait for a FIFO
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise unreadable(path, reason) from error
