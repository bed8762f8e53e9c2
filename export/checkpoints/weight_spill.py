"""Weights of a graph in a temporary file instead of memory, so that a model of any size can be exported.

Every weight of a traced graph passes through `layers.constant`, which asks `spilled` where it is to be.
While a `Scratch` is open that is a file without a name, mapped into memory: whatever reads the weight finds
it, the kernel may take its pages back at any time, and `resting` gives them back early. The
tensors are ordinary ones, and their values what they would have been.
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
"""Bytes of the smallest tensor that is spilled."""

_SEGMENT = 1 << 30
"""Bytes of the file that are mapped at once."""

_ALIGNMENT = 64

_RESIDENT = 256 << 20
"""Bytes of mapped weights that are read before their pages are given back."""

Progress = Callable[[int], None]


class Scratch:
    """A file without a name that holds tensors; it vanishes with its last tensor, or with the process.

    Args:
        folder: on a file system with room for the weights.
        progress: called with the bytes written so far.
    """

    def __init__(self, folder: Path, progress: Progress = lambda written: None) -> None:
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed by `spilling`)
        self._progress = progress
        self._maps: list[mmap.mmap] = []
        self._start = self._used = 0  # of the last mapping: where it is in the file, and how much of it
        self._read = 0
        self.written = 0

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values in the file.

        Raises:
            InputError: no room.
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
        """Where in the last mapping so many bytes go. A mapping has many tensors: each takes a descriptor."""
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if not self._maps or start + size > len(self._maps[-1]):
            self._start = os.fstat(self._file.fileno()).st_size
            length = -(-max(size, _SEGMENT) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            os.ftruncate(self._file.fileno(), self._start + length)  # what is not written takes no room
            self._maps.append(mmap.mmap(self._file.fileno(), length, offset=self._start))
            start = 0
        return start

    def has_read(self, size: int) -> None:
        """Some bytes of mapped weights were read; gives their pages back once they are many."""
        self._read += size
        if self._read > _RESIDENT:
            self.rest()

    def rest(self) -> None:
        """Give the pages of all tensors back; what reads them again finds them in the file."""
        self._read = 0
        if hasattr(mmap, "MADV_DONTNEED"):  # elsewhere the kernel decides alone
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """No more tensors; those there are stay."""
        self._file.close()
        self._maps.clear()


_open: ContextVar[Scratch | None] = ContextVar("scratch", default=None)


@contextmanager
def spilling(folder: Path, progress: Progress = lambda written: None) -> Iterator[Scratch]:
    """Weights that are made inside are in a file in `folder`."""
    scratch = Scratch(folder, progress)
    token = _open.set(scratch)
    try:
        yield scratch
    finally:
        _open.reset(token)
        scratch.close()


def spilled(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of a tensor: in the open scratch file if it is large, else in memory."""
    scratch = _open.get()
    if scratch is None or tensor.is_meta or tensor.numel() * tensor.element_size() < SMALLEST:
        return tensor.clone(memory_format=torch.contiguous_format)
    return scratch.keep(tensor)


class _Resting(TorchDispatchMode):
    """Counts the weights that operators read."""

    def __init__(self, scratch: Scratch) -> None:
        super().__init__()
        self._scratch = scratch

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
                self._scratch.has_read(leaf.numel() * leaf.element_size())
        return result


@contextmanager
def resting() -> Iterator[None]:
    """Operators inside leave few pages of weights behind them."""
    scratch = _open.get()
    if scratch is None or not scratch.written:
        yield
        return
    with _Resting(scratch):
        yield
    scratch.rest()


def rest() -> None:
    """Give the pages of spilled weights back now."""
    scratch = _open.get()
    if scratch is not None:
        scratch.rest()
