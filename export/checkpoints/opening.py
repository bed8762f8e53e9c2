"""Opens a checkpoint or a VAE: the built-in demo, a directory, a file of weights, or a model on the hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ditf.export.checkpoints import DEMO
from ditf.export.checkpoints.formats.file_kinds import PICKLES, SAFETENSORS, check_weights_file
from ditf.export.checkpoints.layout import Checkpoint, Part, file_weights
from ditf.export.checkpoints.loading import current_class
from ditf.export.checkpoints.recognise import (
    LORA_FILE,
    base_of,
    check_channels,
    check_transformer_tensors,
    folder_error,
)
from ditf.runtime.errors import InputError

DEMO_CHECKPOINT = Path(__file__).parent.parent / "demo_model"
"""The demo: transformer/ in float16, and scheduler/. It works in pixels, so it has no VAE."""

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_HUB_FILE = re.compile(
    r"^(?:https://huggingface\.co/)?([A-Za-z0-9][\w.-]*/[\w.-]+)/(?:(?:resolve|blob)/[^/]+/)?(.+)$"
)
_WEIGHTS = (*SAFETENSORS, ".gguf", *PICKLES)
_OTHER_PARTS = ("first_stage_model.", "vae.", "text_encoders.", "cond_stage_model.", "conditioner.")

logger = logging.getLogger(__name__)


@contextmanager
def open_checkpoint(
    model: str,
    revision: str | None = None,
    variant: str | None = None,
    unneeded: tuple[str, ...] = (),
    base: str | None = None,
    transformer: str | None = None,
) -> Iterator[Checkpoint]:
    """Find a checkpoint, and download it if it is on the hub.

    A transformer may come from elsewhere: `model` with `transformer` is the same as `transformer`, given as
    the model, with `base`.

    Args:
        model: "demo", a directory or a hub id; with `base` the transformer, as for `transformer`.
        revision: branch, tag or commit of a hub model.
        variant: of the weights, such as "fp16".
        unneeded: prefixes of the names of components that may be missing; their weights are not downloaded.
        base: the pipeline that everything but the transformer comes from: a directory or a hub id.
        transformer: a transformer in place of the checkpoint's own: a file of weights, a folder with config
            and weights, or a folder that has this folder as transformer/.

    Raises:
        InputError: there is no such directory or model, it is no complete diffusers checkpoint, or the
            transformer is none that ditf exports.
        MissingComponent: the hub cannot be reached.
    """
    if base is not None and transformer is not None:
        raise InputError(
            "--base and --transformer exclude each other",
            "give --model FILE --base BASE, or --model BASE --transformer FILE",
        )
    named = "--model"
    if base is not None:
        model, transformer, named = base, model, "--base"
    given, given_class = (None, None) if transformer is None else _transformer(transformer, base)
    path = Path(model).expanduser()
    local = model == DEMO or path.exists()
    if revision is not None and local:
        raise InputError(f"--revision is for hub ids, and {model} is local", "leave it out")
    if variant is not None and model == DEMO:
        raise InputError("the demo model has no variants", "leave --variant out")
    if not model:
        raise InputError(f"{named} is empty", "pass a checkpoint directory, a hub id or 'demo'")
    if given is not None:
        unneeded = (*unneeded, "transformer")
    if model == DEMO:
        checkpoint = Checkpoint(DEMO_CHECKPOINT, DEMO, transformer=given)
    elif path.is_dir():
        checkpoint = Checkpoint(path, model, variant=variant, transformer=given)
        _check_folder(checkpoint)
    elif path.exists():
        raise _file_error(path, named)
    elif path.suffix.lower() in _WEIGHTS:
        raise _no_file(model, named)
    elif _HUB_ID.match(model):
        from ditf.export.checkpoints.hub import download

        snapshot = download(model, revision, variant, unneeded)
        checkpoint = Checkpoint(snapshot, model, revision=snapshot.name, variant=variant, transformer=given)
    else:
        raise InputError(
            f"{model}: no such directory or file",
            "pass a checkpoint directory, a file of weights with --base, a hub id (name/model) or 'demo'",
        )
    if given is not None:
        _check_class(checkpoint, given, given_class)
    check_channels(given or model, checkpoint.config("transformer"))
    checkpoint.check_complete(unneeded)
    yield checkpoint


def _no_file(given: str, flag: str) -> InputError:
    """The error for a file that does not exist here; the hub's files are named by their path or address."""
    on_hub = _HUB_FILE.match(given)
    if on_hub is None or Path(given).parts[0] in (".", "..", "~") or Path(Path(given).parts[0]).exists():
        return InputError(f"{flag} {given}: no such file", "check the path")
    return InputError(
        f"{flag} {given}: no such file here, and a file on the hub is not downloaded",
        f"run: hf download {on_hub[1]} {on_hub[2]} --local-dir DIR, and pass the file",
    )


