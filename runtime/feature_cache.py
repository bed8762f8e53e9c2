"""Features of images seen before, held in memory: their keys, and a cache bounded in bytes.

`ditf serve` and `ditf eval` both keep features in this cache.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict

import numpy as np

from ditf.runtime.features import FeatureMap


def image_key(context: str, image: bytes | np.ndarray) -> bytes:
    """The key of an image's features: a 32-byte hash of the image and of all else that decides them.

    The hash is cryptographic, so no client can choose an image whose key collides with another's.

    Args:
        context: what decides the features beside the image, such as the bundle and its condition.
        image: an encoded file, or pixels uint8 [H, W, 3].
    """
    digest = hashlib.blake2b(digest_size=32)
    shape = "" if isinstance(image, bytes) else f"{image.shape}"
    digest.update(f"{len(context)} {context} {shape} ".encode())
    digest.update(image if isinstance(image, bytes) else np.ascontiguousarray(image).data)
    return digest.digest()


class FeatureCache:
    """Feature maps by key. When they exceed the limit, the least recently used are dropped. Thread-safe.

    Args:
        limit: bytes of features, in host and device memory together; 0 keeps nothing.

    Attributes:
        bytes: the size of the maps that are held.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[bytes, tuple[FeatureMap, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> FeatureMap | None:
        """The features of an image, or None if they are not held."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def clear(self) -> None:
        """Drop all features."""
        with self._lock:
            self._entries.clear()
            self.bytes = 0

    def put(self, key: bytes, features: FeatureMap, batch: int = 1) -> FeatureMap:
        """Keep the features of an image.

        Args:
            batch: the number of images that were computed in the same call, this one included. A row of a
                batch in device memory keeps the whole batch alive, so it counts that often.

        Returns:
            The same features. Those in host memory no longer share memory with a larger array, unless the
            cache keeps nothing.
        """
        if self._limit == 0:
            return features
        resident = features.resident
        if resident is None:
            features = _own(features)
            cost = features.array.nbytes
        else:
            cost = batch * math.prod(resident.shape) * resident.dtype.itemsize
        with self._lock:
            if key in self._entries or cost > self._limit:
                return features
            self._entries[key] = (features, cost)
            self.bytes += cost
            while self.bytes > self._limit:
                _, (_, freed) = self._entries.popitem(last=False)
                self.bytes -= freed
        return features


def _own(features: FeatureMap) -> FeatureMap:
    """The same features, copied if their array is a view that keeps a larger one alive."""
    if features.array.base is None:
        return features
    return FeatureMap(features.array.copy(), features.image_size, features.cells)
