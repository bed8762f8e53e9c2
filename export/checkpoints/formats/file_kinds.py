"""What a file that should hold weights really is, from its first bytes, and what helps then."""

from __future__ import annotations

import json
from pathlib import Path

from ditf.runtime.errors import InputError
from ditf.runtime.files.reading import open_regular

SAFETENSORS = (".safetensors", ".sft")
"""Suffixes of safetensors files; the short one is that of the first files of FLUX.1."""

PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
"""Suffixes of files that are read by running what they say; ditf never opens them."""

UNFINISHED = (".incomplete", ".part", ".aria2", ".crdownload")
"""Suffixes of files that a download program has not finished."""

_LFS = b"version https://git-lfs.github.com/spec/"
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_HEADER = 8  # bytes of a safetensors file before its header: the header's length
_LARGEST_HEADER = 100 << 20  # bytes, as in the format's own reader
_PICKLED = "is a pickle, which can run code when it is loaded, so it is never opened"
_AGAIN = "download it again"


def check_weights_file(path: Path) -> None:
    """Check that a file given by name may be safetensors or GGUF; of the values nothing is read.

    Raises:
        InputError: the file is something else, is torn or cannot be opened; the fix fits what it is.
    """
    if path.suffix.lower() in UNFINISHED:
        raise InputError(f"{path} is a download that has not finished", "let it finish, or download it again")
    if path.suffix.lower() in PICKLES:
        raise InputError(
            f"{path} {_PICKLED}", "look for a .safetensors file of the same model, or convert it to one"
        )
    try:
        with open_regular(path) as file:
            start = file.read(_HEADER)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    if start.startswith(b"GGUF"):
        return
    found = _misfit(path)
    if found is not None:
        raise found


def unreadable(path: Path, reason: object) -> InputError:
    """The error for a file that is not readable as safetensors, with the fix that fits what the file is.

    Args:
        reason: what the reader said.
    """
    try:
        found = _misfit(path)
    except OSError:
        found = None
    return found or InputError(f"{path} is not a readable safetensors file ({reason})", _AGAIN)


def check_no_pointer(path: Path) -> None:
    """Check that a file is not a Git LFS pointer, which stands for a file that was not fetched.

    Raises:
        InputError: it is one.
        OSError: the file cannot be opened.
    """
    with open_regular(path) as file:
        if file.read(len(_LFS)) == _LFS:
            raise _pointer(path)


def _pointer(path: Path) -> InputError:
    fix = f"run in {path.parent}: git lfs install && git lfs pull"
    return InputError(f"{path} is a Git LFS pointer, not the file itself", fix)


def _misfit(path: Path) -> InputError | None:
    """What keeps a file from being safetensors, or None.

    Raises:
        OSError: the file cannot be opened.
    """
    with open_regular(path) as file:
        start = file.read(1024)
        size = file.seek(0, 2)
        length = int.from_bytes(start[:_HEADER], "little")
        headed = 2 <= length <= _LARGEST_HEADER and start[_HEADER : _HEADER + 1] == b"{"
        if start.startswith(_LFS):
            return _pointer(path)
        if not headed and start.lstrip()[:1] == b"<":
            return InputError(
                f"{path} is a web page, not weights",
                "download it again; where its page asks for a login, log in or pass a token",
            )
        if not headed and start.startswith(_PICKLE_STARTS):
            return InputError(f"{path} {_PICKLED}", "save it as safetensors")
        if start.startswith(b"GGUF"):
            return InputError(f"{path} is a GGUF file with another suffix", "rename it to .gguf")
        if path.suffix.lower() not in SAFETENSORS:
            return InputError(f"{path} is no file of weights", "pass a .safetensors or .gguf file")
        if not headed:
            what = "it has no header" if size else "it is empty"
            return InputError(f"{path} is not a readable safetensors file ({what})", _AGAIN)
        if size < _HEADER + length:
            return InputError(
                f"{path} is not a readable safetensors file (it has {size:,} bytes, less than its header)",
                _AGAIN,
            )
        file.seek(_HEADER)
        promised = _promised(file.read(length))
    if promised is not None and size < _HEADER + length + promised:
        return InputError(
            f"{path} is not a readable safetensors file (its header promises"
            f" {_HEADER + length + promised:,} bytes and it has {size:,}: the download was interrupted)",
            _AGAIN,
        )
    return None


def _promised(header: bytes) -> int | None:
    """How many bytes follow a header, or None if it is no header."""
    try:
        entries = json.loads(header).items()
        return max((entry["data_offsets"][1] for name, entry in entries if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None
