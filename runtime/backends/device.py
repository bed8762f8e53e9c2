"""`--device`: the GPU or the CPU that runs a model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ditf.runtime.backends.gpu import find_gpus
from ditf.runtime.errors import InputError, MissingComponent


@dataclass(frozen=True)
class Device:
    """Where a model runs.

    Attributes:
        index: the number of the GPU, as CUDA_VISIBLE_DEVICES leaves it; None for the CPU.
    """

    index: int | None

    def __str__(self) -> str:
        return "cpu" if self.index is None else f"cuda:{self.index}"


def parse_device(text: str) -> Device:
    """Parse "cpu", "cuda" (the first GPU) or "cuda:N".

    Raises:
        InputError: the text is none of them; the fix names the GPUs that there are.
    """
    match = re.fullmatch(r"cpu|cuda(?::([0-9]{1,3}))?", text, re.ASCII)
    if match is None:
        raise InputError(f"device {text!r} is not cpu, cuda or cuda:N", _choices())
    return Device(None if text == "cpu" else int(match[1] or 0))


def find_device(text: str) -> Device:
    """Parse a device as `parse_device` does, and check that it exists.

    Raises:
        InputError: as `parse_device`.
        MissingComponent: there is no such GPU.
    """
    device = parse_device(text)
    if device.index is not None and device.index >= len(find_gpus()):
        raise MissingComponent(f"there is no {device} here", _choices())
    return device


def _choices() -> str:
    gpus = [f"cuda:{index} ({gpu})" for index, gpu in enumerate(find_gpus())]
    return f"choose {' or '.join(['cpu', *gpus])}" if gpus else "choose cpu: no NVIDIA driver answers"
