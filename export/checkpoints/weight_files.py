"""The weight files of a component: single files, shards and variants."""

from __future__ import annotations

import re
from pathlib import Path

from ditf.runtime.errors import InputError
from ditf.runtime.files.json_file import read_json

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_DIFFUSERS_NAME = "diffusion_pytorch_model"
_LARGEST_INDEX = 64 << 20  # bytes
_AGAIN = "download or save the checkpoint again"


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a component: one file, or the shards that its index names.

    Args:
        variant: "fp16" for files such as model.fp16.safetensors. None takes plain files if there are any,
            else the first variant.

    Raises:
        InputError: there are no safetensors files, a shard is missing, or the variant does not exist.
    """
    indexes = {variant_of(path): path for path in sorted(folder.glob("*.safetensors.index*.json"))}
    files = sorted(folder.glob("*.safetensors"))
    # The top level of a VAE's repository may have copies for other programs.
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
    """The variant in a name like model.fp16.safetensors or x.safetensors.index.fp16.json, else None."""
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
