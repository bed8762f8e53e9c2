"""Features of a benchmark's images: each computed once, held in memory up to a limit, and on disk."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ditf.calib.eval.datasets.base import LARGEST, ImageSource, read_image
from ditf.runtime.errors import InputError
from ditf.runtime.features import FeatureMap
from ditf.runtime.files.arrays import read_npz
from ditf.runtime.files.reading import open_regular, read_regular
from ditf.runtime.files.writing import replacing

Extract = Callable[[list[np.ndarray], "str | None"], list[FeatureMap]]
"""Features of RGB images uint8 [H, W, 3] under a condition."""

CAPACITY = 1 << 30  # bytes of features held in memory


class FeatureCache:
    """Features by image and condition.

    On disk a feature map is one .npz file in a folder that is named after the model, and the file after the
    image's content: another bundle, backend or picture never finds it. It is written beside its place and
    renamed, so an interrupted run leaves whole files only, and the next one goes on from them.

    Args:
        extract: what computes features.
        model: all that they depend on beside image and condition: the bundle's hash, the backend, the fit.
        folder: of the files; None keeps features in memory only.
        capacity: bytes to hold in memory; the longest unused go first.

    Attributes:
        computed, read: how many maps were computed, and read from disk.
    """

    def __init__(
        self, extract: Extract, model: Sequence[str], folder: Path | None = None, capacity: int = CAPACITY
    ) -> None:
        self._extract = extract
        self._folder = None if folder is None else folder / _digest("\0".join(model).encode())[:16]
        self._capacity = capacity
        self._held: OrderedDict[str, FeatureMap] = OrderedDict()
        self._bytes = 0
        self._hashes: dict[Path, str] = {}
        self.computed = self.read = 0

    def maps(self, images: Sequence[ImageSource], prompt: str | None = None) -> list[FeatureMap]:
        """Features of some images, in host memory; those that are not known are computed together.

        Raises:
            InputError: an unreadable image, or features that hold NaN or infinity; names the image.
        """
        keys = [self._key(image, prompt) for image in images]
        found: dict[str, FeatureMap] = {}
        missing: dict[str, ImageSource] = {}
        for key, image in zip(keys, images, strict=True):
            known = self._known(key)
            if known is None:
                missing[key] = image
            else:
                found[key] = known
        if missing:
            found.update(zip(missing, self._compute(list(missing.values()), prompt), strict=True))
            for key in missing:
                self._write(key, found[key])
                self._hold(key, found[key])
        return [found[key] for key in keys]

    def _compute(self, images: list[ImageSource], prompt: str | None) -> list[FeatureMap]:
        arrays = [read_image(image) for image in images]
        try:
            maps = [_on_host(one) for one in self._extract(arrays, prompt)]
        except InputError as error:
            if len(images) == 1:
                raise InputError(f"{_name(images[0])}: {error.problem}", error.fix) from error
            return [one for image in images for one in self._compute([image], prompt)]
        self.computed += len(maps)
        return maps

    def _key(self, image: ImageSource, prompt: str | None) -> str:
        if isinstance(image, np.ndarray):
            content = _digest(np.ascontiguousarray(image).tobytes() + str(image.shape).encode())
        else:
            if image not in self._hashes:
                try:
                    self._hashes[image] = _digest(read_regular(image, LARGEST))
                except OSError as error:
                    raise InputError(f"{image} cannot be read ({error.strerror})") from None
            content = self._hashes[image]
        return _digest(f"{content}\0{prompt}".encode())

    def _known(self, key: str) -> FeatureMap | None:
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        if self._folder is None:
            return None
        try:
            with open_regular(self._folder / f"{key}.npz") as file:
                arrays = read_npz(file, key, CAPACITY)
            height, width = (int(n) for n in arrays["image_size"])
            rows, columns = (float(n) for n in arrays["cells"])
            known = FeatureMap(arrays["features"], (height, width), (rows, columns))
        except (OSError, ValueError, KeyError, TypeError, InputError):
            return None  # not there, or damaged: computed again
        self.read += 1
        self._hold(key, known)
        return known

    def _hold(self, key: str, features: FeatureMap) -> None:
        self._held[key] = features
        self._bytes += features.array.nbytes
        while self._bytes > self._capacity and len(self._held) > 1:
            _, oldest = self._held.popitem(last=False)
            self._bytes -= oldest.array.nbytes

    def _write(self, key: str, features: FeatureMap) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._folder / f"{key}.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, features=features.array, image_size=features.image_size, cells=features.cells)


def _on_host(features: FeatureMap) -> FeatureMap:
    """The same map without a device's memory behind it, checked for NaN."""
    return FeatureMap(features.array, features.image_size, features.cells)


def _name(image: ImageSource) -> str:
    return str(image) if isinstance(image, Path) else "an image of the benchmark"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
