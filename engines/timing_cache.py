"""TensorRT's timing cache on disk, one file per GPU and version; two builds may share it at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ditf.runtime.files.user_cache import read_cache, write_cache


class TimingCache:
    """One cache file in the user's cache (see `read_cache`).

    A build reads the file when it starts. When it ends, it merges its timings with those that other builds
    wrote meanwhile and replaces the file atomically.

    Args:
        path: path of the file, which need not exist.

    Attributes:
        warning: why the file could not be used or written, or "". One that could not be used is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.warning = ""
        self._cache: Any = None
        self._refused = ""

    def attach(self, config: Any) -> None:
        """Give the cache to a builder config."""
        self._cache = self._read(config)
        if self._cache is None or not config.set_timing_cache(self._cache, ignore_mismatch=False):
            refused = self._refused or f"{self.path} is of another GPU or version, or damaged"
            self.warning = f"{refused}: timings start anew"
            self._cache = config.create_timing_cache(b"")
            config.set_timing_cache(self._cache, ignore_mismatch=False)

    def keep(self, config: Any) -> None:
        """Write the timings of a build. If that fails, `warning` says why: the plan is none the worse."""
        if self._refused:
            return  # the file is another user's
        learned = config.get_timing_cache()
        if not self.warning:
            others = self._read(config)
            if others is not None:
                learned.combine(others, ignore_mismatch=False)
        try:
            write_cache(self.path, bytes(learned.serialize()))
        except OSError as error:
            self.warning = (
                f"the timing cache {self.path} cannot be written ({error.strerror}); set XDG_CACHE_HOME"
            )

    def _read(self, config: Any) -> Any:
        """The cache in the file, an empty cache where there is no file, None where the file is refused."""
        try:
            content = read_cache(self.path) or b""
        except OSError as error:
            self._refused = f"{error.filename} cannot be used ({error.strerror})"
            return None
        return config.create_timing_cache(content)
