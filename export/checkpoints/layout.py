"""The layout of a diffusers checkpoint directory: its components, their configs and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditf.export.checkpoints.formats.file_kinds import check_no_pointer
from ditf.export.checkpoints.formats.lora.given import Lora
from ditf.export.checkpoints.formats.lora.weights import LoraWeights, check_components
from ditf.export.checkpoints.formats.original.layout import in_diffusers_names
from ditf.export.checkpoints.formats.quantised.dequantised import dequantised
from ditf.export.checkpoints.formats.stored_weights import open_weights
from ditf.export.checkpoints.weight_files import weight_files
from ditf.export.checkpoints.weights import Weights
from ditf.runtime.errors import InputError
from ditf.runtime.files.json_file import read_json

_LARGEST_CONFIG = 4 << 20  # bytes
_AGAIN = "download or save the checkpoint again"


@dataclass(frozen=True)
class Checkpoint:
    """A local directory in diffusers' layout.

    Attributes:
        path: the directory.
        id: the name that the user gave: "demo", a path or a hub id.
        revision: commit hash of a model from the hub, else None.
        variant: the variant of the weights that is read, such as "fp16"; None for the plain weights.
        loras: what is folded into the weights of the transformer and the text encoders, in this order.
        transformer: a transformer in place of the directory's own: a folder with config.json and weights, or
            a file of weights, whose config is the directory's. None for the directory's own.
    """

    path: Path
    id: str
    revision: str | None = None
    variant: str | None = None
    loras: tuple[Lora, ...] = ()
    transformer: Path | None = None

    def folder(self, component: str) -> Path:
        """Where a component's config and weights are; a file given as the transformer has its weights."""
        if component == "transformer" and self.transformer is not None and self.transformer.is_dir():
            return self.transformer
        return self.path / component

    def has(self, component: str) -> bool:
        """Whether the directory has a component (transformer, vae, ...)."""
        return self.folder(component).is_dir()

    @property
    def mismatch_fix(self) -> str:
        """What to do where the transformer's weights do not fit its config."""
        if self.transformer is None:
            return "take config.json and weights from the same model"
        if self.transformer.is_dir():
            return f"save {self.transformer} again: its config.json is another model's"
        return f"is {self.id} the model that {self.transformer.name} was made from? If not, name that model"

    def config(self, component: str) -> dict[str, Any]:
        """A component's JSON configuration.

        Raises:
            InputError: the configuration is missing or not JSON.
        """
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        config = _read_json(self.folder(component) / name)
        if config is None:
            raise InputError(
                f"{self.path} is not a diffusers checkpoint: it has no {component}/{name}",
                "save one with DiffusionPipeline.save_pretrained",
            )
        return config

    def identity(self) -> dict[str, str | None]:
        """What the manifest records of where the weights are from.

        Returns:
            `id` and `revision` of the model. With a given transformer `id` is that one's path, `weights` its
            fingerprint, and `base` the id of the pipeline whose revision it is.
        """
        if self.transformer is None:
            return {"id": self.id, "revision": self.revision}
        weights = self.weights("transformer").fingerprint()
        return {"id": str(self.transformer), "revision": self.revision, "base": self.id, "weights": weights}

    def index(self) -> dict[str, Any]:
        """model_index.json, which names the pipeline and its components; {} if there is none."""
        return _read_json(self.path / "model_index.json") or {}

    def check_complete(self, unneeded: tuple[str, ...] = ()) -> None:
        """Check that every component that model_index.json names is there.

        Args:
            unneeded: prefixes of the names of components that may be missing.

        Raises:
            InputError: a component is missing, as in a snapshot whose download was interrupted; the message
                names the first.
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

    def class_names(self) -> dict[str, int]:
        """Names and numbers of the classes, as DiTPipeline reads them; {} if there are none.

        Raises:
            InputError: id2label of model_index.json is malformed.
        """
        labels = self.index().get("id2label") or {}
        if not isinstance(labels, dict) or not all(
            number.isdecimal() and len(number) < 10 for number in labels
        ):
            raise InputError(f"id2label of {self.path}/model_index.json is no table of classes", _AGAIN)
        return {
            name.strip(): int(number) for number, names in labels.items() for name in str(names).split(",")
        }

    def weights(self, component: str) -> Weights:
        """A component's weights, dequantised and with the LoRAs folded in.

        Raises:
            InputError: a file is missing, truncated or not safetensors, weights are quantised in a way that
                is not supported, a LoRA does not fit, or `in_diffusers_names` cannot read the transformer.
        """
        own = self._own_weights(component)
        if not self.loras or component not in ("transformer", *self.text_encoders()):
            return own
        return self._with_loras(own, component)

    def changed_by_loras(self, component: str) -> list[set[str]]:
        """For each LoRA, the names of the component's tensors that it changes."""
        if not self.loras:
            return []
        return self._with_loras(self._own_weights(component), component).changed

    def _own_weights(self, component: str) -> Weights:
        """A component's weights without LoRAs."""
        if component == "transformer" and self.transformer is not None and self.transformer.is_file():
            return in_diffusers_names(file_weights(self.transformer), self.config(component))
        folder = self.folder(component)
        config = (_read_json(folder / "config.json") or {}).get("quantization_config")
        if config is not None and not isinstance(config, dict):
            raise InputError(f"quantization_config of {folder}/config.json is no table", "save it again")
        return dequantised(open_weights(weight_files(folder, self.variant)), config)

    def _with_loras(self, weights: Weights, component: str) -> LoraWeights:
        model = str(self.config("transformer").get("_class_name"))
        return LoraWeights(weights, self.loras, component, self.text_encoders(), model)

    def text_encoders(self) -> tuple[str, ...]:
        """The names of the text encoders that model_index.json names."""
        index = self.index()
        named = [name for name, entry in index.items() if entry not in (None, [None, None])]
        return tuple(name for name in named if name.startswith("text_encoder"))

    def check_loras(self, unneeded: tuple[str, ...] = ()) -> None:
        """Check that the LoRAs change only components that are there; `weights` checks their tensors.

        Args:
            unneeded: as for `check_complete`.

        Raises:
            InputError: a LoRA cannot be read, or changes a component that is not there.
        """
        for lora in self.loras:
            check_components(lora, self.text_encoders(), unneeded)

    def stored(self, component: str) -> tuple[int, int]:
        """Parameters of a component's weights, and their bytes as stored; (0, 0) if they are unreadable."""
        try:
            weights = self._own_weights(component)
        except InputError:
            return 0, 0
        parameters = sum(map(weights.numel, weights.shapes))
        return parameters, sum(weights.bytes_of.values())