def _transformer(given: str, base: str | None) -> tuple[Path, str]:
    """Find a transformer that is given beside a pipeline: a file, or the folder of a component.

    Returns:
        Its path, and the name of its diffusers class.

    Raises:
        InputError: it does not exist, or is no transformer that ditf exports.
    """
    flag = "--transformer" if base is None else "--model"
    path = Path(given).expanduser()
    if path.is_file():
        check_weights_file(path)
        stored = file_weights(path)
        class_name = check_transformer_tensors(path, stored).class_name
        unread = sorted({name.partition(".")[0] for name in stored.shapes if name.startswith(_OTHER_PARTS)})
        if unread:
            logger.warning(
                f"{path} also holds {', '.join(unread)}, which are not read: VAE and text encoders are those"
                " of the pipeline"
            )
        return path, class_name
    if path.suffix.lower() in _WEIGHTS and not path.exists():
        raise _no_file(given, flag)
    if not given or not path.is_dir():
        raise InputError(
            f"{flag} {given!r:.80}: no such file or directory",
            "pass a file of weights or a transformer's folder; from the hub, run hf download first",
        )
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    if (folder / "config.json").is_file():
        class_name = _class_name(folder)
        if "Transformer" in class_name:
            return folder, class_name
    raise (None if folder != path else folder_error(path)) or InputError(
        f"{flag} {given} has no transformer's config.json",
        "pass a folder that save_pretrained wrote, or the file",
    )


def _class_name(folder: Path) -> str:
    return current_class(Checkpoint(folder, str(folder)).config("."))


def _check_class(checkpoint: Checkpoint, given: Path, found: str | None) -> None:
    """Check that a transformer is of the class of the pipeline that it is given for.

    Raises:
        InputError: it is not, or the pipeline has no transformer's config, which a file needs.
    """
    own = checkpoint.path / "transformer" / "config.json"
    if given.is_dir() and not own.is_file():
        return
    expected = current_class(replace(checkpoint, transformer=None).config("transformer"))
    if found is not None and found != expected:
        fix = "give the pipeline that it was made from"
        if expected in found:  # as trainers call classes of their own: FluxTransformer2DModelWithMasking
            fix = f"if its tensors are those of {expected}, pass its file of weights instead of the folder"
        raise InputError(f"{given} is a {found}, and the transformer of {checkpoint.id} is a {expected}", fix)


def _check_folder(checkpoint: Checkpoint) -> None:
    """Refuse a directory that is something else, and mention a LoRA that lies in it.

    Raises:
        InputError: the directory is a component, a LoRA, a UNet or another thing that is recognised.
    """
    folder = checkpoint.path
    if not checkpoint.has("transformer"):
        error = folder_error(folder)
        if error is not None:
            raise error
    if (folder / LORA_FILE).is_file():
        logger.warning(f"{folder} has {LORA_FILE}, which is applied only with --lora {folder / LORA_FILE}")


def _file_error(path: Path, named: str) -> InputError:
    """The error for a file that was given as the pipeline; for a transformer it names the base that fits."""
    check_weights_file(path)
    if named == "--base":
        return InputError(f"--base {path} is a file", "pass the directory or the hub id of a whole pipeline")
    stored = file_weights(path)
    layout = check_transformer_tensors(path, stored)
    return InputError(
        f"{path} is only a transformer ({layout.class_name}); its text encoders, VAE and configs come from a"
        " pipeline",
        f"add --base {base_of(stored, layout)}, or the directory of that model",
    )


def open_vae(vae: str, revision: str | None = None) -> Part:
    """Find a VAE, alone or in a whole checkpoint, and download it if it is on the hub.

    Args:
        vae: a directory or a hub id.
        revision: branch, tag or commit of a hub model.

    Raises:
        InputError: there is no such directory or model, or it has no VAE.
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
        check_weights_file(path)
        raise InputError(
            f"--vae {vae} is a file",
            "pass the VAE's diffusers directory, which has config.json beside the weights, or a hub id",
        )
    elif _HUB_ID.match(vae):
        from ditf.export.checkpoints.hub import download_vae

        snapshot = download_vae(vae, revision)
        checkpoint = Checkpoint(snapshot, vae, revision=snapshot.name)
    else:
        raise InputError(f"--vae {vae}: no such directory", "pass a directory or a hub id (name/model)")
    return vae_part(checkpoint)


def vae_part(checkpoint: Checkpoint) -> Part:
    """The VAE of a checkpoint, which may be only a VAE.

    Raises:
        InputError: the checkpoint has no VAE.
    """
    for name in ("vae", "."):
        if (checkpoint.path / name / "config.json").is_file():
            return Part(checkpoint, name)
    raise InputError(
        f"--vae {checkpoint.id} holds neither config.json nor vae/config.json",
        "pass a directory that AutoencoderTiny.save_pretrained or a pipeline wrote",
    )
