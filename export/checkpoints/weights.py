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
        dtypes: {name: type as stored}, named as in safetensors: "F32", "BF16", "I64"; "F32" for a tensor that
            its files hold as quantised values with scales.
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
            InputError: the tensor does not exist, cannot be read, is stored as whole numbers, or holds NaN or
                infinity.
        """
        if name not in self.shapes:
            raise InputError(
                f"the checkpoint has no tensor {name}", "its config and its weights do not belong together"
            )
        if self.dtypes[name] in WHOLE_NUMBERS:
            raise InputError(
                f"{self.source(name)} is stored as {self.dtypes[name]}, not as floating-point numbers",
                "take the bf16 or float16 files of this model",
            )
        self.read.add(name)
        tensor = self._load(name)
        # isfinite of the whole tensor would take as much memory as the tensor.
        valued = tensor.numel() and not tensor.is_meta
        if valued and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
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

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read rows start..stop-1 of a tensor in float32, or the whole of a scalar; no value is checked.

        Layers that store rows independently override it to read only these.
        """
        tensor = self._load(name)
        whole = not self.shapes[name] or (start, stop) == (0, self.shapes[name][0])
        return tensor if whole else tensor[start:stop].clone()  # a view would keep the whole tensor

    def _first_row(self, name: str) -> torch.Tensor:
        """The first row of a tensor in float32, or the whole of a scalar."""
        return self.rows(name, 0, 1)

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
