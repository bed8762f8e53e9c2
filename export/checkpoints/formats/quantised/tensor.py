"""One tensor of a model that its files hold as several: quantised values, and what makes numbers of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ditf.runtime.errors import InputError

PLAIN_FILES = "take the bf16 or float16 files of this model"
SAVE_DEQUANTISED = "save the model after model.dequantize(), or take its bf16 or float16 files"


def _same(start: int, stop: int) -> tuple[int, int]:
    return start, stop


@dataclass(frozen=True)
class QuantisedTensor:
    """How to read one tensor.

    Attributes:
        shape: of the tensor, which may differ from that of the stored values; it has at least one dimension.
        values: name of the stored tensor that has a number or an index for each element.
        factors: names of the stored tensors that the values are multiplied by, or select from.
        ignored: names of stored tensors that belong to it without changing it, as scales of activations do.
        decode: decode(values, *factors, start, stop) makes rows start..stop-1 of the tensor in float32 from
            the rows of the stored values that `stored_rows` says.
        stored_rows: (first, last + 1) of the rows of the stored values that hold rows start..stop-1.
    """

    shape: tuple[int, ...]
    values: str
    factors: tuple[str, ...]
    ignored: tuple[str, ...]
    decode: Callable[..., torch.Tensor]
    stored_rows: Callable[[int, int], tuple[int, int]] = _same

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of all stored tensors that are part of it."""
        return (self.values, *self.factors, *self.ignored)


def damaged(source: str, problem: str) -> InputError:
    """The error for a quantised tensor whose parts do not fit together."""
    return InputError(f"{source} cannot be dequantised: {problem}", f"download it again, or {PLAIN_FILES}")
