"""Reading .npy and .npz files from elsewhere, without pickles and within a limit of size.

numpy allocates what a header announces and inflates what a zip file holds, so 3 MB can become 3 GB. Here
every size is compared with a limit and with the file's real size before memory is allocated.
"""

from __future__ import annotations

import io
import math
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, BinaryIO, Union

import numpy as np

_HEADER = 10_000  # bytes; numpy's own limit, because parsing a longer header may take long
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_KINDS = "biufcSU"  # booleans, numbers and strings of fixed length; no objects or records
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile bounds only their output
_ENCRYPTED = 0x1


class _Refused(ValueError):
    """An error whose message already names the file."""


def read_npy(source: Union[bytes, BinaryIO], name: str, limit: int) -> np.ndarray:
    """Read the array of a .npy file.

    Args:
        source: the file's bytes, or the file opened in binary mode.
        name: what to call the file in messages.
        limit: the largest accepted size of the file in bytes.

    Returns:
        A writable array.

    Raises:
        ValueError: the file is not a .npy file, is damaged or too large, or holds anything but numbers and
            plain strings. The message begins with `name`.
    """
    with _refusing(name, "no .npy file"):
        file, size = _opened(source, name, limit)
        return _read_array(file, size, name)


def read_npz(source: Union[bytes, BinaryIO], name: str, limit: int) -> dict[str, np.ndarray]:
    """Read all arrays of a .npz file, by name.

    Args:
        source: the file's bytes, or the file opened in binary mode.
        name: what to call the file in messages.
        limit: the largest accepted size in bytes, both of the file and of all that it inflates to.

    Returns:
        Writable arrays, in the order of the file.

    Raises:
        ValueError: the file is not a .npz file, is damaged or too large, or holds anything but numbers and
            plain strings. The message begins with `name`.
    """
    with _refusing(name, "no .npz file"):
        file, _ = _opened(source, name, limit)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            inflated = sum(member.file_size for member in members)
            if inflated > limit:
                raise _Refused(f"{name} inflates to {inflated:,} bytes, more than {limit:,}")
            arrays: dict[str, np.ndarray] = {}
            for member in members:
                key = _key(member, name)
                if key in arrays:
                    raise _Refused(f"{name} holds {key[:80]!a} twice")
                with archive.open(member) as content:
                    arrays[key] = _read_array(content, member.file_size, f"{name}, array {key[:80]!a},")
            return arrays


@contextmanager
def _refusing(name: str, what: str) -> Iterator[None]:
    """Turn the many kinds of exceptions of zipfile and numpy into a ValueError that names the file."""
    try:
        yield
    except _Refused:
        raise
    except Exception as error:
        raise ValueError(f"{name} is damaged, or {what} ({str(error)[:80]!a})") from error


def _opened(source: Union[bytes, BinaryIO], name: str, limit: int) -> tuple[BinaryIO, int]:
    """Open a source as a seekable file at its start. Returns it and its size in bytes."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    size = file.seek(0, os.SEEK_END)
    if size > limit:
        raise _Refused(f"{name} has {size:,} bytes, more than {limit:,}")
    file.seek(0)
    return file, size


def _key(member: zipfile.ZipInfo, name: str) -> str:
    """The name of the array in a member of the archive."""
    if not member.filename.endswith(".npy"):
        raise _Refused(f"{name} holds {member.filename[:80]!a}, which is no array")
    if member.flag_bits & _ENCRYPTED or member.compress_type not in _METHODS:
        raise _Refused(f"{name} is encrypted, or compressed in a way that numpy does not write")
    return member.filename[: -len(".npy")]


def _read_array(file: IO[bytes], size: int, name: str) -> np.ndarray:
    """Read the array from a stream of `size` bytes that is at its start."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy warns if it can only guess what a header means
        reader = _READERS[np.lib.format.read_magic(file)]
        shape, fortran, dtype = reader(file, max_header_size=_HEADER)
    if dtype.kind not in _KINDS:
        raise _Refused(f"{name} holds {str(dtype)[:80]}, which is neither numbers nor plain strings")
    announced, present = math.prod(shape) * dtype.itemsize, size - file.tell()
    if announced != present:
        raise _Refused(f"{name} has {present:,} bytes of data, and its header says {announced:,}")
    buffer = bytearray(present)
    read = 0
    while count := file.readinto(memoryview(buffer)[read:]):  # type: ignore[attr-defined]  # typeshed lacks it
        read += count
    if read < present:
        raise _Refused(f"{name} ends after {read:,} of {present:,} bytes")
    return np.ndarray(shape, dtype, buffer, order="F" if fortran else "C")
