"""Writing a bundle as models of a Triton model repository.

    DIR/<name>.features/        features.onnx, or plans of it
    DIR/<name>.match_graph/     match.onnx, or plans of it; on GPUs
    DIR/<name>.match/           takes two maps and points: Python, which calls match_graph
    DIR/<name>.correspond/      takes two images and points: Python, which calls features and match_graph
    DIR/<name>.features_graph/  where the graph takes more than images; features is then Python too

Layout: triton-inference-server/server, docs/user_guide/model_repository.md. A ditf.json in each model
names the bundle that it belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ditf.engines.pbtxt import pbtxt
from ditf.engines.triton_config import (
    FEATURES_MODEL,
    MATCH_MODEL,
    ONNX,
    PLAN,
    Config,
    Files,
    Placement,
    batches,
    features_config,
    match_config,
    python_config,
)
from ditf.engines.triton_plans import Plans, capability
from ditf.runtime.backends.engine_records import FEATURES_PLAN, MATCH_PLAN
from ditf.runtime.bundles.bundle import CONDITIONS, FEATURES, FEATURES_DATA, MATCH, NOISE, Bundle
from ditf.runtime.bundles.golden_file import read_golden
from ditf.runtime.bundles.manifest import MANIFEST
from ditf.runtime.bundles.staging import check_space
from ditf.runtime.errors import InputError
from ditf.runtime.files.hashed import HashedFile
from ditf.runtime.files.json_file import json_text, read_json
from ditf.runtime.files.stage_folder import NEW, OLD, stage_folder, swap
from ditf.runtime.files.writing import link_end, sync_folder, sync_tree
from ditf.runtime.serving.protocol import contract
from ditf.runtime.serving.triton import FEATURES_GRAPH, MATCH_GRAPH, graph_inputs
from ditf.runtime.store.feature_store import features_hash

MARKER = "ditf.json"
CONFIG = "config.pbtxt"
SCHEMA = 1
GONE = "gone"  # folder of the stage that takes models which the bundle no longer has

_PYTHON = '''"""Written by ditf export-triton. The code is in the ditf that is installed beside Triton."""

from pathlib import Path

from ditf.runtime.serving.triton import BundleModel


class TritonPythonModel(BundleModel):
    folder = Path(__file__).parent
'''

_LARGEST_MARKER = 1 << 20  # bytes
_DIRECTORY = "model.onnx"  # of an ONNX model of several files; the model in it has the same name


@dataclass
class RepositoryModel:
    """A model to be written.

    Attributes:
        config: the content of config.pbtxt.
        copied: {path in the model's folder: file to copy}.
        written: {path in the model's folder: content}.
    """

    config: Config
    copied: dict[str, HashedFile] = field(default_factory=dict)
    written: dict[str, bytes] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.config["name"])

    @property
    def copied_bytes(self) -> int:
        return sum(source.path.stat().st_size for source in self.copied.values())


def check_name(name: str) -> str:
    """Check the name that a bundle gets in a repository and return it.

    Raises:
        InputError: the name does not fit a URL, a directory and a metric alike.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise InputError(
            f"{name!r} cannot be in a model's name", "choose letters, digits, dots and dashes with --name"
        )
    return name


def bundle_models(
    bundle: Bundle, name: str, placement: Placement, plans: Plans | None
) -> list[RepositoryModel]:
    """The models of a bundle, graphs first.

    Args:
        plans: the engines that run the graphs; None means ONNX Runtime.
    """
    manifest = bundle.manifest
    inputs = graph_inputs(bundle)
    plain = set(inputs) == {"image"}
    features_name = f"{name}.{contract.SERVED_FEATURES if plain else FEATURES_MODEL}"
    files, copied = _features_files(bundle, plans)
    features = RepositoryModel(features_config(features_name, manifest, inputs, files, placement), copied)
    features.written |= _warmup(bundle, batches(manifest, inputs))
    models = [features]
    graphs = {FEATURES_GRAPH: features_name}
    if placement.gpu:
        graphs[MATCH_GRAPH] = f"{name}.{MATCH_MODEL}"
        files, copied = _match_files(bundle, plans)
        models.append(RepositoryModel(match_config(graphs[MATCH_GRAPH], manifest, files, placement), copied))
    roles = (
        [contract.SERVED_MATCH, contract.SERVED_CORRESPOND] if plain else list(contract.model_specs(manifest))
    )
    # One process prepares while another waits for the graph; more of them fill a dynamic batch.
    count = placement.instances * (4 if batches(manifest, inputs) else 2)
    for role in roles:
        config = python_config(f"{name}.{role}", role, manifest, graphs, placement.largest_batch, count)
        beside = [file for file in (NOISE, CONDITIONS) if file in manifest.files]
        models.append(
            RepositoryModel(
                config,
                {f"1/{file}": bundle.file(file) for file in beside},
                {"1/model.py": _PYTHON.encode(), f"1/{MANIFEST}": manifest.to_json().encode()},
            )
        )
    return models


def write_models(
    repository: Path, bundle: Bundle, name: str, models: Sequence[RepositoryModel]
) -> list[Path]:
    """Write a bundle's models into a repository and replace those that it had there.

    The models are written to a stage and then renamed, graphs first, so that a model is never there before
    the graph that it calls. The stage is beside the repository, because Triton takes every folder inside for
    a model, hidden ones too (core, src/filesystem/implementations/local.h). It is inside only where the
    repository is the root of a file system.

    Returns:
        Folders of models that the bundle no longer has; they were removed.

    Raises:
        InputError: a folder of that name was not made by ditf for this bundle, or the disk is full.
    """
    if repository.exists() and not repository.is_dir():
        raise InputError(f"{repository} is a file", "name a directory")
    if (repository / MANIFEST).exists() or (repository / CONFIG).exists():
        raise InputError(f"{repository} is a bundle or a model, not a repository", "choose another directory")
    for model in models:
        _check_ours(repository / model.name, name)
    wanted = {model.name for model in models}
    gone = [path for path in _own(repository, name) if path.name not in wanted]
    total = sum(model.copied_bytes for model in models)
    check_space(repository, total)
    with _staging(repository) as (stage, place):
        for model in models:
            _write(stage / NEW / model.name, bundle, name, model)
        sync_tree(stage / NEW)
        place.mkdir(parents=True, exist_ok=True)
        _swap(stage, place, [model.name for model in models], gone)
        sync_folder(place)
    return gone


def _write(folder: Path, bundle: Bundle, name: str, model: RepositoryModel) -> None:
    for place, source in model.copied.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        source.copy(folder / place)
    for place, content in model.written.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(content)
    (folder / CONFIG).write_text(pbtxt(model.config), "utf-8")
    marker = {"schema": SCHEMA, "bundle": name, "features": features_hash(bundle)}
    (folder / MARKER).write_text(json_text(marker), "utf-8")


def _swap(stage: Path, repository: Path, names: Sequence[str], gone: Sequence[Path]) -> None:
    """Rename all models into their places; if one rename fails, undo the others."""
    done: list[tuple[Path, Path | None]] = []
    try:
        for name in names:
            place = repository / name
            done.append((place, swap(stage / NEW / name, place, stage / OLD)))
        for path in gone:
            (stage / GONE).mkdir(exist_ok=True)
            path.rename(stage / GONE / path.name)
            done.append((path, stage / GONE / path.name))
    except BaseException:
        for place, former in reversed(done):
            if former is None:
                place.rename(stage / NEW / place.name)
            else:
                swap(former, place, stage / "unwanted")
        raise


@contextmanager
def _staging(repository: Path) -> Iterator[tuple[Path, Path]]:
    """A temporary folder on the repository's file system, and the resolved path of the repository."""
    place = link_end(repository)
    beside, home = place.parent, place.name
    if place.exists() and place.stat().st_dev != beside.stat().st_dev:
        beside, home = place, "."
    with ExitStack() as stack:
        try:
            beside.mkdir(parents=True, exist_ok=True)
            stage = stack.enter_context(stage_folder(beside, place.name, home))
        except OSError as error:
            raise InputError(
                f"{beside} cannot be written ({error.strerror})", "choose another place"
            ) from error
        yield stage, place


def _check_ours(folder: Path, name: str) -> None:
    if folder.exists() and _owner(folder) != name:
        raise InputError(
            f"{folder} is not a model that ditf made of {name}", "choose another --name, or move it away"
        )


def _own(repository: Path, name: str) -> list[Path]:
    """The models in a repository that belong to a bundle."""
    if not repository.is_dir():
        return []
    return [path for path in sorted(repository.iterdir()) if path.is_dir() and _owner(path) == name]


def _owner(folder: Path) -> str | None:
    """The bundle's name that a model was made under; None if ditf did not make the model."""
    try:
        owner = read_json(folder / MARKER, _LARGEST_MARKER)["bundle"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return owner if isinstance(owner, str) else None


def _features_files(bundle: Bundle, plans: Plans | None) -> tuple[Files, dict[str, HashedFile]]:
    if plans is not None:
        return _plan_files(plans, FEATURES_PLAN)
    bundle.read_graph(
        FEATURES
    )  # checks that the graph refers only to its own weights: Triton opens any path in it
    # The weights lie beside the model, so that Triton wants a directory in place of one file.
    copied = {
        f"1/{_DIRECTORY}/{_DIRECTORY}": bundle.file(FEATURES),
        f"1/{_DIRECTORY}/{FEATURES_DATA}": bundle.file(FEATURES_DATA),
    }
    return Files(ONNX, None, {}), copied


def _match_files(bundle: Bundle, plans: Plans | None) -> tuple[Files, dict[str, HashedFile]]:
    if plans is not None and all(MATCH_PLAN in record.plans for _, record in plans.engines.values()):
        return _plan_files(plans, MATCH_PLAN)
    bundle.read_graph(MATCH)
    return Files(ONNX, None, {}), {"1/model.onnx": bundle.file(MATCH)}


def _plan_files(plans: Plans, plan: str) -> tuple[Files, dict[str, HashedFile]]:
    named = {folder.name: f"{folder.name}.plan" for folder, _ in plans.engines.values()}
    default = plans.default and named[plans.default[0].name]
    by_capability = {
        capability(target): named[folder.name] for target, (folder, _) in plans.by_target.items()
    }
    copied = {f"1/{named[key]}": record.plan(folder, plan) for key, (folder, record) in plans.engines.items()}
    return Files(PLAN, default, by_capability, plans.profile), copied


def _warmup(bundle: Bundle, dynamic: bool) -> dict[str, bytes]:
    """Warm-up data of the features model: golden images and the graph's other inputs."""
    batch = bundle.manifest.batch
    count = 1 if dynamic or batch == "dynamic" else int(batch)
    images = read_golden(bundle)["images"]
    data: dict[str, Any] = {"image": np.take(images, np.arange(count), axis=0, mode="wrap")}
    if bundle.manifest.noise == "input":
        data["noise"] = bundle.read_array(NOISE)
    if bundle.manifest.conditioning != "bake":
        first: Mapping[str, np.ndarray] = bundle.read_arrays(CONDITIONS)
        data |= {key.partition(".")[2]: array for key, array in first.items() if key.startswith("0.")}
    return {f"warmup/{name}": np.ascontiguousarray(array).tobytes() for name, array in data.items()}
