"""The parts of a checkpoint, loaded by the plain `from_pretrained` of diffusers and transformers.

The classes were checked before (`ditf.export.checkpoints.components`): a checkpoint's own code is never run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from ditf.export.checkpoints.components import check_files
from ditf.export.checkpoints.layout import Checkpoint, Part
from ditf.export.checkpoints.loading import first_line
from ditf.export.checkpoints.text.chat_template import render_chats
from ditf.export.checkpoints.weight_files import variant_of, weight_files
from ditf.runtime.errors import DitfError, InputError

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


class Parts:
    """Loads the parts of one checkpoint in float32.

    A checkpoint whose transformer lies elsewhere, or is adapted after it is loaded, overrides `transformer`
    and `transformer_shell`.

    Args:
        checkpoint: a diffusers directory.
        transformer_class: the diffusers class that the transformer has to be of.
    """

    def __init__(self, checkpoint: Checkpoint, transformer_class: str) -> None:
        self._checkpoint = checkpoint
        self._transformer_class = getattr(diffusers, transformer_class)

    def transformer(self) -> Any:
        """The transformer with its weights.

        Raises:
            InputError: it cannot be loaded, or not every tensor of it is read.
        """
        named = getattr(diffusers, str(self._checkpoint.config("transformer").get("_class_name")), None)
        loaded = _model(named, Part(self._checkpoint, "transformer"), "torch_dtype")
        if not isinstance(loaded, self._transformer_class):
            raise InputError(
                f"diffusers loads the transformer of {self._checkpoint.id} as {type(loaded).__name__},"
                f" ditf as {self._transformer_class.__name__}",
                "report this checkpoint to ditf",
            )
        return loaded

    def transformer_shell(self) -> Any:
        """The transformer without values, for a pipeline that only encodes its prompt."""
        from accelerate import init_empty_weights

        config = self._checkpoint.config("transformer")
        with init_empty_weights(include_buffers=False), quiet_classes():
            return self._transformer_class.from_config(config)

    def vae(self) -> Any:
        """The checkpoint's own VAE, or None if it has none."""
        if not self._checkpoint.has("vae"):
            return None
        return self.vae_of(Part(self._checkpoint, "vae"))

    def vae_of(self, part: Part) -> Any:
        """Any VAE.

        Raises:
            InputError: as for `transformer`.
        """
        vae_class = getattr(diffusers, str(part.config().get("_class_name")), None)
        return _model(vae_class, part, "torch_dtype")

    def text(self) -> dict[str, Any]:
        """Tokenizers and text encoders by their names in model_index.json.

        Raises:
            InputError: as for `transformer`.
        """
        import transformers

        parts: dict[str, Any] = {}
        for name, entry in self._checkpoint.index().items():
            if not name.startswith(("tokenizer", "text_encoder")) or entry == [None, None]:
                continue
            found = getattr(transformers, entry[1])
            if name.startswith("tokenizer"):
                folder = _folder(self._checkpoint, name)
                check_files(folder)
                with _loading(found.__name__, folder):
                    parts[name] = found.from_pretrained(folder, **_LOCAL)
            else:
                parts[name] = _model(found, Part(self._checkpoint, name), "dtype", **_LOCAL)
        return parts


def _folder(checkpoint: Checkpoint, component: str) -> Path:
    return checkpoint.folder(component)


def _model(model_class: Any, part: Part, dtype: str, **options: Any) -> Any:
    """A model in float32 and eval mode, by plain `from_pretrained`.

    Args:
        dtype: the name of the argument that sets the type of the weights.

    Raises:
        InputError: the model cannot be loaded, or not every tensor of it is read.
    """
    folder = _folder(part.checkpoint, part.name)
    check_files(folder)
    with _loading(getattr(model_class, "__name__", str(model_class)), folder):
        model, report = model_class.from_pretrained(
            folder,
            variant=variant_of(weight_files(folder, part.checkpoint.variant)[0]),
            use_safetensors=True,
            output_loading_info=True,
            **{dtype: torch.float32},
            **options,
        )
    _check_report(model, report, folder)
    return model.eval().requires_grad_(False)


def _check_report(model: nn.Module, report: Mapping[str, Any], folder: Path) -> None:
    """Check a loading report: no tensor is missing or of another shape, none of the model's parts is unread.

    A tensor that belongs to no part of the model, such as the decoder of a T5 whose encoder is loaded, may be
    left over. One inside a part, such as the scale of a quantised linear, changes what the part means.

    Raises:
        InputError: names the first tensor.
    """
    modules = {name for name, _ in model.named_modules() if name}
    buffers = {name for name, _ in model.named_buffers()}
    wrong = {
        "random, because the file lacks it": list(report.get("missing_keys", ())),
        "of another shape in the file": list(report.get("mismatched_keys", ())),
        "in the file and not read": [
            key
            for key in report.get("unexpected_keys", ())
            if key not in buffers and any(parent in modules for parent in _parents(key))
        ],
    }
    for what, keys in wrong.items():
        for key in sorted(key if isinstance(key, str) else key[0] for key in keys):
            raise InputError(
                f"{folder}: plain {type(model).__name__}.from_pretrained leaves {key} {what}",
                "use weights that were saved with save_pretrained",
            )


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


@contextmanager
def quiet_classes() -> Iterator[None]:
    """Silence what diffusers announces about its own classes, and NumPy about diffusers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@contextmanager
def _loading(name: str, folder: Path) -> Iterator[None]:
    try:
        with quiet_classes():
            yield
    except (DitfError, MemoryError):
        raise
    except Exception as error:  # files can make a library raise anything
        raise InputError(
            f"plain {name}.from_pretrained cannot load {folder} ({first_line(error)})",
            "export with --golden none to go without the comparison",
        ) from error


def check_chat(parts: Mapping[str, Any], prompt: str, thinking: bool) -> None:
    """Render a chat template in a process with limits, before the pipeline renders it in this one.

    Raises:
        InputError: as `render_chats`.
    """
    render_chats(parts["tokenizer"], [prompt], thinking)
