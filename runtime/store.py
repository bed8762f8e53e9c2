"""FeatureStore: features of many images on disk, one safetensors file an image, read where they lie.

    STORE/store.json                what the maps are: bundle, fit, condition, type. Whoever writes must agree
    STORE/maps/ab/<hash>.safetensors   `features` [C, h, w]; in its metadata the image's name, hash and size
    STORE/index.json                for people: every map that was there when a run ended
    STORE/partial/                  files being written

A map's file is named after the hash of the image's name, and appears whole by a rename: several writers, on
one machine or many, need not know of each other. All but store.json can be derived from the maps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Optional, Union, get_type_hints

import numpy as np

from ditf.runtime.bundle import CONDITIONS, FEATURES, FEATURES_DATA, NOISE, Bundle
from ditf.runtime.errors import InputError, NewerSchema, missing_extra
from ditf.runtime.features import FeatureMap
from ditf.runtime.manifest import conforms

SCHEMA = 1
STORE = "store.json"
INDEX = "index.json"
MAPS = "maps"
PARTIAL = "partial"
SUFFIX = ".safetensors"
TENSOR = "features"
DTYPES = ("float16", "float32")

_AGAIN = "run ditf features again: it computes what is missing"


@dataclass(frozen=True)
class StoreIdentity:
    """What every map of a store has in common.

    Attributes:
        features: one hash of the bundle's features graph, its weights, noise and conditions.
        model, layer: of the bundle, for people; prompt: the condition, None of a bundle that has one.
        fit: how images met the engine's size; dtype: of the maps; channels: C.
    """

    features: str
    model: str
    layer: str
    prompt: Optional[str]
    fit: str
    dtype: str
    channels: int

    @classmethod
    def of(cls, bundle: Bundle, fit: str, prompt: str | None, dtype: str) -> StoreIdentity:
        """Of maps that a bundle computes.

        Raises:
            InputError: a type that a store does not hold.
        """
        if dtype not in DTYPES:
            raise InputError(f"--features-dtype {dtype!r} is not {' or '.join(DTYPES)}", "leave it out")
        manifest = bundle.manifest
        if prompt is None and manifest.conditions:
            prompt = manifest.conditions[0]["name"]
        return cls(
            features=features_hash(bundle),
            model=f"{manifest.model['id']}",
            layer=manifest.layer_name,
            prompt=prompt,
            fit=fit,
            dtype=dtype,
            channels=manifest.channels,
        )

    @property
    def key(self) -> str:
        """Hash of what decides a map's values; in every map's metadata."""
        return _digest("\n".join(map(str, (self.features, self.prompt, self.fit, self.dtype))))

    def differences(self, other: StoreIdentity) -> list[str]:
        """What another has otherwise, for people."""
        pairs = [(item.name, getattr(self, item.name), getattr(other, item.name)) for item in fields(self)]
        named = [f"{name} {mine}, not {theirs}" for name, mine, theirs in pairs if mine != theirs]
        shown = [line for line in named if not line.startswith("features ")]
        return shown or (named and ["another export of the same layer"])


@dataclass(frozen=True)
class StoredMap:
    """What a map's file says of itself.

    Attributes:
        name: of the image; image_sha256: of its file.
        image_size: (H, W) px; extent: (rows, columns) of the map that the image covers, in cells.
        shape: (C, h, w); dtype: of the numbers; offset: of the first in the file, bytes.
        key: of the store's identity.
    """

    name: str
    image_sha256: str
    image_size: tuple[int, int]
    extent: tuple[float, float]
    shape: tuple[int, int, int]
    dtype: str
    offset: int
    key: str


class FeatureStore(Mapping[str, FeatureMap]):
    """A store that `ditf features BUNDLE IMAGES... --output STORE` wrote; {name of an image: FeatureMap}.

    Maps are memory-mapped: opening one reads its file's header, and its values once to see that they are
    finite; what is not used may leave memory again. Maps that are written later can be had by name;
    `names`, `len` and iteration are of those that were there when the store was opened.

    Attributes:
        path: of the store; identity: what its maps have in common.

    Raises:
        InputError: no store, or a damaged one.
        MissingComponent: safetensors is not installed.
    """

    def __init__(self, path: Union[str, Path]) -> None:
        safetensors_package()
        self.path = Path(path)
        self.identity = read_identity(self.path)
        self._names: tuple[str, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the images, sorted."""
        if self._names is None:
            self._names = tuple(sorted(self._list()))
        return self._names

    def __getitem__(self, name: str) -> FeatureMap:
        if name not in self:
            raise KeyError(name)
        path = map_path(self.path, name)
        stored = read_stored(path)
        if stored.key != self.identity.key:
            raise InputError(f"{path} is of another store or bundle", f"remove it and {_AGAIN}")
        array = np.memmap(path, stored.dtype, "r", stored.offset, stored.shape)
        try:
            return FeatureMap(array, stored.image_size, stored.extent)
        except InputError as error:
            raise InputError(f"{path}: {error.problem}", f"remove it and {_AGAIN}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and map_path(self.path, name).is_file()

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.path)!r}, {len(self)} maps of {self.identity.channels} channels)"

    def _list(self) -> Iterator[str]:
        """Names by the index where it has them: a file's name never stands for another image."""
        known = {entry["file"]: name for name, entry in _read_index(self.path).items()}
        for path in map_files(self.path):
            name = known.get(path.relative_to(self.path).as_posix())
            yield read_stored(path).name if name is None else name


