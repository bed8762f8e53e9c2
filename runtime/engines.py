"""engine.json: what an engine is, read before anything of it is deserialised. Standard library only."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Optional, get_type_hints

from ditf.runtime.bundle import FEATURES, FEATURES_DATA, MATCH, Bundle
from ditf.runtime.errors import BundleError
from ditf.runtime.manifest import conforms

SCHEMA = 1
ENGINES = "engines"
RECORD = "engine.json"
FEATURES_PLAN, MATCH_PLAN = "features.plan", "match.plan"


@dataclass(frozen=True)
class EngineRecord:
    """Everything that decides whether an engine fits, and how it was made.

    Attributes:
        key: of what it was made from; its directory's name.
        flavour: "tensorrt" or "tensorrt-rtx"; version: of the library that built it.
        target: compute capability, "portable", or "" for the GPU that was there; gpu: that GPU's name.
        onnx: {file of the bundle: sha256} of what it was built from.
        batch: smallest, usual and largest batch.
        options: of the build.
        plans: {file: {"bytes": n, "sha256": hex}}.
        left_out: {plan: why} of what could not be built for the target.
        seconds: of each plan's build; peak_bytes: of the building process's memory.
    """

    schema: int
    key: str
    flavour: str
    version: str
    target: str
    gpu: Optional[str]
    onnx: dict[str, str]
    batch: list[int]
    options: dict[str, Any]
    plans: dict[str, dict[str, Any]]
    left_out: dict[str, str]
    seconds: dict[str, float]
    peak_bytes: int

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def stale(self, bundle: Bundle) -> str:
        """Why the engine is not of this bundle; "" where it is."""
        for name, digest in self.onnx.items():
            if bundle.manifest.files.get(name, {}).get("sha256") != digest:
                return f"built from another {name}"
        return ""


def sources(bundle: Bundle) -> dict[str, str]:
    """{file: sha256} of what engines are built from."""
    names = (FEATURES, FEATURES_DATA, MATCH)
    return {name: bundle.manifest.files[name]["sha256"] for name in names if name in bundle.manifest.files}


def read_record(folder: Path) -> EngineRecord:
    """The record of one engine.

    Raises:
        BundleError: missing, damaged, or of a newer schema.
    """
    path = folder / RECORD
    fix = "build it again: ditf build"
    try:
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{folder} has no {RECORD}", fix) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read ({error})", fix) from error
    if not isinstance(document, dict) or not isinstance(document.get("schema"), int):
        raise BundleError(f"{path} is no engine record", fix)
    if document["schema"] > SCHEMA:
        raise BundleError(
            f"{folder} has schema {document['schema']}, this ditf reads up to {SCHEMA}",
            "run: pip install --upgrade ditf",
        )
    hints = get_type_hints(EngineRecord)
    for item in fields(EngineRecord):
        if item.name not in document or not conforms(document[item.name], hints[item.name]):
            raise BundleError(f"{path} has no valid {item.name}", fix)
    return EngineRecord(**{item.name: document[item.name] for item in fields(EngineRecord)})


def engine_folders(bundle: Path) -> list[Path]:
    """Directories of a bundle's engines, by name; those still being written are left out."""
    folder = bundle / ENGINES
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
