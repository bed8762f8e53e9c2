"""FeatureStore: the features of many images on disk, one safetensors file per image, memory-mapped.

    STORE/store.json                   what the maps have in common: bundle, fit, condition, type. All
                                       writers must agree on it.
    STORE/maps/ab/<hash>.safetensors   `features` [C, h, w]; its metadata hold the image's name, hash and
                                       size, and a digest of all this
    STORE/index.json                   for people: the maps that existed when a run ended
    STORE/partial/                     files that are being written

A map's file is named after the hash of the image's name and appears as a whole by a rename, so that writers
on one or many machines need not know of each other. All files but store.json can be derived from the maps.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Optional, Union, get_type_hints

import numpy as np

from ditf.runtime.bundles.bundle import CONDITIONS, FEATURES, FEATURES_DATA, NOISE, Bundle
from ditf.runtime.bundles.manifest import conforms
from ditf.runtime.errors import InputError, NewerSchema
from ditf.runtime.features import FeatureMap
from ditf.runtime.files.json_file import read_json
from ditf.runtime.files.reading import open_regular, read_regular
from ditf.runtime.store.stored_map import AGAIN, StoredMap, read_stored, safetensors_package

SCHEMA = 1
STORE = "store.json"
INDEX = "index.json"
MAPS = "maps"
PARTIAL = "partial"
_SUFFIX = ".safetensors"
STORE_DTYPES = ("float16", "float32")

_MAP = re.compile(rf"[0-9a-f]{{32}}{re.escape(_SUFFIX)}")
_LARGEST_IDENTITY = 1 << 20  # bytes


@dataclass(frozen=True)
class StoreIdentity:
    """What every map of a store has in common.

    Attributes:
        features: a hash of the bundle's features graph, its weights, noise and conditions.
        model, layer: the bundle's model and layer, for people.
        prompt: the condition; None for a bundle that has only one.
        fit: how images were fitted to the engine's size.
        dtype: the type of the maps.
        channels: the number of channels, C.
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
        """The identity of maps that a bundle computes.

        Raises:
            InputError: a store does not hold this type.
        """
        if dtype not in STORE_DTYPES:
            raise InputError(f"--features-dtype {dtype!r} is not {' or '.join(STORE_DTYPES)}", "leave it out")
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
        """A hash of all that decides a map's values, which stands in every map's metadata."""
        return _digest("\n".join(map(str, (self.features, self.prompt, self.fit, self.dtype))))

    def differences(self, other: StoreIdentity) -> list[str]:
        """What differs in another identity, for people."""
        pairs = [(item.name, getattr(self, item.name), getattr(other, item.name)) for item in fields(self)]
        named = [f"{name} {mine}, not {theirs}" for name, mine, theirs in pairs if mine != theirs]
        shown = [line for line in named if not line.startswith("features ")]
        return shown or (named and ["another export of the same layer"])


