"""One tensor of a model that its files hold as several: quantised values, and what makes numbers of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ditf.runtime.errors import InputError

PLAIN_FILES = "take the bf16 or float16 files of this model"
SAVE_DEQUANTISED = "save the model after model.dequantize(), or take its bf16 or float16 files"


@dataclass(frozen=True)
class QuantisedTensor:
    """How to read one tensor.

    Attributes:
        shape: of the tensor, which may differ from that of the stored values.
        read: names of the stored tensors that make it, the values first.
        ignored: names of stored tensors that belong to it without changing it, as scales of activations do.
        decode: makes the tensor in float32 from the stored tensors of `read`, in that order.
    """

    shape: tuple[int, ...]
    read: tuple[str, ...]
    ignored: tuple[str, ...]
    decode: Callable[..., torch.Tensor]


def damaged(source: str, problem: str) -> InputError:
    """The error for a quantised tensor whose parts do not fit together."""
    return InputError(f"{source} cannot be dequantised: {problem}", f"download it again, or {PLAIN_FILES}")
