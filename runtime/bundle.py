"""A bundle directory: its files, and the proof that they are the ones that were exported."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Union
from zipfile import BadZipFile

import numpy as np

from ditf.runtime.errors import BundleError, InputError
from ditf.runtime.manifest import Manifest, read_manifest

FEATURES = "features.onnx"
FEATURES_DATA = "features.onnx.data"
MATCH = "match.onnx"
GOLDEN = "golden.npz"
CALIBRATION = "calibration.json"
TRACE = "trace.npz"
NOISE = "noise.npy"  # only with --noise input
PROJECTION = "projection.npy"  # only with --pca
CONDITIONS = "conditions.npz"  # only with --conditioning bank or live

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: where it is, and its validated manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Union[str, Path]) -> Bundle:
        """Read the manifest of a bundle directory. No other file is touched.

        Raises:
            InputError: no such directory.
            BundleError: not a bundle, or one this ditf cannot read.
        """
        path = Path(path)
        if not path.is_dir():
            raise InputError(f"{path}: no such bundle directory", "make one with ditf-export")
        return cls(path, read_manifest(path))

    def verify(self, names: Iterable[str]) -> None:
        """Check files against the manifest's sizes and hashes, before anything is deserialised.

        Raises:
            BundleError: a file is missing, truncated, altered or not listed.
        """
        for name in names:
            listed = self.manifest.files.get(name)
            if listed is None:
                raise BundleError(
                    f"{self.path / name} is not listed in the manifest", "export the bundle again"
                )
            self._verify_file(self.path / name, listed["bytes"], listed["sha256"])

    def read_array(self, name: str) -> np.ndarray:
        """A verified .npy file of the bundle."""
        self.verify([name])
        with self._readable(name), (self.path / name).open("rb") as file:
            array: np.ndarray = np.load(file, allow_pickle=False)
            return array

    def read_arrays(self, name: str) -> dict[str, np.ndarray]:
        """A verified .npz file of the bundle."""
        self.verify([name])
        # Opened here: numpy leaves what it cannot read open.
        with (
            self._readable(name),
            (self.path / name).open("rb") as file,
            np.load(file, allow_pickle=False) as arrays,
        ):
            return dict(arrays)

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, EOFError, BadZipFile) as error:
            raise BundleError(
                f"{self.path / name} holds no arrays ({str(error)[:80]})", "export the bundle again"
            ) from error

    def _verify_file(self, path: Path, size: int, digest: str) -> None:
        fix = "copy or export the bundle again"
        try:
            actual = path.stat().st_size
            if actual != size:
                word = "truncated" if actual < size else "longer than it was"
                raise BundleError(f"{path} is {word}: {actual:,} bytes instead of {size:,}", fix)
            if sha256(path) != digest:
                raise BundleError(f"{path} has changed: its sha256 is not the manifest's", fix)
        except FileNotFoundError:
            raise BundleError(f"{path} is missing from the bundle", fix) from None
        except OSError as error:
            raise BundleError(f"{path} cannot be read ({error.strerror})", fix) from error


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
