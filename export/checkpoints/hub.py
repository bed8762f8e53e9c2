"""Downloads checkpoints from the Hugging Face hub, and only the files that an export reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from ditf.export.checkpoints.recognise import listing_error
from ditf.export.checkpoints.weight_files import variant_of
from ditf.runtime.errors import InputError, MissingComponent

_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


def download(model: str, revision: str | None, variant: str | None, unneeded: tuple[str, ...] = ()) -> Path:
    """Download a model, or take it from the hub's cache; returns the folder of the snapshot.

    Args:
        model: hub id.
        revision: branch, tag or commit.
        variant: of the weights, such as "fp16".
        unneeded: prefixes of the names of components whose weights are left out.

    Raises:
        InputError: there is no such model or revision, the model is gated, or it is a LoRA or another thing
            that `listing_error` recognises.
        MissingComponent: the hub cannot be reached and the cache does not have the model.
    """

    def choose(files: list[str]) -> list[str]:
        _check_listing(model, files)
        return wanted_files(files, variant, unneeded)

    return _snapshot(model, revision, choose)


def _check_listing(model: str, files: list[str]) -> None:
    """Check that the files of a repository are those of a pipeline, before they are downloaded.

    Raises:
        InputError: they are a LoRA, one component, or another thing that is recognised.
    """
    if "model_index.json" in files or any(name.startswith("transformer/") for name in files):
        return
    error = listing_error(model, files)
    if error is not None:
        raise error
    if "config.json" in files:
        raise InputError(
            f"{model} is one component, not a pipeline",
            f"for a transformer run hf download {model} --local-dir DIR, then --model BASE --transformer DIR",
        )


def download_vae(model: str, revision: str | None) -> Path:
    """Download a VAE, or only the VAE of a whole checkpoint; returns the folder of the snapshot.

    Raises:
        InputError, MissingComponent: as for `download`.
    """
    return _snapshot(model, revision, wanted_vae_files)


def _snapshot(model: str, revision: str | None, choose: Callable[[list[str]], list[str]]) -> Path:
    """Download the files of a model that `choose` picks from all their names."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        files = HfApi().list_repo_files(model, revision=revision)
        return Path(snapshot_download(model, revision=revision, allow_patterns=choose(files)))
    except GatedRepoError:
        raise InputError(
            f"{model} is gated", "accept its licence on its page, then run: hf auth login"
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"{model} has no revision {revision}", "name a branch, tag or commit") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{model}: no such directory, and no such model on the hub",
            "check the spelling; a private model needs: hf auth login",
        ) from None
    except InputError:
        raise
    except Exception as error:  # the network's errors share no base class
        try:
            return Path(snapshot_download(model, revision=revision, local_files_only=True))
        except Exception:
            raise MissingComponent(
                f"{model}: no such directory, and the hub cannot be reached ({type(error).__name__})",
                "connect to the network, or pass a local checkpoint directory",
            ) from error


def wanted_files(files: Iterable[str], variant: str | None, unneeded: tuple[str, ...] = ()) -> list[str]:
    """The names of the files of a repository that an export reads.

    Left out are weights at the top level (a second copy for other programs), pickles, and other variants
    than the one asked for. A component that lacks the variant is read from its plain weights.
    """
    paths = [PurePosixPath(name) for name in files]
    inside = [
        path
        for path in paths
        if len(path.parts) == 2 and path.suffix in _SUFFIXES and path.parts[0] not in _UNUSED
    ]
    wanted = [path for path in paths if str(path) == "model_index.json"]
    for folder in sorted({path.parts[0] for path in inside}):
        here = [path for path in inside if path.parts[0] == folder]
        weights = [path for path in here if ".safetensors" in path.name]
        variants = {variant_of(Path(path.name)) for path in weights}
        named = sorted(name for name in variants if name is not None)
        plain = None if None in variants or not named else named[0]
        chosen = variant if variant in variants else plain
        if folder.startswith(unneeded):
            chosen = "none of them"
        wanted += [path for path in here if path not in weights or variant_of(Path(path.name)) == chosen]
    return [str(path) for path in wanted]


def wanted_vae_files(files: Iterable[str]) -> list[str]:
    """The names of the files that an export reads: of a VAE's repository, or of a checkpoint's vae/ folder.

    Second copies of the weights for other programs are left out.
    """
    listed = list(files)
    inside = [name for name in listed if name.startswith("vae/")]
    if inside:
        return [name for name in wanted_files(inside, None) if name.startswith("vae/")]
    moved = [f"vae/{name}" for name in listed if name.startswith(("config.json", "diffusion_pytorch_model"))]
    return [name.removeprefix("vae/") for name in wanted_files(moved, None)]