def narrowed(array: np.ndarray, dtype: str) -> np.ndarray:
    """An array in a type of `DTYPES`.

    Raises:
        InputError: values that the type does not hold.
    """
    largest = float(np.abs(array).max())
    if largest > float(np.finfo(dtype).max):
        raise InputError(f"the features reach {largest:.3g}, beyond {dtype}", "add --features-dtype float32")
    return np.ascontiguousarray(array, dtype=dtype)


def features_hash(bundle: Bundle) -> str:
    """One hash of the files that decide a bundle's features."""
    files = bundle.manifest.files
    deciding = (FEATURES, FEATURES_DATA, NOISE, CONDITIONS)
    return _digest("\n".join(files[name]["sha256"] for name in deciding if name in files))


def map_path(store: Path, name: str) -> Path:
    """Where the map of an image is."""
    digest = _digest(name)[:32]
    return store / MAPS / digest[:2] / f"{digest}{SUFFIX}"


def map_files(store: Path) -> list[Path]:
    """Every map's file."""
    return sorted((store / MAPS).glob(f"*/*{SUFFIX}"))


def read_identity(store: Path) -> StoreIdentity:
    """What a store's maps have in common.

    Raises:
        InputError: no store, or one whose store.json is damaged or newer.
    """
    path = store / STORE
    try:
        document = json.loads(path.read_text("utf-8"))
        schema = document["schema"]
        if isinstance(schema, int) and schema > SCHEMA:
            raise NewerSchema(
                f"{store} has schema {schema}, this ditf reads up to {SCHEMA}",
                "run: pip install --upgrade ditf",
            )
        hints = get_type_hints(StoreIdentity)
        values = {name: document[name] for name in hints}
        if not all(conforms(values[name], hint) for name, hint in hints.items()):
            raise ValueError("a field is of another type")
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{store} is not a feature store: it has no {STORE}", "make one with ditf features"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error!r:.80})", "make the store again") from error
    return StoreIdentity(**values)


def identity_json(identity: StoreIdentity) -> str:
    """Of store.json."""
    return json.dumps({"schema": SCHEMA, **asdict(identity)}, indent=2) + "\n"


def metadata(
    name: str, image_sha256: str, feature_map: FeatureMap, identity: StoreIdentity
) -> dict[str, str]:
    """Of a map's file, as `read_stored` reads it."""
    return {
        "name": name,
        "image_sha256": image_sha256,
        "image_size": json.dumps(feature_map.image_size),
        "extent": json.dumps(feature_map.cells),
        "key": identity.key,
    }


def read_stored(path: Path) -> StoredMap:
    """What a map's file says of itself; its values are not read.

    Raises:
        InputError: truncated, or not a map.
    """
    try:
        # safetensors compares the header with the file's length: a truncated one is refused here.
        with safetensors_package().safe_open(path, framework="numpy") as file:
            noted = file.metadata() or {}
            tensor = file.get_slice(TENSOR)
            shape, dtype = tuple(tensor.get_shape()), {"F16": "float16", "F32": "float32"}[tensor.get_dtype()]
            names = list(file.keys())
        with path.open("rb") as raw:
            offset = 8 + int.from_bytes(raw.read(8), "little")  # one tensor: it follows the header
        size, extent = json.loads(noted["image_size"]), json.loads(noted["extent"])
        fits = conforms(size, tuple[int, int]) and conforms(extent, tuple[float, float])
        if names != [TENSOR] or len(shape) != 3 or not fits:
            raise ValueError("not one feature map")
        said = (noted["name"], noted["image_sha256"], tuple(size), tuple(extent))
        return StoredMap(*said, shape, dtype, offset, noted["key"])
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors has an error of its own, which is no class of Python's
        detail = str(error).split("\n")[0][:80]
        raise InputError(f"{path} is no whole feature map ({detail})", _AGAIN) from error


def _read_index(store: Path) -> dict[str, Any]:
    """Entries by name; none where it cannot be read, since it can be derived."""
    try:
        maps = json.loads((store / INDEX).read_text("utf-8"))["maps"]
        return maps if all(isinstance(entry["file"], str) for entry in maps.values()) else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def safetensors_package() -> Any:
    """safetensors, or the error that says how to install it."""
    try:
        import safetensors
    except ImportError:
        raise missing_extra("safetensors", "eval") from None
    return safetensors
