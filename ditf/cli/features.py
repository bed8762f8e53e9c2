"""`ditf features`: feature maps of images, in one .npz file or in a store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Optional

import numpy as np
import typer

from ditf.cli.support.bundles import open_bundle, open_model
from ditf.cli.support.options import (
    RUNNING,
    BackendOption,
    BundleArgument,
    FitOption,
    JsonOption,
    PromptOption,
    verb,
)
from ditf.cli.support.output import bytes_text, say, show, table, write_json
from ditf.cli.support.paths import check_outside, check_writable
from ditf.cli.support.progress import stages
from ditf.cli.support.state import state
from ditf.runtime import FeatureMap
from ditf.runtime.errors import GateFailed, InputError
from ditf.runtime.files.writing import replacing
from ditf.runtime.images import FITS, find_images, image_suffixes, skipped_files
from ditf.runtime.printable import valid_unicode
from ditf.runtime.store.extraction import Extraction, extract, image_name
from ditf.runtime.store.extraction_ray import ExtractionJob
from ditf.runtime.store.feature_store import STORE_DTYPES, StoreIdentity, narrowed
from ditf.runtime.store.ray_driver import ray_cluster
from ditf.runtime.store.writer import StoreWriter

_ENGINES = ("local", "ray")
_LARGEST_LIST = 256 << 20  # bytes of a list of images


@verb(*RUNNING)
def features(
    bundle: BundleArgument,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="STORE|NPZ",
            help="Write a store into this directory, or one file that ends in .npz.",
        ),
    ],
    images: Annotated[
        Optional[list[Path]],
        typer.Argument(metavar="[IMAGE|DIR]...", help="Images of any size, or folders of images."),
    ] = None,
    inputs: Annotated[
        Optional[list[Path]],
        typer.Option(
            "--input", metavar="DIR|FILE", help="A folder of images, or a file with one path a line."
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(metavar="local|ray", help="Run here, or on the machines of a Ray cluster.")
    ] = "local",
    ray_address: Annotated[
        Optional[str],
        typer.Option(
            metavar="ADDRESS",
            help="Address as ray.init takes it; by default RAY_ADDRESS, or a cluster on this machine.",
        ),
    ] = None,
    workers: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            min=1,
            max=4096,
            help="Number of Ray actors; by default one for each GPU, or one for each machine.",
        ),
    ] = None,
    features_dtype: Annotated[
        Optional[str],
        typer.Option(
            metavar="float16|float32",
            help="Type of the stored features; float16 in a store, the bundle's own in .npz by default.",
        ),
    ] = None,
    prompt: PromptOption = None,
    fit: FitOption = "stretch",
    backend: BackendOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Write the features of images.

    Into a store, one safetensors file an image in float16: a rerun computes what is missing. Or into one
    .npz file, which holds, for image i: features_i [C, h, w], image_size_i (H, W) and extent_i, the rows and
    columns of the map that the image covers; and `names`, in order.
    """
    if features_dtype is not None and features_dtype not in STORE_DTYPES:
        raise InputError(
            f"--features-dtype {features_dtype!r} is not {' or '.join(STORE_DTYPES)}", "leave it out"
        )
    if engine not in _ENGINES:
        raise InputError(f"unknown engine {engine!r}", f"choose one of {', '.join(_ENGINES)}")
    if engine == "ray" and state.device is not None:
        raise InputError("--device does not go with --engine ray", "Ray gives each actor its GPU")
    if engine != "ray" and (ray_address is not None or workers is not None):
        raise InputError("--ray-address and --workers require --engine ray", "add --engine ray")
    read = (bundle, *(images or ()), *(inputs or ()))
    if output.suffix == ".npz":
        if engine == "ray":
            raise InputError(f"{output} is one file, and many machines write", "name a directory")
        check_writable(output, json_file, inputs=read)
        paths = _listed(images or (), inputs or ())
        for path in paths:
            if not path.exists():
                raise InputError(f"{path}: no such image")
        _write_npz(bundle, paths, output, features_dtype, prompt, fit, backend, json_file)
        return
    check_outside(output, inputs=read)
    check_writable(json_file, inputs=(output, *read))
    if fit not in FITS:
        raise InputError(f"unknown fit {fit!r}", f"choose one of {', '.join(FITS)}")
    paths = _listed(images or (), inputs or ())
    opened = open_bundle(bundle)
    writer = StoreWriter(output, StoreIdentity.of(opened, fit, prompt, features_dtype or STORE_DTYPES[0]))
    count = len({image_name(path) for path in paths})
    if engine == "ray":
        with ray_cluster(ray_address, state.verbose) as cluster:
            say(f"{bundle} on {cluster.detail}")
            with writer, stages(count) as progress:
                job = ExtractionJob.of(opened, writer, prompt, fit, backend)
                done = cluster.extract(job, paths, workers, progress)
    else:
        with open_model(opened, backend, fit) as model:
            model.feeds(prompt)
            with writer, stages(count) as progress:
                done = extract(model, paths, writer, prompt, progress)
    _report(bundle, output, writer, done, json_file)


