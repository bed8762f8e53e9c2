"""Files whose size and sha256 are recorded elsewhere, in a manifest or an engine's record."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Union

from ditf.runtime.errors import BundleError
from ditf.runtime.files.reading import open_regular

_BLOCK = 1 << 20

Content = Union[bytes, bytearray, memoryview, mmap.mmap]


@dataclass(frozen=True)
class HashedFile:
    """A file and its expected size and hash.

    `read` and `copy` open and read the file once, so what was hashed is what is used.

    Attributes:
        size: the expected size in bytes.
        sha256: the expected hex digest.
        fix: what a user can do if the file differs, for messages.
    """

    path: Path
    size: int
    sha256: str
    fix: str

    def check(self, contents: bool = True) -> None:
        """Compare the file's size, and with `contents` its hash, with what is expected.

        Raises:
            BundleError: the file is missing, truncated, altered or cannot be read.
        """
        with self._opened() as file:
            if contents:
                self._pass_on(file, lambda block: None)

    def read(self) -> bytearray:
        """Read the content and check it.

        Raises:
            BundleError: as `check`.
        """
        content = bytearray(self.size)
        position = 0

        def keep(block: memoryview) -> None:
            nonlocal position
            content[position : position + len(block)] = block
            position += len(block)

        with self._opened() as file:
            self._pass_on(file, keep)
        return content

    @contextmanager
    def mapped(self) -> Iterator[Content]:
        """Map the content into memory, read-only, and check it. It takes no memory that cannot be reclaimed.

        The check finds damage. It does not protect from someone who can write the file: what they write after
        the check shows in the mapping.

        Raises:
            BundleError: as `check`, or the file is empty.
        """
        with self._opened() as file:
            if not self.size:
                raise BundleError(f"{self.path} is empty", self.fix)
            try:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError:  # some file systems map nothing
                yield self.read()
                return
            with content:
                self._pass_on(file, lambda block: None)
                yield content

    def copy(self, place: Path) -> None:
        """Copy the file and check the content.

        Raises:
            BundleError: as `check`.
            OSError: the copy cannot be written, or `place` exists.
        """
        with self._opened() as file, place.open("xb") as copy:
            self._pass_on(file, copy.write)

    def _pass_on(self, file: BinaryIO, use: Callable[[memoryview], object]) -> None:
        """Pass the content block by block to `use`, and check its hash at the end."""
        digest = hashlib.sha256()
        left = self.size
        with memoryview(bytearray(min(_BLOCK, max(left, 1)))) as buffer:
            while left and (count := file.readinto(buffer[: min(left, _BLOCK)])):  # type: ignore[attr-defined]
                digest.update(buffer[:count])
                use(buffer[:count])
                left -= count
        if digest.hexdigest() != self.sha256:
            raise BundleError(f"{self.path} has changed: its sha256 is another", self.fix)

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        try:
            file = open_regular(self.path)
        except FileNotFoundError:
            raise BundleError(f"{self.path} is missing", self.fix) from None
        except OSError as error:
            raise BundleError(f"{self.path} cannot be read ({error.strerror})", self.fix) from error
        with file:
            actual = os.fstat(file.fileno()).st_size
            if actual != self.size:
                word = "truncated" if actual < self.size else "longer than it was"
                raise BundleError(
                    f"{self.path} is {word}: {actual:,} bytes instead of {self.size:,}", self.fix
                )
            yield file


def sha256(path: Union[str, Path]) -> str:
    """The sha256 of a regular file as a hex digest. The file is read in blocks."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