class FeatureStore(Mapping[str, FeatureMap]):
    """A store that `ditf features BUNDLE IMAGES... --output STORE` wrote: {image name: FeatureMap}.

    Maps are memory-mapped. Opening one reads its file's header, and its values once to check that they are
    finite; pages that are not used may leave memory again. Maps that are written later can be read by name,
    while `names`, `len` and iteration cover those that existed when the store was first listed.

    Args:
        path: the store's directory.
        verify: compare every map with its digest when it is opened, which reads it once more.

    Attributes:
        path: the store's directory.
        identity: what the store's maps have in common.

    Raises:
        InputError: there is no store, or it is damaged.
        MissingComponent: safetensors is not installed.
    """

    def __init__(self, path: Union[str, Path], verify: bool = False) -> None:
        safetensors_package()
        self.path = Path(path)
        self.verify = verify
        self.identity = read_identity(self.path)
        self._names: tuple[str, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the images, sorted."""
        if self._names is None:
            self._names = tuple(sorted(self._list()))
        return self._names

    def __getitem__(self, name: str) -> FeatureMap:
        if name not in self:
            raise KeyError(name)
        path = map_path(self.path, name)
        stored = read_stored(path)
        if stored.key != self.identity.key:
            raise InputError(f"{path} is of another store or bundle", f"remove it and {AGAIN}")
        if stored.name != name:
            raise InputError(f"{path} is the map of {stored.name!r}, not of {name!r}", AGAIN)
        if self.verify and not stored.whole(path):
            what = "has no digest" if stored.digest is None else "is not what was written"
            raise InputError(f"{path} {what}", AGAIN)
        try:
            return stored.features(path)
        except InputError as error:
            raise InputError(f"{path}: {error.problem}", f"remove it and {AGAIN}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and map_path(self.path, name).is_file()

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.path)!r}, {len(self)} maps of {self.identity.channels} channels)"

    def _list(self) -> Iterator[str]:
        """All image names, from the index where the file's name proves them, else from the file."""
        known = {map_path(self.path, name): name for name in _read_index(self.path)}
        for path in map_files(self.path):
            name = known.get(path)
            yield read_named(self.path, path).name if name is None else name


def narrowed(array: np.ndarray, dtype: str) -> np.ndarray:
    """Convert an array to a type of `STORE_DTYPES`.

    Raises:
        InputError: the type does not hold a value.
    """
    largest = float(np.abs(array).max())
    if largest > float(np.finfo(dtype).max):
        raise InputError(f"the features reach {largest:.3g}, beyond {dtype}", "add --features-dtype float32")
    return np.ascontiguousarray(array, dtype=dtype)


def features_hash(bundle: Bundle) -> str:
    """A hash of the files that decide a bundle's features."""
    files = bundle.manifest.files
    deciding = (FEATURES, FEATURES_DATA, NOISE, CONDITIONS)
    return _digest("\n".join(files[name]["sha256"] for name in deciding if name in files))


def map_path(store: Path, name: str) -> Path:
    """The path of an image's map."""
    digest = _digest(name)[:32]
    return store / MAPS / digest[:2] / f"{digest}{_SUFFIX}"


def map_files(store: Path) -> list[Path]:
    """The files of all maps, found by their names."""
    return sorted(path for path in (store / MAPS).glob(f"*/*{_SUFFIX}") if is_map_name(path))


def is_map_name(path: Path) -> bool:
    """Whether a file in maps/ has a name that `map_path` gives."""
    return bool(_MAP.fullmatch(path.name)) and path.parent.name == path.name[:2]


def read_named(store: Path, path: Path) -> StoredMap:
    """Read a map's description as `read_stored` does, and check that the file is its image's.

    Raises:
        InputError: the file is truncated, not a map, or the map of another image.
    """
    stored = read_stored(path)
    if map_path(store, stored.name) != path:
        raise InputError(f"{path} is the map of {stored.name!r}, whose place is another", AGAIN)
    return stored


def read_identity(store: Path) -> StoreIdentity:
    """Read what a store's maps have in common.

    Raises:
        InputError: there is no store, or its store.json is damaged or newer.
    """
    path = store / STORE
    try:
        document = json.loads(read_regular(path, _LARGEST_IDENTITY))
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
    """The content of store.json."""
    return json.dumps({"schema": SCHEMA, **asdict(identity)}, indent=2) + "\n"


_LARGEST_INDEX = 1 << 30  # bytes; the index of a million maps has a quarter of it


def _read_index(store: Path) -> list[str]:
    """The names in the index; none if it cannot be read, because it can be derived."""
    try:
        with open_regular(store / INDEX) as file:
            return list(json.load(file)["maps"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []


def is_index(store: Path) -> bool:
    """Whether the index.json of a folder is that of a store."""
    try:
        document = read_json(store / INDEX, _LARGEST_INDEX)
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and {"schema", "maps"} == document.keys()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
