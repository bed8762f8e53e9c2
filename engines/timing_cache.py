"""TensorRT's timing cache on disk: kept for each GPU and version, safe when two builds run at once."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from ditf.runtime.errors import InputError


class TimingCache:
    """One cache file.

    A build reads it when it starts and, when it ends, writes what it learned on top of what others wrote
    meanwhile, to a temporary file that is renamed: no reader sees half a file.

    Args:
        path: of the file; it need not exist.

    Attributes:
        warning: why the file could not be used, if it could not; it is then written anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.warning = ""
        self._cache: Any = None

    def attach(self, config: Any) -> None:
        """Give the cache to a builder config."""
        self._cache = self._read(config)
        if self._cache is None or not config.set_timing_cache(self._cache, ignore_mismatch=False):
            self.warning = f"{self.path} is of another GPU or version, or damaged: timings start anew"
            self._cache = config.create_timing_cache(b"")
            config.set_timing_cache(self._cache, ignore_mismatch=False)

    def keep(self, config: Any) -> None:
        """Write what a build learned.

        Raises:
            InputError: the file cannot be written.
        """
        learned = config.get_timing_cache()
        if not self.warning:
            others = self._read(config)
            if others is not None:
                learned.combine(others, ignore_mismatch=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".timing-")
            with os.fdopen(handle, "wb") as file:
                file.write(bytes(learned.serialize()))
            Path(name).replace(self.path)
        except OSError as error:
            raise InputError(
                f"the timing cache {self.path} cannot be written ({error.strerror})",
                "free some space, or set XDG_CACHE_HOME",
            ) from error

    def _read(self, config: Any) -> Any:
        """The file's cache, an empty one where there is no file; None where TensorRT refuses it."""
        try:
            content = self.path.read_bytes()
        except OSError:
            content = b""
        return config.create_timing_cache(content)
