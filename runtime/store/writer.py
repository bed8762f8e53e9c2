"""Writing a FeatureStore. Maps appear whole or not at all, and many writers may work at once."""

from __future__ import annotations

import json
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

import numpy as np

from ditf.runtime.errors import InputError
from ditf.runtime.features import FeatureMap
from ditf.runtime.files.liveness import STALE, file_system_time, try_lock
from ditf.runtime.files.writing import created, publish, sync_folder
from ditf.runtime.store.feature_store import (
    INDEX,
    MAPS,
    PARTIAL,
    SCHEMA,
    STORE,
    StoreIdentity,
    identity_json,
    is_index,
    is_map_name,
    map_files,
    map_path,
    narrowed,
    read_identity,
    read_named,
)
from ditf.runtime.store.stored_map import map_file, read_stored, safetensors_package

_OURS = re.compile(r"([0-9a-f]{32}|store|index)-[0-9a-f]{32}|\.ditf-clock-[0-9a-f]{32}|clock-[0-9a-f]{32}")
"""The names of files in partial/."""


class StoreWriter:
    """Puts maps into a store. As a context manager it creates the store, and at the end its index.

    Args:
        path: the store's directory, which need not exist.
        identity: what the store's maps have in common.

    Attributes:
        entries: what index.json lists, by image name, once it is written.

    Raises:
        InputError: `path` holds something else, or a store of other features.
        MissingComponent: safetensors is not installed.
    """

    def __init__(self, path: Path, identity: StoreIdentity) -> None:
        safetensors_package()
        self.path = path
        self.identity = identity
        self.entries: dict[str, dict[str, Any]] = {}
        self._check()

    def __enter__(self) -> StoreWriter:
        new = not (self.path / STORE).is_file()
        (self.path / PARTIAL).mkdir(parents=True, exist_ok=True)
        if new:
            self._write(self.path / STORE, identity_json(self.identity).encode(), keep=True)
        self._check()  # another writer may have been first
        if not new:
            _remove_abandoned(self.path / PARTIAL)
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
            if error is None:  # otherwise the first error is reported; the index can be derived
                raise

    def has(self, name: str, image_sha256: str) -> bool:
        """Whether the store holds an intact map of this image under this identity.

        A map without a digest, which ditf 0.1.0 wrote, does not count, because nothing shows that it is
        whole.
        """
        path = map_path(self.path, name)
        try:
            stored = read_stored(path)
            of_this = (stored.name, stored.image_sha256, stored.key) == (
                name,
                image_sha256,
                self.identity.key,
            )
            return of_this and stored.whole(path)
        except (InputError, OSError):
            return False

    def put(self, name: str, image_sha256: str, feature_map: FeatureMap) -> float:
        """Store a map; it replaces a former one of the same name.

        Args:
            name: the image's name.
            image_sha256: the hash of the image's file.

        Returns:
            The error of rounding to the store's type, |stored - given| / |given|.

        Raises:
            InputError: the store's type does not hold a value, or the map is of another bundle.
        """
        given = feature_map.array
        if len(given) != self.identity.channels:
            raise InputError(
                f"the map of {name} has {len(given)} channels, those of {self.path} {self.identity.channels}",
                "compute it with the store's bundle",
            )
        stored = narrowed(given, self.identity.dtype)
        path = map_path(self.path, name)
        if path.parent.is_symlink():
            raise InputError(f"{path.parent} is a link", "remove it")
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            for folder in (path.parent.parent, self.path):
                sync_folder(folder)
        self._write(path, map_file(name, image_sha256, feature_map, stored, self.identity.key))
        if given.dtype.itemsize <= stored.dtype.itemsize:
            return 0.0
        return float(np.linalg.norm(stored.astype(np.float32) - given) / max(np.linalg.norm(given), 1e-30))

    def write_index(self) -> None:
        """Write index.json, which lists all maps by whatever writer, and keep the list as `entries`."""
        entries: dict[str, dict[str, Any]] = {}
        for path in map_files(self.path):
            try:
                stored = read_named(self.path, path)
            except (InputError, FileNotFoundError):
                continue  # damaged, so the next run computes it again
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
        """Refuse a path that holds something else."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file", "name a directory, or a file that ends in .npz")
        for name in (STORE, INDEX):
            there_is = os.path.lexists(self.path / name)
            if there_is and not stat.S_ISREG((self.path / name).lstat().st_mode):
                raise InputError(f"{self.path / name} is no regular file", "remove it")
        for name in (MAPS, PARTIAL):
            if (self.path / name).is_symlink():
                raise InputError(f"{self.path / name} is a link", f"name a store whose {name} is a folder")
        if (self.path / STORE).is_file():
            there = read_identity(self.path)
            if there.key != self.identity.key:
                what = there.differences(self.identity)[0]
                raise InputError(
                    f"{self.path} holds other features: {what}", "choose another --output, or remove it"
                )
        elif self.path.is_dir():
            if not self._of_a_store():
                raise InputError(f"{self.path} exists and is not a feature store", "choose another --output")
            self._check_maps()

    def _of_a_store(self) -> bool:
        """Whether a folder without store.json holds only a store's files, as a new or damaged store does."""
        inside = {entry.name for entry in self.path.iterdir()}
        partial = (self.path / PARTIAL).iterdir() if PARTIAL in inside else ()
        maps = (self.path / MAPS).rglob("*") if MAPS in inside else ()
        return (
            inside <= {MAPS, PARTIAL, INDEX, STORE}  # another writer may have just made store.json
            and (INDEX not in inside or is_index(self.path))
            and all(_OURS.fullmatch(path.name) for path in partial)
            and all(is_map_name(path) or re.fullmatch("[0-9a-f]{2}", path.name) for path in maps)
        )

    def _check_maps(self) -> None:
        """Refuse maps of other features in a store whose store.json is lost."""
        for path in map_files(self.path):
            try:
                stored = read_stored(path)
            except (InputError, FileNotFoundError):
                continue  # damaged, so it is computed again
            if stored.key != self.identity.key:
                raise InputError(
                    f"{self.path} has no {STORE}, and {path.name} is of other features",
                    "choose another --output, or remove it",
                )

    def _write(self, path: Path, content: bytes, keep: bool = False) -> None:
        """Write a file that appears as a whole.

        Args:
            keep: keep the file if another writer has already put it there.
        """
        temporary = self.path / PARTIAL / f"{path.stem}-{uuid4().hex}"
        with created(temporary) as file:
            try_lock(file.fileno())  # shows `_remove_abandoned` that this writer is at work
            file.write(content)
            if keep:
                file.flush()
                os.fsync(file.fileno())
                try:
                    os.link(temporary, path)
                    sync_folder(path.parent)
                    return
                except FileExistsError:
                    return
                except OSError:
                    pass  # a file system without hard links
            publish(file, temporary, path)


def _remove_abandoned(partial: Path) -> None:
    """Remove the files that killed writers left. Only regular files with a store's names count, and no links.

    Where the file system can lock, a file's lock shows whether its writer is alive. Because locks of other
    hosts may be invisible, files that changed within a day by the file system's own clock are kept too.
    """
    with suppress(OSError):  # leftover files do no harm
        now = file_system_time(partial)
        folder = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries]
            for name in filter(_OURS.fullmatch, names):
                _remove_if_abandoned(name, folder, now)
        finally:
            os.close(folder)


def _remove_if_abandoned(name: str, folder: int, now: int) -> None:
    try:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(name, flags, dir_fd=folder)
    except OSError:  # its writer has finished, or it is a link or another user's file
        return
    try:
        status = os.fstat(descriptor)
        old = stat.S_ISREG(status.st_mode) and now - status.st_mtime_ns > STALE
        if old and try_lock(descriptor) is not False:
            os.unlink(name, dir_fd=folder)
    finally:
        os.close(descriptor)
