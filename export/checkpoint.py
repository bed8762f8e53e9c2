"""A diffusers checkpoint directory: finding it, its configs, and the files its weights are in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditf.export.weights import SafetensorsWeights
from ditf.runtime.errors import InputError
from ditf.runtime.files.json_file import read_json

DEMO = "demo"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_DIFFUSERS_NAME = "diffusion_pytorch_model"
_LARGEST_CONFIG, _LARGEST_INDEX = 4 << 20, 64 << 20  # bytes
_AGAIN = "download or save the checkpoint again"


@dataclass(frozen=True)
class Checkpoint:
    """A local directory in diffusers' layout.

    Attributes:
        path: the directory.
        id: what the user called it.
        revision: commit hash, for a model from the hub.
        variant: of the weights that are read, such as "fp16"; None for the plain ones.
    """

    path: Path
    id: str
    revision: str | None = None
    variant: str | None = None

    def has(self, component: str) -> bool:
        """Whether a component (transformer, vae, ...) is there."""
        return (self.path / component).is_dir()

    def config(self, component: str) -> dict[str, Any]:
        """A component's JSON configuration.

        Raises:
            InputError: missing or not JSON.
        """
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        path = self.path / component / name
        config = _read_json(path)
        if config is None:
            raise InputError(
                f"{self.path} is not a diffusers checkpoint: it has no {component}/{name}",
                "save one with DiffusionPipeline.save_pretrained",
            )
        return config

    def index(self) -> dict[str, Any]:
        """model_index.json, which names the pipeline and its components; {} where there is none."""
        return _read_json(self.path / "model_index.json") or {}

    def check_complete(self, unneeded: tuple[str, ...] = ()) -> None:
        """Whether every component that model_index.json names is there.

        Args:
            unneeded: starts of the names of those that may be missing.

        Raises:
            InputError: names the first that is missing: a snapshot that was not downloaded to its end.
        """
        for name, entry in self.index().items():
            named = isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)
            optional = name in ("safety_checker", "feature_extractor", "image_encoder")
            optional = optional or name.startswith(unneeded)
            if named and not optional and not self.has(name):
                raise InputError(
                    f"{self.path} is incomplete: its model_index.json names {name}, which is not there",
                    "give what it made of the prompt with --prompt-embeds, or download it too"
                    if name.startswith(("text_encoder", "tokenizer"))
                    else _AGAIN,
                )

    def check_weights(self, unneeded: tuple[str, ...] = ()) -> None:
        """Open the weights of VAE and text encoders; no value is read.

        Args:
            unneeded: as for `check_complete`.

        Raises:
            InputError: a file is missing, truncated or not safetensors.
        """
        encoders = [name for name in self.index() if name.startswith("text_encoder")]
        for name in ("vae", *encoders):
            if self.has(name) and not name.startswith(unneeded):
                self.weights(name)

    def class_names(self) -> dict[str, int]:
        """{name: number} of the classes, as DiTPipeline reads them; {} where there are none."""
        labels = self.index().get("id2label") or {}
        if not isinstance(labels, dict) or not all(
            number.isdecimal() and len(number) < 10 for number in labels
        ):
            raise InputError(f"id2label of {self.path}/model_index.json is no table of classes", _AGAIN)
        return {
            name.strip(): int(number) for number, names in labels.items() for name in str(names).split(",")
        }

    def weights(self, component: str) -> SafetensorsWeights:
        """A component's weights, read lazily."""
        return SafetensorsWeights(weight_files(self.path / component, self.variant))

    def stored(self, component: str) -> tuple[int, int]:
        """Parameters and bytes of a component's weights; (0, 0) where they are no safetensors."""
        try:
            weights = self.weights(component)
        except InputError:
            return 0, 0
        parameters = sum(map(weights.numel, weights.shapes))
        return parameters, sum(weights.bytes_of.values())

    def loading_variant(self, component: str) -> str | None:
        """The variant to name to `from_pretrained`, which looks for plain files otherwise."""
        return variant_of(weight_files(self.path / component, self.variant)[0])


@dataclass(frozen=True)
class Part:
    """One model of a checkpoint.

    Attributes:
        name: its folder; "." where the checkpoint is nothing but this model.
    """

    checkpoint: Checkpoint
    name: str

    def config(self) -> dict[str, Any]:
        """Its JSON configuration.

        Raises:
            InputError: missing or not JSON.
        """
        return self.checkpoint.config(self.name)

    def weights(self) -> SafetensorsWeights:
        """Its weights, read lazily."""
        return self.checkpoint.weights(self.name)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        document = read_json(path, _LARGEST_CONFIG)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read ({reason})", "save the checkpoint again") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} is not a configuration", "save the checkpoint again")
    return document


