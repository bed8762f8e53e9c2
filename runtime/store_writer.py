"""Writing a FeatureStore: map by map, each whole or not at all, by any number of writers at once."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

import numpy as np

from ditf.runtime.errors import InputError
from ditf.runtime.features import FeatureMap
from ditf.runtime.store import (
    INDEX,
    MAPS,
    PARTIAL,
    SCHEMA,
    STORE,
    TENSOR,
    StoreIdentity,
    identity_json,
    map_files,
    map_path,
    metadata,
    narrowed,
    read_identity,
    read_stored,
    safetensors_package,
)

_STALE = 24 * 3600.0  # seconds after which what was being written is a killed process's


class StoreWriter:
    """Puts maps into a store. As a context manager it makes the store, and in the end its index.

    Args:
        path: of the store, which need not exist.
        identity: what its maps have in common.

    Attributes:
        entries: what index.json lists, by name, once it is written.

    Raises:
        InputError: something else is at `path`, or a store of other features.
        MissingComponent: safetensors is not installed.
    """

    def __init__(self, path: Path, identity: StoreIdentity) -> None:
        safetensors_package()
        self.path = path
        self.identity = identity
        self.entries: dict[str, dict[str, Any]] = {}
        self._check()

    def __enter__(self) -> StoreWriter:
        (self.path / PARTIAL).mkdir(parents=True, exist_ok=True)
        if not (self.path / STORE).is_file():
            self._write(self.path / STORE, identity_json(self.identity).encode(), keep=True)
        self._check()  # another writer may have been first
        for path in (self.path / PARTIAL).iterdir():
            try:
                if time.time() - path.stat().st_mtime > _STALE:
                    path.unlink(missing_ok=True)
            except FileNotFoundError:  # its writer has finished
                continue
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.write_index()
        except OSError:
            if error is None:  # else there is something worse to tell; the index can be derived
                raise

    def has(self, name: str, image_sha256: str) -> bool:
        """Whether the map of this very image is there, whole and of this identity."""
        try:
            stored = read_stored(map_path(self.path, name))
        except (InputError, FileNotFoundError):
            return False
        return (stored.name, stored.image_sha256, stored.key) == (name, image_sha256, self.identity.key)

    def put(self, name: str, image_sha256: str, feature_map: FeatureMap) -> float:
        """Store a map, in place of what was there under this name.

        Args:
            name: of the image; image_sha256: of its file.

        Returns:
            What rounding to the store's type cost: |stored - given| / |given|.

        Raises:
            InputError: values that the type does not hold, or maps of another bundle.
        """
        from safetensors.numpy import save

        given = feature_map.array
        if len(given) != self.identity.channels:
            raise InputError(
                f"the map of {name} has {len(given)} channels, those of {self.path} {self.identity.channels}",
                "compute it with the store's bundle",
            )
        stored = narrowed(given, self.identity.dtype)
        content = save({TENSOR: stored}, metadata(name, image_sha256, feature_map, self.identity))
        path = map_path(self.path, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write(path, content)
        if given.dtype.itemsize <= stored.dtype.itemsize:
            return 0.0
        return float(np.linalg.norm(stored.astype(np.float32) - given) / max(np.linalg.norm(given), 1e-30))

    def write_index(self) -> None:
        """Write index.json, of all maps there are, whoever wrote them, and keep it as `entries`."""
        entries: dict[str, dict[str, Any]] = {}
        for path in map_files(self.path):
            try:
                stored = read_stored(path)
            except (InputError, FileNotFoundError):
                continue  # damaged: the next run computes it again
            entries[stored.name] = {
                "file": path.relative_to(self.path).as_posix(),
                "image_sha256": stored.image_sha256,
                "image_size": stored.image_size,
                "shape": stored.shape,
                "bytes": path.stat().st_size,
            }
        self.entries = {name: entries[name] for name in sorted(entries)}
        text = json.dumps({"schema": SCHEMA, "maps": self.entries}, indent=1) + "\n"
        self._write(self.path / INDEX, text.encode("utf-8"))

    def _check(self) -> None:
        """Refuse a place that holds something else."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file", "name a directory, or a file that ends in .npz")
        if (self.path / STORE).is_file():
            there = read_identity(self.path)
            if there.key != self.identity.key:
                what = there.differences(self.identity)[0]
                raise InputError(
                    f"{self.path} holds other features: {what}", "choose another --output, or remove it"
                )
        elif self.path.is_dir():
            ours = {MAPS, PARTIAL, INDEX}
            if any(entry.name not in ours for entry in self.path.iterdir()):
                raise InputError(f"{self.path} exists and is not a feature store", "choose another --output")
            self._check_maps()

    def _check_maps(self) -> None:
        """Refuse maps of other features where store.json, which says whose they are, is gone."""
        for path in map_files(self.path):
            try:
                stored = read_stored(path)
            except (InputError, FileNotFoundError):
                continue  # damaged: it is computed again
            if stored.key != self.identity.key:
                raise InputError(
                    f"{self.path} has no {STORE}, and {path.name} is of other features",
                    "choose another --output, or remove it",
                )

    def _write(self, path: Path, content: bytes, keep: bool = False) -> None:
        """A file that appears whole.

        Args:
            keep: leave what another writer has put there.
        """
        temporary = self.path / PARTIAL / f"{path.stem}-{uuid4().hex}"
        try:
            temporary.write_bytes(content)
            if keep:
                try:
                    os.link(temporary, path)
                    return
                except FileExistsError:
                    return
                except OSError:
                    pass  # a file system without hard links
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
