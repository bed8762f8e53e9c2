"""A bundle directory: its files, and checking that they are the ones that were exported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import numpy as np

from ditf.runtime.bundles.manifest import MANIFEST, Manifest, manifest_content, parse_manifest
from ditf.runtime.bundles.onnx_graph import Graph
from ditf.runtime.bundles.signing import ANYONE, Trust
from ditf.runtime.errors import BundleError, InputError
from ditf.runtime.files import arrays
from ditf.runtime.files.hashed import HashedFile

FEATURES = "features.onnx"
FEATURES_DATA = "features.onnx.data"
MATCH = "match.onnx"
GOLDEN = "golden.npz"
CALIBRATION = "calibration.json"
TRACE = "trace.npz"
NOISE = "noise.npy"  # only with --noise input
PROJECTION = "projection.npy"  # only with --pca
CONDITIONS = "conditions.npz"  # only with --conditioning bank or live

_COPY_AGAIN = "copy or export the bundle again"
_LARGEST_ARRAYS = 1 << 30  # bytes of all arrays in one file, of which conditions.npz is the largest


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its directory, its validated manifest, and what its user accepts of it."""

    path: Path
    manifest: Manifest
    trust: Trust = ANYONE

    @classmethod
    def open(cls, path: Union[str, Path], trust: Trust = ANYONE) -> Bundle:
        """Open a bundle directory. Only its manifest is read, and the signature if one is required.

        Raises:
            InputError: there is no such directory.
            BundleError: it is not a bundle, lacks the required signature, or cannot be read by this ditf.
        """
        path = Path(path)
        if not path.is_dir():
            raise InputError(f"{path}: no such bundle directory", "make one with ditf-export")
        content = manifest_content(path)
        trust.check(path / MANIFEST, content)
        return cls(path, parse_manifest(path, content), trust)

    def may_round(self, graph: str) -> bool:
        """Whether a graph's float32 products may round their factors to TF32, which has 10 mantissa bits.

        They may where the bundle's other products have no more bits. In match.onnx, and in a float32 bundle,
        rounding would move most match positions.
        """
        return graph == FEATURES and self.manifest.precision != "float32"

    def verify(self, names: Iterable[str]) -> None:
        """Check files against the manifest's sizes and hashes.

        Whatever uses a file afterwards reads it with `read`, which checks the bytes that it returns.

        Raises:
            BundleError: a file is missing, truncated, altered or not listed.
        """
        for name in names:
            self.file(name).check()

    def read(self, name: str) -> bytearray:
        """Read a file whose size and hash are those of the manifest.

        The file is opened and read once, so the bytes that are returned are the bytes that were hashed.

        Raises:
            BundleError: as `verify`.
        """
        return self.file(name).read()

    def read_graph(self, name: str) -> Graph:
        """Read features.onnx with its weights, or match.onnx.

        Raises:
            BundleError: as `verify`, or the graph refers to a file that is not its own.
        """
        model = bytes(self.read(name))
        weights = {FEATURES_DATA: self.read(FEATURES_DATA)} if name == FEATURES else {}
        try:
            return Graph(self.path / name, model, weights)
        except ValueError as error:
            raise BundleError(
                f"{self.path / name} cannot be used ({str(error)[:120]})", "export the bundle again"
            ) from error

    def read_array(self, name: str) -> np.ndarray:
        """Read a .npy file of the bundle.

        Raises:
            BundleError: as `verify`, or the file holds no array.
        """
        with self._arrays(name) as content:
            return arrays.read_npy(content, name, len(content))

    def read_arrays(self, name: str) -> dict[str, np.ndarray]:
        """Read a .npz file of the bundle.

        Raises:
            BundleError: as `verify`, or the file holds no arrays, or more than a bundle's may hold.
        """
        with self._arrays(name) as content:
            return arrays.read_npz(content, name, _LARGEST_ARRAYS)

    @contextmanager
    def _arrays(self, name: str) -> Iterator[bytes]:
        content = bytes(self.read(name))
        try:
            yield content
        except ValueError as error:
            raise BundleError(
                f"{self.path / name} holds no arrays ({str(error)[:80]})", "export the bundle again"
            ) from error

    def file(self, name: str) -> HashedFile:
        """A file of the bundle, with the size and hash that the manifest gives for it.

        Raises:
            BundleError: the manifest does not list it.
        """
        listed = self.manifest.files.get(name)
        if listed is None:
            raise BundleError(f"{self.path / name} is not listed in the manifest", "export the bundle again")
        return HashedFile(self.path / name, listed["bytes"], listed["sha256"], _COPY_AGAIN)