@contextmanager
def open_checkpoint(
    model: str, revision: str | None = None, variant: str | None = None, unneeded: tuple[str, ...] = ()
) -> Iterator[Checkpoint]:
    """Find a checkpoint: the built-in demo, a directory, or a model on the hub.

    Args:
        revision: branch, tag or commit of a hub model.
        variant: of the weights, such as "fp16".
        unneeded: starts of the names of components that may be missing; their weights are not downloaded.

    Raises:
        InputError: no such directory or model, pickle weights, or not a diffusers layout.
        MissingComponent: the hub cannot be reached.
    """
    path = Path(model).expanduser()
    local = model == DEMO or path.exists()
    if revision is not None and local:
        raise InputError(f"--revision is for hub ids, and {model} is local", "leave it out")
    if variant is not None and model == DEMO:
        raise InputError("the demo model has no variants", "leave --variant out")
    if not model:
        raise InputError("--model is empty", "pass a checkpoint directory, a hub id or 'demo'")
    if model == DEMO:
        from ditf.export.demo import DEMO_CHECKPOINT

        yield Checkpoint(DEMO_CHECKPOINT, DEMO)
        return
    if path.is_dir():
        checkpoint = Checkpoint(path, model, variant=variant)
    elif path.exists():
        raise InputError(f"{model} is a file, not a checkpoint directory", "pass its directory")
    elif _HUB_ID.match(model):
        from ditf.export.hub import download

        snapshot = download(model, revision, variant, unneeded)
        checkpoint = Checkpoint(snapshot, model, revision=snapshot.name, variant=variant)
    else:
        raise InputError(
            f"{model}: no such directory", "pass a checkpoint directory, a hub id (name/model) or 'demo'"
        )
    checkpoint.config("transformer")
    checkpoint.check_complete(unneeded)
    yield checkpoint


def open_vae(vae: str, revision: str | None = None) -> Part:
    """Find a VAE: in a directory of its own or of a whole checkpoint, or on the hub.

    Args:
        revision: branch, tag or commit of a hub model.

    Raises:
        InputError: no such directory or model, or no VAE in it.
        MissingComponent: the hub cannot be reached.
    """
    path = Path(vae).expanduser()
    if not vae:
        raise InputError("--vae is empty", "pass the directory or the hub id of a VAE")
    if revision is not None and path.exists():
        raise InputError(f"--vae-revision is for hub ids, and {vae} is local", "leave it out")
    if path.is_dir():
        checkpoint = Checkpoint(path, vae)
    elif path.exists():
        raise InputError(f"--vae {vae} is a file, not a directory", "pass its directory")
    elif _HUB_ID.match(vae):
        from ditf.export.hub import download_vae

        snapshot = download_vae(vae, revision)
        checkpoint = Checkpoint(snapshot, vae, revision=snapshot.name)
    else:
        raise InputError(f"--vae {vae}: no such directory", "pass a directory or a hub id (name/model)")
    return vae_part(checkpoint)


def vae_part(checkpoint: Checkpoint) -> Part:
    """The VAE of a checkpoint, which may be nothing else.

    Raises:
        InputError: it has none.
    """
    for name in ("vae", "."):
        if (checkpoint.path / name / "config.json").is_file():
            return Part(checkpoint, name)
    raise InputError(
        f"--vae {checkpoint.id} holds neither config.json nor vae/config.json",
        "pass a directory that AutoencoderTiny.save_pretrained or a pipeline wrote",
    )


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a component: one, or the shards its index names.

    Args:
        variant: "fp16" for files such as model.fp16.safetensors. None prefers plain files, and takes a
            variant where there is nothing else.

    Raises:
        InputError: none, pickles only, a missing shard.
    """
    indexes = {variant_of(path): path for path in sorted(folder.glob("*.safetensors.index*.json"))}
    files = sorted(folder.glob("*.safetensors"))
    # At the top of a VAE's repository other programs' copies lie beside it.
    files = [path for path in files if path.name.startswith(_DIFFUSERS_NAME)] or files
    single = {variant_of(path): path for path in files if not _SHARD.search(path.name)}
    found = indexes.keys() | single.keys()
    if variant is None and found:
        variant = None if None in found else sorted(name for name in found if name is not None)[0]
    if variant in indexes:
        return _shards(folder, indexes[variant])
    if variant in single:
        return [single[variant]]
    if found:
        raise InputError(f"{folder} has no weights of variant {variant!r}", "leave --variant out")
    if files:
        raise InputError(f"{folder} has shards but no index", _AGAIN)
    if any(found for pattern in _PICKLES for found in folder.glob(pattern)):
        raise InputError(
            f"{folder} has only pickle weights, which can run code when loaded",
            "save them as safetensors: model.save_pretrained(folder, safe_serialization=True)",
        )
    raise InputError(f"{folder} has no safetensors weights", "download the checkpoint again")


def variant_of(path: Path) -> str | None:
    """The part of a name like model.fp16.safetensors or x.safetensors.index.fp16.json; None of plain ones."""
    name = _SHARD.sub("", path.name)
    match = re.fullmatch(r"[^.]+\.safetensors\.index\.([^.]+)\.json|[^.]+\.([^.]+)\.safetensors", name)
    return None if match is None else match[1] or match[2]


def _shards(folder: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(read_json(index, _LARGEST_INDEX)["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} is not a shard index ({error!r})", _AGAIN) from error
    files = [folder / Path(name).name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {missing[0]}, which its index names", "download the checkpoint again"
        )
    return files
