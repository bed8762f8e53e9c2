"""Files in the user's cache, which hold kernels and timings of TensorRT.

TensorRT does not check these files when it reads them. A file is therefore only read if none but this user or
root can have written it, and its folders are private to the user.
"""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path
from typing import Optional
from uuid import uuid4

from ditf.runtime.files.reading import open_regular
from ditf.runtime.files.writing import created, publish

logger = logging.getLogger(__name__)

_LARGEST = 1 << 30  # bytes


def cache_file(kind: str, *name: str) -> Optional[Path]:
    """The path of a file in the user's cache; `kind` is "timing" or "kernels".

    Returns:
        None, after a warning, if the user has no cache: there is no home folder and no XDG_CACHE_HOME.
    """
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # neither HOME nor an entry in the list of users
        root = Path()
    if not root.is_absolute():
        logger.warning("there is no home folder, so no %s are kept; set XDG_CACHE_HOME", kind)
        return None
    plain = "".join(c if c.isalnum() or c in ".-" else "_" for c in "-".join(name))
    return root / "ditf" / kind / f"{plain}.cache"


def read_cache(path: Path) -> Optional[bytes]:
    """Read a file of the cache; None if it does not exist.

    Args:
        path: the result of `cache_file`.

    Raises:
        OSError: another user can write the file or its folders, or it cannot be read; `strerror` says why.
    """
    try:
        for folder in (path.parent.parent, path.parent):
            _check(folder.lstat(), folder)
        with open_regular(path, _LARGEST) as file:
            _check(os.fstat(file.fileno()), path)
            return file.read(_LARGEST)
    except FileNotFoundError:
        return None


def write_cache(path: Path, content: bytes) -> None:
    """Write a file of the cache as a whole. Its folders are created and made private.

    Raises:
        OSError: the file cannot be written, or a folder is not this user's.
    """
    path.parent.parent.parent.mkdir(parents=True, exist_ok=True)
    for folder in (path.parent.parent, path.parent):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
            folder.chmod(0o700)  # ditf 0.1.0 left their mode to the umask
        _check(folder.lstat(), folder)
    temporary = path.with_name(f".ditf-{uuid4().hex}")
    with created(temporary) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(content)
        publish(file, temporary, path)


def _check(status: os.stat_result, path: Path) -> None:
    why = ""
    if stat.S_ISLNK(status.st_mode):
        why = "it is a link"
    elif status.st_uid not in (os.geteuid(), 0):
        why = f"it is of user {status.st_uid}"
    elif stat.S_IMODE(status.st_mode) & 0o022:
        why = "others can write it"
    if why:
        raise PermissionError(1, why, str(path))
