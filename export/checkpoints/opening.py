"""Opens a checkpoint or a VAE: the built-in demo, a directory, or a model on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ditf.export.checkpoints import DEMO
from ditf.export.checkpoints.layout import Checkpoint, Part
from ditf.runtime.errors import InputError

DEMO_CHECKPOINT = Path(__file__).parent.parent / "demo_model"
"""The demo: transformer/ in float16, and scheduler/. It works in pixels, so it has no VAE."""

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


@contextmanager
def open_checkpoint(
    model: str, revision: str | None = None, variant: str | None = None, unneeded: tuple[str, ...] = ()
) -> Iterator[Checkpoint]:
    """Find a checkpoint, and download it if it is on the hub.

    Args:
        model: "demo", a directory or a hub id.
        revision: branch, tag or commit of a hub model.
        variant: of the weights, such as "fp16".
        unneeded: prefixes of the names of components that may be missing; their weights are not downloaded.

    Raises:
        InputError: there is no such directory or model, or it is no complete diffusers checkpoint.
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
        yield Checkpoint(DEMO_CHECKPOINT, DEMO)
        return
    if path.is_dir():
        checkpoint = Checkpoint(path, model, variant=variant)
    elif path.exists():
        raise InputError(f"{model} is a file, not a checkpoint directory", "pass its directory")
    elif _HUB_ID.match(model):
        from ditf.export.checkpoints.hub import download

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
        raise InputError(f"--vae {vae} is a file, not a directory", "pass its directory")
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
