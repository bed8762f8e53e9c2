"""Tensors of a model by name: read one at a time, or shapes without values."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch

from ditf.runtime.errors import InputError

WHOLE_NUMBERS = ("I64", "U64", "I32", "U32", "I16", "U16", "I8", "U8", "BOOL")
"""Types that hold no floating-point numbers: indices, counters, masks, and values of quantised weights."""


class Weights(ABC):
    """Tensors by name.

    The classes of `ditf.export.checkpoints.formats` read them from files, or change those of another object.

    Attributes:
        shapes: {name: shape} of all tensors.
        bytes_of: {name: size in bytes}, as stored.
        dtypes: {name: type as stored}, named as in safetensors: "F32", "BF16", "I8".
        read: names of the tensors that were read so far; all others were not needed.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], bytes_of: Mapping[str, int], dtypes: Mapping[str, str]
    ) -> None:
        self.shapes = dict(shapes)
        self.bytes_of = dict(bytes_of)
        self.dtypes = dict(dtypes)
        self.read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def numel(self, name: str) -> int:
        """Number of elements of one tensor; the tensor is not read."""
        return math.prod(self.shapes[name])

    def source(self, name: str) -> str:
        """The tensor and where it is stored, for a message."""
        return f"tensor {name}"

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
        tensor = self._load(name)
        # isfinite of the whole tensor would take as much memory as the tensor.
        if not tensor.is_meta and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
            raise InputError(
                f"{self.source(name)} holds NaN or infinity",
                "the checkpoint is damaged: download or save it again",
            )
        return tensor

    @abstractmethod
    def _load(self, name: str) -> torch.Tensor:
        """One tensor in float32."""

    def fingerprint(self) -> str:
        """A hash of the names, shapes and first rows of all tensors; it does not depend on the location.

        Returns:
            16 hexadecimal digits.
        """
        digest = hashlib.sha256()
        for name in sorted(self.shapes):
            digest.update(f"{name} {self.shapes[name]}".encode())
            digest.update(self._first_row(name).contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _first_row(self, name: str) -> torch.Tensor:
        """The first row of a tensor in float32, or the whole of a scalar."""
        tensor = self._load(name)
        return tensor[:1] if tensor.ndim else tensor

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


class MetaWeights(Weights):
    """Shapes without values, to count what a graph made from a config would hold."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        bytes_of = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
        super().__init__(shapes, bytes_of, dict.fromkeys(shapes, "F32"))

    def _load(self, name: str) -> torch.Tensor:
        return torch.empty(self.shapes[name], device="meta")
