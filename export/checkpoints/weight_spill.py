"""Keeps a graph's weights in a temporary file instead of memory, so that models of any size can be exported.

Every weight of a traced graph passes through `layers.constant`, which calls `spilled`. Inside `spilling` the
weight is copied to a file without a name that is mapped into memory. The result is an ordinary tensor with
the same values; the kernel can take its pages back at any time, and `resting` gives them back early.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ditf.runtime.errors import InputError

SMALLEST = 1 << 20
"""Size in bytes of the smallest tensor that is spilled."""

_SEGMENT = 1 << 30
"""Bytes of the file in one memory mapping."""

_ALIGNMENT = 64

_RESIDENT = 256 << 20
"""Bytes of mapped weights that are read before their pages are given back."""


class SpillFile:
    """A file without a name that holds tensors. It vanishes with its last tensor, or with the process.

    Args:
        folder: on a file system with room for the weights.
        progress: called with the bytes written so far.
    """

    def __init__(self, folder: Path, progress: Callable[[int], None] = lambda written: None) -> None:
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed by `spilling`)
        self._progress = progress
        self._maps: list[mmap.mmap] = []
        self._start = self._used = 0  # the last mapping's offset in the file, and how much of it is used
        self._read = 0
        self.written = 0

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor to the file; returns a tensor that is mapped from there.

        Raises:
            InputError: the file cannot be written, as on a full disk.
        """
        size = tensor.numel() * tensor.element_size()
        try:
            start = self._room(size)
            self._file.seek(self._start + start)
            self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"weights cannot be written beside {self._folder} ({error.strerror})",
                "free some space, or choose another --output",
            ) from error
        self._used = start + size
        self.written += size
        self._progress(self.written)
        self.rest()
        values = torch.frombuffer(self._maps[-1], dtype=tensor.dtype, count=tensor.numel(), offset=start)
        return values.view(tensor.shape)

    def _room(self, size: int) -> int:
        """Reserve `size` bytes; returns their offset in the last mapping.

        Many tensors share a mapping, since each mapping takes a file descriptor.
        """
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if not self._maps or start + size > len(self._maps[-1]):
            self._start = os.fstat(self._file.fileno()).st_size
            length = -(-max(size, _SEGMENT) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            os.ftruncate(self._file.fileno(), self._start + length)  # pages that are not written take no room
            self._maps.append(mmap.mmap(self._file.fileno(), length, offset=self._start))
            start = 0
        return start

    def has_read(self, size: int) -> None:
        """Count bytes of mapped weights that were read, and give their pages back once they are many."""
        self._read += size
        if self._read > _RESIDENT:
            self.rest()

    def rest(self) -> None:
        """Give the pages of all tensors back; they are read from the file again when needed."""
        self._read = 0
        if hasattr(mmap, "MADV_DONTNEED"):  # other systems decide by themselves
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Close the file for further tensors; the tensors that it holds stay valid."""
        self._file.close()
        self._maps.clear()


_open: ContextVar[SpillFile | None] = ContextVar("spill_file", default=None)


@contextmanager
def spilling(folder: Path, progress: Callable[[int], None] = lambda written: None) -> Iterator[SpillFile]:
    """Keep the weights that are made inside the block in a file in `folder`; arguments as for `SpillFile`."""
    file = SpillFile(folder, progress)
    token = _open.set(file)
    try:
        yield file
    finally:
        _open.reset(token)
        file.close()


def spilled(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of a tensor, in the file of `spilling` if the tensor is large, else in memory."""
    file = _open.get()
    if file is None or tensor.is_meta or tensor.numel() * tensor.element_size() < SMALLEST:
        return tensor.clone(memory_format=torch.contiguous_format)
    return file.keep(tensor)


class _Resting(TorchDispatchMode):
    """Counts the bytes of weights that operators read."""

    def __init__(self, file: SpillFile) -> None:
        super().__init__()
        self._file = file

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(args):
            if isinstance(leaf, torch.nn.Parameter):
                self._file.has_read(leaf.numel() * leaf.element_size())
        return result


@contextmanager
def resting() -> Iterator[None]:
    """Give the pages of spilled weights back while the operators inside the block read them."""
    file = _open.get()
    if file is None or not file.written:
        yield
        return
    with _Resting(file):
        yield
    file.rest()


def rest() -> None:
    """Give the pages of all spilled weights back now."""
    file = _open.get()
    if file is not None:
        file.rest()
