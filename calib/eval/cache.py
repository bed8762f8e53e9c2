"""Features of a benchmark's images: each is computed once and kept, in memory and on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ditf.calib.eval.datasets.base import LARGEST, ImageSource, read_image
from ditf.runtime.errors import InputError
from ditf.runtime.feature_cache import FeatureCache, image_key
from ditf.runtime.features import FeatureMap
from ditf.runtime.files.hashed import sha256
from ditf.runtime.files.reading import read_regular
from ditf.runtime.files.writing import write_whole
from ditf.runtime.store.stored_map import map_file, read_stored, safetensors_package

Extract = Callable[[list[np.ndarray], "str | None"], list[FeatureMap]]
"""Features of RGB images uint8 [H, W, 3] under a condition."""

CAPACITY = 1 << 30  # bytes of features held in memory, and of one file


class BenchmarkFeatures:
    """Features by image and condition.

    On disk each map is one file, of the same form as in a `FeatureStore`, in a folder that is named after the
    model. The file is named after the image's content and the condition, so features of another bundle,
    backend or picture are never taken for them. Files appear whole: an interrupted run leaves nothing
    half-written, and the next run continues from what is there.

    Args:
        extract: the function that computes features.
        model: all that the features depend on beside image and condition: the bundle's hash, backend and fit.
        folder: where the files go; None keeps features in memory only.
        capacity: bytes to hold in memory; the least recently used features are dropped first.

    Attributes:
        computed, read: the number of maps that were computed, and that were read from disk.

    Raises:
        MissingComponent: `folder` is given and safetensors is not installed.
    """

    def __init__(
        self, extract: Extract, model: Sequence[str], folder: Path | None = None, capacity: int = CAPACITY
    ) -> None:
        if folder is not None:
            safetensors_package()
            folder = folder / hashlib.sha256("\0".join(model).encode()).hexdigest()[:16]
        self._extract = extract
        self._folder = folder
        self._held = FeatureCache(capacity)
        self._keys: dict[tuple[Path, str | None], bytes] = {}
        self.computed = self.read = 0

    def maps(self, images: Sequence[ImageSource], prompt: str | None = None) -> list[FeatureMap]:
        """Features of some images, in host memory. Those that are not known are computed in one call.

        Raises:
            InputError: an image cannot be read, or its features hold NaN or infinity; the message names it.
        """
        keys = [self._key(image, prompt) for image in images]
        found: dict[bytes, FeatureMap] = {}
        missing: dict[bytes, ImageSource] = {}
        for key, image in zip(keys, images, strict=True):
            known = self._known(key)
            if known is None:
                missing[key] = image
            else:
                found[key] = known
        if missing:
            computed = self._compute(list(missing.values()), prompt)
            for (key, image), features in zip(missing.items(), computed, strict=True):
                self._write(key, image, features)
                found[key] = self._held.put(key, features)
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

    def _key(self, image: ImageSource, prompt: str | None) -> bytes:
        if isinstance(image, np.ndarray):
            return image_key(f"{prompt}", image)
        if (image, prompt) not in self._keys:
            try:
                self._keys[image, prompt] = image_key(f"{prompt}", read_regular(image, LARGEST))
            except OSError as error:
                raise InputError(f"{image} cannot be read ({error.strerror})") from None
        return self._keys[image, prompt]

    def _known(self, key: bytes) -> FeatureMap | None:
        held = self._held.get(key)
        if held is not None or self._folder is None:
            return held
        path = self._file(key)
        try:
            stored = read_stored(path)
            if path.stat().st_size > CAPACITY or stored.key != key.hex() or not stored.whole(path):
                return None
            features = stored.features(path)
        except (OSError, InputError):
            return None  # missing or damaged: it is computed again
        self.read += 1
        return self._held.put(key, features)

    def _write(self, key: bytes, image: ImageSource, features: FeatureMap) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        content = (
            hashlib.sha256(image.tobytes()).hexdigest() if isinstance(image, np.ndarray) else sha256(image)
        )
        write_whole(self._file(key), map_file(_name(image), content, features, features.array, key.hex()))

    def _file(self, key: bytes) -> Path:
        assert self._folder is not None
        return self._folder / f"{key.hex()}.safetensors"


def _on_host(features: FeatureMap) -> FeatureMap:
    """The same map without the device memory behind it. Fetching the array checks it for NaN and infinity."""
    return FeatureMap(features.array, features.image_size, features.cells)


def _name(image: ImageSource) -> str:
    return str(image) if isinstance(image, Path) else "an image of the benchmark"
