"""A diffusers checkpoint directory: finding it, its configs, and its weights one tensor at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ditf.runtime.errors import InputError, MissingComponent

DEMO = "demo"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Checkpoint:
    """A local directory in diffusers' layout.

    Attributes:
        path: the directory.
        id: what the user called it.
        revision: commit hash, for a model from the hub.
    """

    path: Path
    id: str
    revision: str | None = None

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
        try:
            config = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"{self.path} is not a diffusers checkpoint: it has no {component}/{name}",
                "save one with DiffusionPipeline.save_pretrained",
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error})", "save the checkpoint again") from error
        if not isinstance(config, dict):
            raise InputError(f"{path} is not a configuration", "save the checkpoint again")
        return config

    def weights(self, component: str) -> Weights:
        """A component's weights, read lazily."""
        return Weights(_weight_files(self.path / component))


class Weights:
    """Tensors of one component by name, read from safetensors when asked for.

    Raises (when made and when read):
        InputError: a file is missing, truncated or not safetensors; a tensor is missing.
    """

    def __init__(self, files: list[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        self.read: set[str] = set()
        """Names of the tensors that were read: the proof of what was not."""
        for path in files:
            with _open_safetensors(path) as file:
                self._file_of.update(dict.fromkeys(file.keys(), path))

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in float32, on the CPU."""
        path = self._file_of.get(name)
        if path is None:
            raise InputError(
                f"the checkpoint has no tensor {name}", "its config and its weights do not belong together"
            )
        with _open_safetensors(path) as file:
            tensor: torch.Tensor = file.get_tensor(name)
        self.read.add(name)
        return tensor.to(torch.float32)

    def load_into(self, module: torch.nn.Module, prefix: str) -> torch.nn.Module:
        """Fill a module's parameters from the tensors under `prefix`; returns it in eval mode."""
        state = {name: self.tensor(f"{prefix}.{name}") for name in module.state_dict()}
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(
                f"{prefix}: {str(error).splitlines()[-1].strip()}",
                "the checkpoint's config and weights do not belong together",
            ) from error
        return module.eval()


@contextmanager
def open_checkpoint(model: str) -> Iterator[Checkpoint]:
    """Find a checkpoint: the built-in demo, a directory, or a model on the hub.

    The demo model is written to a temporary directory that lives as long as the context.

    Raises:
        InputError: no such directory or model, pickle weights, or not a diffusers layout.
        MissingComponent: the hub cannot be reached.
    """
    if model == DEMO:
        from ditf.export.demo import write_demo_checkpoint

        with TemporaryDirectory(prefix="ditf-demo-") as folder:
            write_demo_checkpoint(Path(folder))
            yield Checkpoint(Path(folder), DEMO)
        return
    path = Path(model).expanduser()
    if path.is_dir():
        checkpoint = Checkpoint(path, model)
    elif path.exists():
        raise InputError(f"{model} is a file, not a checkpoint directory", "pass its directory")
    elif _HUB_ID.match(model):
        checkpoint = _download(model)
    else:
        raise InputError(
            f"{model}: no such directory", "pass a checkpoint directory, a hub id (name/model) or 'demo'"
        )
    checkpoint.config("transformer")
    yield checkpoint


def _download(model: str) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        path = Path(snapshot_download(model, allow_patterns=list(_HUB_FILES)))
    except GatedRepoError:
        raise InputError(
            f"{model} is gated", "accept its licence on its page, then run: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{model}: no such directory, and no such model on the hub",
            "check the spelling; a private model needs: hf auth login",
        ) from None
    except Exception as error:  # the network's errors share no base class
        raise MissingComponent(
            f"{model}: no such directory, and the hub cannot be reached ({type(error).__name__})",
            "connect to the network, or pass a local checkpoint directory",
        ) from error
    return Checkpoint(path, model, revision=path.name)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component: one, or the shards its index names."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        try:
            names = sorted(set(json.loads(indexes[0].read_text("utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{indexes[0]} is not a shard index ({error!r})") from error
        files = [folder / Path(name).name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise InputError(
                f"{folder} lacks {missing[0]}, which its index names", "download the checkpoint again"
            )
        return files
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        plain = [file for file in files if file.name.count(".") == 1]  # not a variant such as .fp16.
        files = plain or files
    if files:
        return files[:1]
    if any(found for pattern in _PICKLES for found in folder.glob(pattern)):
        raise InputError(
            f"{folder} has only pickle weights, which can run code when loaded",
            "save them as safetensors: model.save_pretrained(folder, safe_serialization=True)",
        )
    raise InputError(f"{folder} has no safetensors weights", "download the checkpoint again")


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is not a readable safetensors file ({error})", "download the checkpoint again"
        ) from error
