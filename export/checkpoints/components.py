"""Checks that a checkpoint names only classes that its family lists, and brings plain files and no code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ditf.export.checkpoints.formats.file_kinds import check_no_pointer
from ditf.export.checkpoints.layout import Checkpoint
from ditf.runtime.errors import InputError
from ditf.runtime.files.json_file import read_json
from ditf.runtime.files.reading import open_regular

_LIBRARIES = ("diffusers", "transformers")
_TEXT = ("text_encoder", "tokenizer")
_TABLES = ("tokenizer.json", "vocab.json")
_TEMPLATES = "additional_chat_templates"
_READ = (
    ".json",
    ".jinja",
    ".txt",
    ".model",
    ".safetensors",
)  # what diffusers and transformers read
_LARGEST_CONFIG, _LARGEST_TABLE = 4 << 20, 64 << 20  # bytes: some tokenizers have 256,000 tokens
_CODE = re.compile(r"auto_map|custom_pipelines|trust_remote_code|_?(attn|experts)_implementation(_internal)?")
_DEPTH = re.compile(r"(num|n)(_\w+)?_layers|num_blocks|layers_per_block")
_MOST_LAYERS = 1000  # no published model has a tenth of it
_REMOVE = "a checkpoint's own code is never run: use one whose classes are in diffusers and transformers"


def check_components(checkpoint: Checkpoint, classes: Sequence[str], unneeded: tuple[str, ...] = ()) -> None:
    """Compare the classes that model_index.json names with the supported ones. Nothing is imported.

    Args:
        classes: text encoders and tokenizers of transformers that may be named.
        unneeded: prefixes of the names of components that are not loaded.

    Raises:
        InputError: model_index.json names a pipeline of its own, a component of another library or a class
            that is not listed, or `check_files` refuses a file of a text encoder or tokenizer.
    """
    for name, entry in checkpoint.index().items():
        if name == "_class_name" and not isinstance(entry, str):
            raise InputError(f"model_index.json of {checkpoint.id} names a pipeline of its own", _REMOVE)
        text = name.startswith(_TEXT)
        plain = not isinstance(entry, list) and not text  # a setting of the pipeline
        if plain or entry in (None, [None, None]) or name.startswith(unneeded):
            continue
        library, found = entry if isinstance(entry, list) and len(entry) == 2 else (None, entry)
        if library not in (_LIBRARIES[1:] if text else _LIBRARIES) or not isinstance(found, str):
            raise InputError(f"model_index.json of {checkpoint.id} names {name} as {entry!a:.80}", _REMOVE)
        if text and found not in classes:
            raise InputError(
                f"{name} of {checkpoint.id} is of class {found!a:.80}, which is not supported",
                f"supported: {', '.join(classes)}",
            )
        if text and checkpoint.has(name):
            check_files(checkpoint.path / name)


def check_files(folder: Path) -> None:
    """Check the files of a component before libraries open them, which wait for FIFOs and read any size.

    Raises:
        InputError: a file is not regular, a text file is too large, or a configuration cannot be read or
            names code.
    """
    for path in sorted([*folder.glob("*"), *(folder / _TEMPLATES).glob("*")]):
        if path.suffix not in _READ or path.is_dir():
            continue
        table = path.suffix != ".json" or path.name in _TABLES or ".safetensors.index." in path.name
        limit = _LARGEST_TABLE if table else _LARGEST_CONFIG
        try:
            open_regular(path, None if path.suffix == ".safetensors" else limit).close()
            check_no_pointer(path)
            if path.name.endswith("config.json"):
                _check_config(path, read_json(path, _LARGEST_CONFIG))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{path} cannot be read ({reason})", "take the published file") from error


def _check_config(path: Path, document: Any) -> None:
    for key, value in _entries(document):
        if not _CODE.fullmatch(key) or not value:
            continue
        if "implementation" in key and "/" not in str(value):  # a name such as "sdpa", no repository
            continue
        raise InputError(f"{path} names code to run: {key} is {value!a:.60}", _REMOVE)
    check_depth(path, document)


def check_depth(what: object, document: Any) -> None:
    """Check that a configuration asks for no more layers than any model has, before a model is made of it.

    Raises:
        InputError: it does.
    """
    for key, value in _entries(document):
        if _DEPTH.fullmatch(key) and isinstance(value, (int, float)) and value > _MOST_LAYERS:
            raise InputError(f"{what} has {key}={value}", "take the published config.json")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys of a JSON value with their values, at any depth."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
