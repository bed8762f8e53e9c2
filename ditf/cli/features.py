"""`ditf features`: feature maps of images, in one .npz file or in a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Optional

import numpy as np
import typer

from ditf.cli.console import (
    BackendOption,
    BundleArgument,
    FeaturesDtypeOption,
    FitOption,
    JsonOption,
    PromptOption,
    QuietOption,
    VerboseOption,
    bytes_text,
    check_outside,
    check_writable,
    replacing,
    say,
    show,
    stages,
    table,
    write_json,
)
from ditf.runtime import FeatureMap, load
from ditf.runtime.bundle import Bundle
from ditf.runtime.errors import GateFailed, InputError
from ditf.runtime.extraction import Extraction, extract, image_name
from ditf.runtime.images import FITS, find_images
from ditf.runtime.store import DTYPES, StoreIdentity, narrowed
from ditf.runtime.store_writer import StoreWriter


def features(
    bundle: BundleArgument,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE|DIR...", help="Images of any size, or folders of them.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="STORE|NPZ", help="A directory, or a file that ends in .npz."),
    ],
    features_dtype: FeaturesDtypeOption = None,
    prompt: PromptOption = None,
    fit: FitOption = "stretch",
    backend: BackendOption = "auto",
    json_file: JsonOption = None,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the features of images.

    Into a store, one safetensors file an image in float16: a rerun computes what is missing. Or into one
    .npz file, which holds, for image i: features_i [C, h, w], image_size_i (H, W) and extent_i, the rows and
    columns of the map that the image covers; and `names`, in order.
    """
    if features_dtype is not None and features_dtype not in DTYPES:
        raise InputError(f"--features-dtype {features_dtype!r} is not {' or '.join(DTYPES)}", "leave it out")
    if output.suffix == ".npz":
        check_writable(output, json_file, inputs=(bundle, *images))
        _write_npz(bundle, _listed(images), output, features_dtype, prompt, fit, backend, json_file)
        return
    check_outside(output, inputs=(bundle, *images))
    check_writable(json_file, inputs=(bundle, output, *images))
    if fit not in FITS:
        raise InputError(f"unknown fit {fit!r}", f"choose one of {', '.join(FITS)}")
    paths = _listed(images)
    identity = StoreIdentity.of(Bundle.open(bundle), fit, prompt, features_dtype or DTYPES[0])
    writer = StoreWriter(output, identity)
    with load(bundle, backend, fit) as model:
        say(f"{bundle} on {model.detail} ({model.reason})")
        model.feeds(prompt)
        with writer, stages(len({image_name(path) for path in paths})) as progress:
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
            f"{len(done.failed)} of {total} images failed, {next(iter(done.failed))} the first",
            "mend them and run this again: it computes what is missing",
        )


def _listed(images: Sequence[Path]) -> list[Path]:
    """Images, and those in folders.

    Raises:
        InputError: no such image, or a folder without.
    """
    paths: list[Path] = []
    for path in images:
        if path.is_dir():
            paths += find_images(path)
        elif path.exists():
            paths.append(path)
        else:
            raise InputError(f"{path}: no such image")
    return paths


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
    with load(bundle, backend, fit) as model:
        say(f"{bundle} on {model.detail} ({model.reason})")
        maps = model.features_of(images, prompt=prompt)
    arrays: dict[str, np.ndarray] = {"names": np.array([str(path) for path in images])}
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
    """A map in a type; in the bundle's own by default."""
    return feature_map.array if features_dtype is None else narrowed(feature_map.array, features_dtype)