@dataclass(frozen=True)
class Part:
    """One model of a checkpoint.

    Attributes:
        checkpoint: the checkpoint.
        name: the model's folder in it; "." where the checkpoint is only this model.
    """

    checkpoint: Checkpoint
    name: str

    def config(self) -> dict[str, Any]:
        """Its JSON configuration.

        Raises:
            InputError: the configuration is missing or not JSON.
        """
        return self.checkpoint.config(self.name)

    def weights(self) -> Weights:
        """Its weights; a tensor is read when it is asked for."""
        return self.checkpoint.weights(self.name)


def file_weights(path: Path) -> Weights:
    """The tensors of one file, dequantised, under the names that they have in it.

    Raises:
        InputError: the file cannot be read, or its weights are quantised in a way that is not supported.
    """
    return dequantised(open_weights([path]))


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        document = read_json(path, _LARGEST_CONFIG)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError):
            check_no_pointer(path)
        reason = error.strerror if isinstance(error, OSError) else error
        marked = "BOM" in str(reason)  # which some editors write
        fix = "save it as UTF-8 without a byte-order mark" if marked else "save the checkpoint again"
        raise InputError(f"{path} cannot be read ({reason})", fix) from error
    if not isinstance(document, dict):
        raise InputError(f"{path} is not a configuration", "save the checkpoint again")
    return document
