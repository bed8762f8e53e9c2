"""The file of one feature map: a safetensors tensor, with a description of the map in its metadata."""

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
    """The description in a map's file.

    Attributes:
        name: the image's name.
        image_sha256: the hash of the image's file.
        image_size: the image's size (H, W) in pixels.
        extent: (rows, columns) of the map that the image covers, in cells.
        shape: (C, h, w).
        dtype: the type of the numbers.
        offset: where the numbers begin in the file, in bytes.
        key: identifies what else decides the values; in a store it is `StoreIdentity.key`.
        digest: a hash of all this and the numbers; None for a map that ditf 0.1.0 wrote.
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
        """Whether the file still holds what was written; False without a digest. The whole file is read.

        Raises:
            OSError: the file cannot be read.
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
    """The bytes of a map's file, which `read_stored` reads.

    Args:
        name: the image's name.
        image_sha256: the hash of the image's file.
        feature_map: the map, for its size and extent.
        stored: its numbers in the type that is stored.
        key: see `StoredMap`.
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
    """Read the description in a map's file, without its values.

    Raises:
        FileNotFoundError: the file does not exist.
        InputError: the file is truncated, or not a map.
    """
    try:
        with open_regular(path) as raw:
            offset = 8 + int.from_bytes(raw.read(8), "little")  # the only tensor follows the header
        # safetensors compares the header with the file's length and refuses a truncated file.
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
    except Exception as error:  # the error of safetensors derives from Exception alone
        detail = str(error).split("\n")[0][:80]
        raise InputError(f"{path} is no whole feature map ({detail})", AGAIN) from error


def safetensors_package() -> Any:
    """Import safetensors, or raise the error that says how to install it."""
    try:
        import safetensors
    except ImportError:
        raise missing_extra("safetensors", "eval") from None
    return safetensors


def _header_hash(noted: dict[str, str], dtype: str, shape: tuple[int, ...]) -> Any:
    """A hash object that has been fed all but the numbers."""
    text = json.dumps([sorted(noted.items()), dtype, list(shape)])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass"))
