"""Tensors of a transformer by name: read from safetensors one at a time, or shapes without values."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ditf.runtime.errors import InputError
from ditf.runtime.files.reading import open_regular

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4}


class Weights(ABC):
    """Tensors by name.

    Attributes:
        shapes: {name: shape} of all tensors.
        bytes_of: {name: size in bytes}, as stored.
        read: names of the tensors that were read so far; all others were not needed.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], bytes_of: Mapping[str, int]) -> None:
        self.shapes = dict(shapes)
        self.bytes_of = dict(bytes_of)
        self.read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def numel(self, name: str) -> int:
        """Number of elements of one tensor; the tensor is not read."""
        return math.prod(self.shapes[name])

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor in float32.

        Raises:
            InputError: the tensor does not exist, cannot be read, or holds NaN or infinity.
        """
        if name not in self.shapes:
            raise InputError(
                f"the checkpoint has no tensor {name}", "its config and its weights do not belong together"
            )
        self.read.add(name)
        return self._load(name)

    @abstractmethod
    def _load(self, name: str) -> torch.Tensor: ...

    def load_into(self, make: Callable[[], torch.nn.Module], prefix: str) -> torch.nn.Module:
        """Make a module and fill its parameters from the tensors under `prefix`; returns it in eval mode.

        Raises:
            InputError: a tensor is missing or has another shape.
        """
        with torch.device("meta"):
            module = make()
        state = {name: self.tensor(f"{prefix}.{name}") for name in module.state_dict()}
        try:
            module.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise InputError(
                f"{prefix}: {str(error).splitlines()[-1].strip()}",
                "the checkpoint's config and weights do not belong together",
            ) from error
        return module.eval().requires_grad_(False)


class SafetensorsWeights(Weights):
    """Weights in safetensors files; each tensor is read when it is asked for.

    Raises (when made and when a tensor is read):
        InputError: a file is missing, truncated or not safetensors.
    """

    def __init__(self, files: list[Path]) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        bytes_of: dict[str, int] = {}
        self._file_of: dict[str, Path] = {}
        for path in files:
            with _open_safetensors(path) as file:
                for name in file.keys():  # noqa: SIM118  (safe_open is no dict)
                    part = file.get_slice(name)
                    shapes[name] = tuple(part.get_shape())
                    bytes_of[name] = _BYTES.get(part.get_dtype(), 4) * math.prod(shapes[name])
                    self._file_of[name] = path
        super().__init__(shapes, bytes_of)

    def fingerprint(self) -> str:
        """A hash of the names, shapes and first rows of all tensors; it does not depend on the location.

        Returns:
            16 hexadecimal digits.
        """
        digest = hashlib.sha256()
        by_file: dict[Path, list[str]] = {}
        for name in sorted(self.shapes):
            by_file.setdefault(self._file_of[name], []).append(name)
        rows: dict[str, bytes] = {}
        for path, names in by_file.items():
            with _open_safetensors(path) as file:
                for name in names:
                    part = file.get_slice(name)
                    row = part[:1] if self.shapes[name] else file.get_tensor(name)
                    rows[name] = row.to(torch.float32).numpy().tobytes()
        for name in sorted(rows):
            digest.update(f"{name} {self.shapes[name]}".encode())
            digest.update(rows[name])
        return digest.hexdigest()[:16]

    def _load(self, name: str) -> torch.Tensor:
        with _open_safetensors(self._file_of[name]) as file:
            tensor: torch.Tensor = file.get_tensor(name).to(torch.float32)
        # isfinite of the whole tensor would take as much memory as the tensor.
        if not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
            raise InputError(
                f"tensor {name} of {self._file_of[name]} holds NaN or infinity",
                "the checkpoint is damaged: download or save it again",
            )
        return tensor


class MetaWeights(Weights):
    """Shapes without values, to count what a graph made from a config would hold."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(shapes, {name: 4 * math.prod(shape) for name, shape in shapes.items()})

    def _load(self, name: str) -> torch.Tensor:
        return torch.empty(self.shapes[name], device="meta")


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        open_regular(path).close()  # safe_open would wait for a FIFO
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path} is not a readable safetensors file ({reason})", "download the checkpoint again"
        ) from error
