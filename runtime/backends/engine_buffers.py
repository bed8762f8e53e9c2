"""The memory that a plan's tensors and its scratch live in, which stays between runs and grows on demand."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Union

import numpy as np

from ditf.runtime.backends.cuda import Cuda, DeviceArray, Pinned, array_bytes

Array = Union[np.ndarray, DeviceArray]
Shapes = dict[str, tuple[int, ...]]

_SCRATCH = ""  # beside the tensors' names, which are never empty
_ALIGNMENT = 256  # of scratch memory, bytes


@dataclass
class _Block:
    address: int = 0
    nbytes: int = 0


class EngineBuffers:
    """Device memory for each tensor and for scratch, and pinned host memory for copies from and to it.

    All shapes share it, so only one run at a time may use it.

    Args:
        dtypes: {tensor: dtype} of all inputs and outputs.

    Attributes:
        version: another number whenever an address changes. Contexts and graphs hold addresses, so whoever
            uses one compares this first.
    """

    def __init__(self, cuda: Cuda, dtypes: Mapping[str, np.dtype[Any]]) -> None:
        self._cuda = cuda
        self._dtypes = dtypes
        self._blocks = {name: _Block() for name in (*dtypes, _SCRATCH)}
        self._pinned = {name: Pinned(cuda) for name in dtypes}
        self.version = 0

    @property
    def nbytes(self) -> int:
        """The device memory that is allocated."""
        return sum(block.nbytes for block in self._blocks.values())

    @property
    def scratch(self) -> tuple[int, int]:
        """The address and size of the scratch memory."""
        block = self._blocks[_SCRATCH]
        return block.address, block.nbytes

    def address(self, name: str) -> int:
        """The address of a tensor."""
        return self._blocks[name].address

    def reserve(self, shapes: Shapes, scratch: int) -> None:
        """Make every block large enough. The stream must be idle.

        Blocks that are too small are freed first, because nothing in them is needed. If an allocation fails,
        those blocks have no memory until the next call.

        Args:
            shapes: of the tensors.
            scratch: bytes.

        Raises:
            OutOfDeviceMemory: too little memory is free.
        """
        sizes = {name: max(1, array_bytes(shape, self._dtypes[name])) for name, shape in shapes.items()}
        sizes[_SCRATCH] = -(-max(1, scratch) // _ALIGNMENT) * _ALIGNMENT
        small = [name for name, nbytes in sizes.items() if nbytes > self._blocks[name].nbytes]
        for name in small:
            self._free(name)
        for name in small:
            self._blocks[name] = _Block(self._cuda.allocate(sizes[name]), sizes[name])

    def put(self, name: str, value: Array, stream: Any) -> None:
        """Queue the copy of an input into its block."""
        source = value.address if isinstance(value, DeviceArray) else self._staged(name, value)
        self._cuda.copy(self.address(name), source, value.nbytes, stream)

    def _staged(self, name: str, value: np.ndarray) -> int:
        pinned = self._pinned[name]
        pinned.array(value.shape, value.dtype)[...] = value
        return pinned.address

    def fetch(self, name: str, shape: tuple[int, ...], stream: Any) -> np.ndarray:
        """Queue the copy of an output into pinned memory, which the next `fetch` of it overwrites."""
        array = self._pinned[name].array(shape, self._dtypes[name])
        self._cuda.copy(self._pinned[name].address, self.address(name), array.nbytes, stream)
        return array

    def fetch_into(self, kept: DeviceArray, name: str, stream: Any) -> None:
        """Queue the copy of an output into an array in device memory."""
        self._cuda.copy(kept.address, self.address(name), kept.nbytes, stream)

    def close(self) -> None:
        """Free everything. After an error the rest is still freed, and then the error is raised."""
        with ExitStack() as stack:
            for pinned in self._pinned.values():
                stack.callback(pinned.close)
            for name in self._blocks:
                stack.callback(self._free, name)

    def _free(self, name: str) -> None:
        block, self._blocks[name] = self._blocks[name], _Block()
        self.version += 1
        if block.address:
            self._cuda.free(block.address)
