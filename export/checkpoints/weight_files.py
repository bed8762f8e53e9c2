"""The weight files of a component: single files, shards and variants."""

from __future__ import annotations

import re
from pathlib import Path

from ditf.export.checkpoints.formats.file_kinds import PICKLES, UNFINISHED, check_no_pointer
from ditf.runtime.errors import InputError
from ditf.runtime.files.json_file import read_json

_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_DIFFUSERS, _TRANSFORMERS = "diffusion_pytorch_model", "model"  # what each library calls its files
_VARIANTS = (
    r"[^.]+\.([^.]+)\.safetensors(?:\.index\.json)?",
    r"[^.]+\.safetensors\.index\.([^.]+)\.json",
    r"[^.]+\.safetensors\.([^.]+)\.index\.json",  # of older versions of diffusers
)
_LARGEST_INDEX = 64 << 20  # bytes


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a component: one file, or the shards that its index names.

    Where a folder has several, as after two saves, this is the choice that the component's own library makes:
    diffusers prefers an index to a single file, transformers a single file to an index.

    Args:
        folder: the component's; the text encoders (text_encoder*) are those of transformers.
        variant: "fp16" for files such as model.fp16.safetensors. None takes plain files if there are any,
            else the first variant.

    Raises:
        InputError: there are no safetensors files, a shard is missing, the variant does not exist, or several
            files could be meant.
    """
    encoder = folder.name.startswith("text_encoder")
    if encoder:
        _check_no_other_name(folder)
    own = _TRANSFORMERS if encoder else _DIFFUSERS
    files = [path for path in sorted(folder.glob("*.safetensors")) if not _SHARD.search(path.name)]
    files += [path for path in sorted(folder.glob("*.safetensors*.json")) if ".index." in path.name]
    stems = {path.name.partition(".")[0] for path in files}
    named = next((stem for stem in (own, _DIFFUSERS, _TRANSFORMERS) if stem in stems), None)
    files = [path for path in files if named is None or path.name.partition(".")[0] == named]
    found = {variant_of(path) for path in files}
    if not files:
        raise _no_weights(folder)
    if variant is None and None not in found:
        variant = sorted(name for name in found if name is not None)[0]
    meant = [path for path in files if variant_of(path) == variant]
    if not meant:
        raise InputError(f"{folder} has no weights of variant {variant!r}", "leave --variant out")
    singles = [path for path in meant if path.suffix == ".safetensors"]
    indexes = [path for path in meant if path.suffix == ".json"]
    if len(singles) > 1 or len(indexes) > 1:
        first, second, *_ = singles if len(singles) > 1 else indexes
        raise InputError(
            f"{folder} has {first.name} and {second.name}, and none has the name that its library reads",
            f"leave one there, named {own}.safetensors",
        )
    if indexes and not (encoder and singles):
        return _shards(folder, indexes[0])
    return singles


def variant_of(path: Path) -> str | None:
    """The variant in a name like model.fp16.safetensors or x.safetensors.index.fp16.json, else None."""
    name = _SHARD.sub("", path.name)
    for pattern in _VARIANTS:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return match[1]
    return None


def _check_no_other_name(folder: Path) -> None:
    """Check that a text encoder's config names no file, which transformers would read in place of its own.

    Raises:
        InputError: it names one.
    """
    try:
        config = read_json(folder / "config.json", _LARGEST_INDEX)
    except (OSError, ValueError):
        return  # reported where the config is read
    named = config.get("transformers_weights") if isinstance(config, dict) else None
    if named is not None:
        raise InputError(
            f"{folder}/config.json names the file of weights, {named!r:.60}",
            f"rename that file to {_TRANSFORMERS}.safetensors and remove transformers_weights there",
        )


def _no_weights(folder: Path) -> InputError:
    """The error for a folder without safetensors files that could be read alone."""
    names = sorted(path.name for path in folder.glob("*"))
    unfinished = [name for name in names if name.endswith(UNFINISHED)]
    if unfinished:
        return InputError(
            f"{folder} has {unfinished[0]}, a download that has not finished", "run the download again"
        )
    if any(_SHARD.search(name) for name in names):
        return InputError(
            f"{folder} has shards but no index", "download its .safetensors.index.json too, or save it again"
        )
    quantised = [name for name in names if name.endswith(".gguf")]
    if quantised:
        return InputError(
            f"{folder} has no safetensors weights, but {quantised[0]}", "pass that file with --transformer"
        )
    if any(name.endswith(PICKLES) for name in names):
        return InputError(
            f"{folder} has only pickle weights, which can run code when loaded",
            "save them as safetensors: model.save_pretrained(folder, safe_serialization=True)",
        )
    return InputError(f"{folder} has no safetensors weights", "download or save them into it")


def _shards(folder: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(read_json(index, _LARGEST_INDEX)["weight_map"].values()))
        files = [folder / Path(name).name for name in names]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, ValueError):
            check_no_pointer(index)
        raise InputError(
            f"{index} is not a shard index ({error!r})", "download or save the checkpoint again"
        ) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {missing[0]}, which its index names", "download the checkpoint again"
        )
    return files
