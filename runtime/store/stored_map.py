"""A map's file in a FeatureStore: one safetensors tensor, and in its metadata what the map is of."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from ditf.runtime.bundles.manifest import conforms
from ditf.runtime.errors import InputError, missing_extra
from ditf.runtime.features import FeatureMap
from ditf.runtime.files.reading import open_regular

TENSOR = "features"
AGAIN = "run ditf features again: it computes what is missing"

_CHUNK = 1 << 20
_DTYPES = {"F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class StoredMap:
    """What a map's file says of itself.

    Attributes:
        name: of the image; image_sha256: of its file.
        image_size: (H, W) px; extent: (rows, columns) of the map that the image covers, in cells.
        shape: (C, h, w); dtype: of the numbers; offset: of the first in the file, bytes.
        key: of the store's identity.
        digest: of all this and the numbers; None of a map that ditf 0.1.0 wrote.
    """

    name: str
    image_sha256: str
    image_size: tuple[int, int]
    extent: tuple[float, float]
    shape: tuple[int, int, int]
    dtype: str
    offset: int
    key: str
    digest: Optional[str]

    def whole(self, path: Path) -> bool:
        """Whether the file still has what was written; False without a digest. Reads all of it.

        Raises:
            OSError: it cannot be read.
        """
        if self.digest is None:
            return False
        noted = {
            "name": self.name,
            "image_sha256": self.image_sha256,
            "image_size": json.dumps(self.image_size),
            "extent": json.dumps(self.extent),
            "key": self.key,
        }
        hashed = _header_hash(noted, self.dtype, self.shape)
        with open_regular(path) as file:
            file.seek(self.offset)
            while chunk := file.read(_CHUNK):
                hashed.update(chunk)
        return bool(hashed.hexdigest() == self.digest)

    def features(self, path: Path) -> FeatureMap:
        """The map, memory-mapped from its file. Its values are read once, to see that they are finite.

        Raises:
            InputError: the values hold NaN or infinity.
        """
        array = np.memmap(path, self.dtype, "r", self.offset, self.shape)
        return FeatureMap(array, self.image_size, self.extent)


def map_file(name: str, image_sha256: str, feature_map: FeatureMap, stored: np.ndarray, key: str) -> bytes:
    """A map's file, as `read_stored` reads it.

    Args:
        feature_map: for its size and extent; stored: its numbers in the store's type.
        key: of the store's identity.
    """
    from safetensors.numpy import save

    noted = {
        "name": name,
        "image_sha256": image_sha256,
        "image_size": json.dumps(feature_map.image_size),
        "extent": json.dumps(feature_map.cells),
        "key": key,
    }
    hashed = _header_hash(noted, str(stored.dtype), stored.shape)
    hashed.update(stored.astype(stored.dtype.newbyteorder("<"), copy=False).tobytes())
    return bytes(save({TENSOR: stored}, {**noted, "sha256": hashed.hexdigest()}))


def read_stored(path: Path) -> StoredMap:
    """What a map's file says of itself; its values are not read.

    Raises:
        FileNotFoundError: no such file.
        InputError: truncated, or not a map.
    """
    try:
        with open_regular(path) as raw:
            offset = 8 + int.from_bytes(raw.read(8), "little")  # one tensor: it follows the header
        # safetensors compares the header with the file's length: a truncated one is refused here.
        with safetensors_package().safe_open(path, framework="numpy") as file:
            noted = file.metadata() or {}
            tensor = file.get_slice(TENSOR)
            shape, dtype = tuple(tensor.get_shape()), _DTYPES[tensor.get_dtype()]
            names = list(file.keys())
        size, extent = json.loads(noted["image_size"]), json.loads(noted["extent"])
        fits = conforms(size, tuple[int, int]) and conforms(extent, tuple[float, float])
        if names != [TENSOR] or len(shape) != 3 or not fits:
            raise ValueError("not one feature map")
        said = (noted["name"], noted["image_sha256"], tuple(size), tuple(extent))
        return StoredMap(*said, shape, dtype, offset, noted["key"], noted.get("sha256"))
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors has an error of its own, which is no class of Python's
        detail = str(error).split("\n")[0][:80]
        raise InputError(f"{path} is no whole feature map ({detail})", AGAIN) from error


def safetensors_package() -> Any:
    """safetensors, or the error that says how to install it."""
    try:
        import safetensors
    except ImportError:
        raise missing_extra("safetensors", "eval") from None
    return safetensors


def _header_hash(noted: dict[str, str], dtype: str, shape: tuple[int, ...]) -> Any:
    """A hash that has taken all but the numbers."""
    text = json.dumps([sorted(noted.items()), dtype, list(shape)])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass"))
