"""FeatureStore: features of many images on disk, one safetensors file an image, read where they lie.

    STORE/store.json                what the maps are: bundle, fit, condition, type. Whoever writes must agree
    STORE/maps/ab/<hash>.safetensors   `features` [C, h, w]; in its metadata the image's name, hash and size,
                                       and a digest of all of it
    STORE/index.json                for people: every map that was there when a run ended
    STORE/partial/                  files being written

A map's file is named after the hash of the image's name, and appears whole by a rename: several writers, on
one machine or many, need not know of each other. All but store.json can be derived from the maps.
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
        """Hash of what decides a map's values; in every map's metadata."""
        return _digest("\n".join(map(str, (self.features, self.prompt, self.fit, self.dtype))))

    def differences(self, other: StoreIdentity) -> list[str]:
        """What another has otherwise, for people."""
        pairs = [(item.name, getattr(self, item.name), getattr(other, item.name)) for item in fields(self)]
        named = [f"{name} {mine}, not {theirs}" for name, mine, theirs in pairs if mine != theirs]
        shown = [line for line in named if not line.startswith("features ")]
        return shown or (named and ["another export of the same layer"])


class FeatureStore(Mapping[str, FeatureMap]):
    """A store that `ditf features BUNDLE IMAGES... --output STORE` wrote; {name of an image: FeatureMap}.

    Maps are memory-mapped: opening one reads its file's header, and its values once to see that they are
    finite; what is not used may leave memory again. Maps that are written later can be had by name;
    `names`, `len` and iteration are of those that were there when the store was opened.

    Args:
        path: of the store.
        verify: compare every map with its digest when it is opened, which reads it once more.

    Attributes:
        path: of the store; identity: what its maps have in common.

    Raises:
        InputError: no store, or a damaged one.
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
        """Names: of the index where it has a file's, which its own name proves; else as the file says."""
        known = {map_path(self.path, name): name for name in _read_index(self.path)}
        for path in map_files(self.path):
            name = known.get(path)
            yield read_named(self.path, path).name if name is None else name


def narrowed(array: np.ndarray, dtype: str) -> np.ndarray:
    """An array in a type of `STORE_DTYPES`.

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
    return store / MAPS / digest[:2] / f"{digest}{_SUFFIX}"


def map_files(store: Path) -> list[Path]:
    """Every map's file: what has such a name."""
    return sorted(path for path in (store / MAPS).glob(f"*/*{_SUFFIX}") if is_map_name(path))


def is_map_name(path: Path) -> bool:
    """Whether a file in maps/ is named as `map_path` names one."""
    return bool(_MAP.fullmatch(path.name)) and path.parent.name == path.name[:2]


def read_named(store: Path, path: Path) -> StoredMap:
    """As `read_stored`, of a map that is where its image's map belongs.

    Raises:
        InputError: truncated, not a map, or another image's.
    """
    stored = read_stored(path)
    if map_path(store, stored.name) != path:
        raise InputError(f"{path} is the map of {stored.name!r}, whose place is another", AGAIN)
    return stored


def read_identity(store: Path) -> StoreIdentity:
    """What a store's maps have in common.

    Raises:
        InputError: no store, or one whose store.json is damaged or newer.
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
    """Of store.json."""
    return json.dumps({"schema": SCHEMA, **asdict(identity)}, indent=2) + "\n"


_LARGEST_INDEX = 1 << 30  # bytes; a million maps have a quarter of it


def _read_index(store: Path) -> list[str]:
    """Names; none where it cannot be read, since it can be derived."""
    try:
        with open_regular(store / INDEX) as file:
            return list(json.load(file)["maps"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []


def is_index(store: Path) -> bool:
    """Whether index.json of a folder is a store's."""
    try:
        document = read_json(store / INDEX, _LARGEST_INDEX)
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and {"schema", "maps"} == document.keys()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
