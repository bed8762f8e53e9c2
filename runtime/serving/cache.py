"""Features of images seen before, by the hash of the image, in a bounded number of bytes."""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict

import numpy as np

from ditf.runtime.features import FeatureMap


def image_key(context: str, image: bytes | np.ndarray) -> bytes:
    """What decides the features of an image: 32 bytes, of a hash that nobody can aim.

    Args:
        context: whatever else decides them: the bundle, and its condition.
        image: an encoded file, or pixels uint8 [H, W, 3].
    """
    digest = hashlib.blake2b(digest_size=32)
    shape = "" if isinstance(image, bytes) else f"{image.shape}"
    digest.update(f"{len(context)} {context} {shape} ".encode())
    digest.update(image if isinstance(image, bytes) else np.ascontiguousarray(image).data)
    return digest.digest()


class FeatureCache:
    """Feature maps by key; the least recently used go first. Any thread may use it.

    Args:
        limit: bytes of features, in host and device memory together; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[bytes, tuple[FeatureMap, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> FeatureMap | None:
        """What is kept of an image."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def clear(self) -> None:
        """Keep nothing."""
        with self._lock:
            self._entries.clear()
            self.bytes = 0

    def put(self, key: bytes, features: FeatureMap, batch: int) -> FeatureMap:
        """Keep the features of an image.

        Args:
            batch: images that were computed with it, itself included.

        Returns:
            The same features, with memory of their own.
        """
        if self._limit == 0:
            return features
        held = features.resident
        if held is None:
            features = _own(features)
            cost = features.array.nbytes
        else:  # a row of its batch in a device's memory keeps all of that
            cost = batch * math.prod(held.shape) * held.dtype.itemsize
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
    """A map that keeps no larger array alive."""
    if features.array.base is None:
        return features
    return FeatureMap(features.array.copy(), features.image_size, features.cells)
