"""`ditf features`: feature maps of images, in one .npz file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ditf.cli.console import (
    BackendOption,
    BundleArgument,
    FitOption,
    JsonOption,
    PromptOption,
    QuietOption,
    VerboseOption,
    check_writable,
    replacing,
    say,
    show,
    table,
    write_json,
)
from ditf.runtime import load


def features(
    bundle: BundleArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Images of any size.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="NPZ", help="Where the maps are written.")
    ],
    prompt: PromptOption = None,
    fit: FitOption = "stretch",
    backend: BackendOption = "auto",
    json_file: JsonOption = None,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the features of IMAGEs.

    The file holds, for image i: features_i [C, h, w], image_size_i (H, W) and extent_i, the rows and
    columns of the map that the image covers; and `names`, in order.
    """
    check_writable(output, json_file, inputs=(bundle, *images))
    with load(bundle, backend, fit) as model:
        say(f"{bundle} on {model.detail} ({model.reason})")
        maps = model.features_of(images, prompt=prompt)
    arrays: dict[str, np.ndarray] = {"names": np.array([str(path) for path in images])}
    for index, feature_map in enumerate(maps):
        arrays[f"features_{index}"] = feature_map.array
        arrays[f"image_size_{index}"] = np.array(feature_map.image_size)
        arrays[f"extent_{index}"] = np.array(feature_map.cells)
    with replacing(output) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    rows: list[tuple[str, ...]] = [("image", "pixels", "features", "type")]
    listed = []
    for path, feature_map in zip(images, maps, strict=True):
        height, width = feature_map.image_size
        shape = "x".join(map(str, feature_map.array.shape))
        rows.append((str(path), f"{height}x{width}", shape, str(feature_map.array.dtype)))
        listed.append({"image": str(path), "image_size": [height, width], "shape": feature_map.array.shape})
    show(table(rows))
    write_json(json_file, {"bundle": str(bundle), "output": str(output), "images": listed})