def _report(
    bundle: Path, output: Path, writer: StoreWriter, done: Extraction, json_file: Optional[Path]
) -> None:
    entries = writer.entries
    stored = sum(entry["bytes"] for entry in entries.values())
    show(
        f"{output}: {len(entries)} maps of {writer.identity.channels} channels, {writer.identity.dtype},"
        f" {bytes_text(stored)}; {done.computed} computed, {done.kept} kept, {len(done.failed)} failed"
    )
    if done.loss:
        show(f"rounding to {writer.identity.dtype} cost at most {done.loss:.1e} of a map's length")
    if done.failed:
        show("\nfailed")
        for name, reason in done.failed.items():
            show(f"  {reason}" if name in reason else f"  {name}: {reason}")
    write_json(
        json_file,
        {
            "bundle": str(bundle),
            "output": str(output),
            "features_dtype": writer.identity.dtype,
            "maps": len(entries),
            "bytes": stored,
            "computed": done.computed,
            "kept": done.kept,
            "failed": done.failed,
            "loss": done.loss,
        },
        ok=not done.failed,
    )
    if done.failed:
        total = done.computed + done.kept + len(done.failed)
        raise GateFailed(
            f"{len(done.failed)} of {total} images failed; the first is {next(iter(done.failed))}",
            "fix or remove them, and run this again: it computes what is missing",
        )


def _listed(images: Sequence[Path], inputs: Sequence[Path]) -> list[Path]:
    """Paths of images: those given, those in folders, and those that files list; some may be missing.

    Raises:
        InputError: no image exists, a folder has none, or a file is no list.
    """
    paths: list[Path] = []
    for path in images:
        paths += _found(path) if path.is_dir() else [path]
    for path in inputs:
        paths += _found(path) if path.is_dir() else _read_list(path)
    if not paths:
        raise InputError("no images are given", "name some, or a folder, or --input")
    if not any(path.exists() for path in paths):
        raise InputError(f"{paths[0]}: no such image")
    return paths


def _found(folder: Path) -> list[Path]:
    """The images of a folder and of those below; what else is there is named on stderr."""
    paths = find_images(folder)
    if skipped := skipped_files(folder, paths, below=True):
        say(skipped)
    return paths


def _read_list(path: Path) -> list[Path]:
    """Read a file that lists one path a line.

    Raises:
        InputError: the file cannot be read, is itself an image, or lists nothing.
    """
    if path.suffix.lower() in image_suffixes():
        raise InputError(f"--input {path} is an image", "leave --input out")
    try:
        with path.open("rb") as file:  # a pipe of the shell's, too: --input <(find ...)
            content = file.read(_LARGEST_LIST)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror})", "--input takes a folder or a list"
        ) from None
    lines = [line.rstrip(b"\r") for line in content.split(b"\n")]
    listed = [Path(os.fsdecode(line)) for line in lines if line.strip()]
    if b"\0" in content or not listed:
        raise InputError(f"{path} is no list of images", "it needs one path a line")
    return listed


def _write_npz(
    bundle: Path,
    images: Sequence[Path],
    output: Path,
    features_dtype: Optional[str],
    prompt: Optional[str],
    fit: str,
    backend: str,
    json_file: Optional[Path],
) -> None:
    with open_model(open_bundle(bundle), backend, fit) as model:
        maps = model.features_of(images, prompt=prompt)
    arrays: dict[str, np.ndarray] = {"names": np.array([valid_unicode(str(path)) for path in images])}
    rows: list[tuple[str, ...]] = [("image", "pixels", "features", "type")]
    listed = []
    for index, (path, feature_map) in enumerate(zip(images, maps, strict=True)):
        array = _as(feature_map, features_dtype)
        arrays[f"features_{index}"] = array
        arrays[f"image_size_{index}"] = np.array(feature_map.image_size)
        arrays[f"extent_{index}"] = np.array(feature_map.cells)
        height, width = feature_map.image_size
        rows.append((str(path), f"{height}x{width}", "x".join(map(str, array.shape)), str(array.dtype)))
        listed.append({"image": str(path), "image_size": [height, width], "shape": array.shape})
    with replacing(output) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    show(table(rows))
    write_json(json_file, {"bundle": str(bundle), "output": str(output), "images": listed})


def _as(feature_map: FeatureMap, features_dtype: Optional[str]) -> np.ndarray:
    """The map in a type, by default the bundle's own."""
    return feature_map.array if features_dtype is None else narrowed(feature_map.array, features_dtype)
