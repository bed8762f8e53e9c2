"""`ditf track`: follow points or labels of one image through the frames of a video."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Optional

import numpy as np
import typer
from PIL import Image

from ditf.cli.support.bundles import open_bundle, open_model
from ditf.cli.support.options import (
    RUNNING,
    BackendOption,
    BundleArgument,
    FitOption,
    JsonOption,
    PointsOption,
    PromptOption,
    verb,
)
from ditf.cli.support.output import say, show, table, write_json
from ditf.cli.support.paths import check_writable
from ditf.cli.support.progress import stages
from ditf.runtime import Matches, Model, Propagator
from ditf.runtime.errors import InputError
from ditf.runtime.files.writing import replacing
from ditf.runtime.images import list_images, open_image, picture_count, skipped_files
from ditf.runtime.label_images import read_label_image, write_label_image
from ditf.runtime.matching.points import check_points, parse_points


@verb(*RUNNING)
def track(
    bundle: BundleArgument,
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Image that the points or labels belong to.")
    ],
    frames: Annotated[
        list[Path],
        typer.Argument(metavar="FRAME...", help="Frames of a video, as images, or a folder of them."),
    ],
    points: PointsOption = None,
    labels: Annotated[
        Optional[Path],
        typer.Option(
            metavar="PNG",
            help="Follow labels instead: an indexed or grey PNG of the size of SOURCE. Each frame's labels"
            " are written to --output.",
        ),
    ] = None,
    output: Annotated[
        Optional[Path],
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Write pictures of the matches, or the labels, of every frame into this directory.",
        ),
    ] = None,
    prompt: PromptOption = None,
    fit: FitOption = "stretch",
    backend: BackendOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Follow points or labels of SOURCE through FRAMEs."""
    given = [] if labels is None else [labels]
    check_writable(json_file, inputs=(bundle, source, *frames, *given))
    if bool(points) == (labels is not None):
        raise InputError(
            "points and labels exclude each other" if points else "points or labels are needed",
            "give --points x,y or --labels PNG",
        )
    if labels is not None and output is None:
        raise InputError("--labels needs a place for the frames' labels", "give --output DIR")
    image = open_image(source)
    size = (image.height, image.width)
    queries = check_points(parse_points(points or []), size)
    mask = None if labels is None else read_label_image(labels, size)
    frames = _frames(frames)
    if output is not None:
        if output.exists() and not output.is_dir():
            raise InputError(f"{output} is not a directory", "name one, or a new one")
        if not output.exists():
            check_writable(output, inputs=(bundle,))
            output.mkdir()
        written = [output / f"{index:06d}.png" for index in range(len(frames))]
        check_writable(*written, inputs=(bundle, source, *frames, *given))
    document: dict[str, Any] = {"bundle": str(bundle), "source": str(source)}
    with open_model(open_bundle(bundle), backend, fit) as model:
        if mask is not None and output is not None:
            document |= _labels(model, image, mask, frames, output, prompt)
        else:
            document |= _points(model, image, queries, frames, output, prompt)
    say(f"{len(frames) / document['seconds']:.1f} frames a second")
    write_json(json_file, {"backend": model.detail, **document})


def _frames(given: list[Path]) -> list[Path]:
    """Paths of the frames; those of a folder are sorted by name.

    Raises:
        InputError: a file is missing or holds several pictures.
    """
    frames: list[Path] = []
    for path in given:
        if path.is_dir():
            listed = list_images(path)
            if skipped := skipped_files(path, listed):
                say(skipped)
            frames += listed
        elif path.is_file():
            frames.append(path)
        else:
            raise InputError(f"{path}: no such file", "name the frames of a video, as images")
    for frame in frames:
        count = picture_count(frame)
        if count > 1:
            raise InputError(
                f"{frame} holds {count} pictures", "write each to its own file: ffmpeg -i FILE frame-%06d.png"
            )
    return frames


def _points(
    model: Model,
    image: Image.Image,
    queries: np.ndarray,
    frames: list[Path],
    output: Path | None,
    prompt: str | None,
) -> dict[str, Any]:
    """Follow points: print their table, draw them, and return their JSON."""
    found: list[Matches] = []
    with stages(len(frames)) as stage:
        tracker = model.track(image, queries, prompt)
        start = time.perf_counter()
        for frame in frames:
            stage(str(frame))
            found.append(tracker.update(frame))
        seconds = time.perf_counter() - start
    rows: list[tuple[str, ...]] = [("frame", *(f"{x:g},{y:g}" for x, y in queries), "lowest cosine")]
    for frame, matches in zip(frames, found, strict=True):
        places = (f"{u:g},{v:g}" for u, v in matches.points)
        rows.append((str(frame), *places, f"{matches.scores.min():.4f}"))
    show(table(rows))
    if output is not None:
        from ditf.runtime.drawing.matches import draw_matches

        for index, (frame, matches) in enumerate(zip(frames, found, strict=True)):
            with replacing(output / f"{index:06d}.png") as temporary:
                draw_matches(image, open_image(frame), queries, matches).save(temporary)
    return {
        "points": queries.tolist(),
        "frames": [
            {"frame": str(frame), "matches": matches.points.tolist(), "scores": matches.scores.tolist()}
            for frame, matches in zip(frames, found, strict=True)
        ],
        "seconds": seconds,
    }


def _labels(
    model: Model,
    image: Image.Image,
    mask: tuple[np.ndarray, bytes],
    frames: list[Path],
    output: Path,
    prompt: str | None,
) -> dict[str, Any]:
    """Propagate labels through the frames; each frame's labels are written as soon as they are known."""
    labels, palette = mask
    listed: list[dict[str, Any]] = []
    with stages(len(frames)) as stage:
        propagator = Propagator(model.features(image, prompt=prompt), labels)
        values = propagator.labels.tolist()
        lost = sorted(set(np.unique(labels).tolist()) - set(values))
        if lost:
            say(f"labels smaller than a cell are lost: {', '.join(map(str, lost))}")
        rows: list[tuple[str, ...]] = [("frame", *(f"label {value}" for value in values))]
        start = time.perf_counter()
        for index, frame in enumerate(frames):
            stage(str(frame))
            found = propagator.update(model.features(frame, prompt=prompt))
            path = output / f"{index:06d}.png"
            with replacing(path) as temporary:
                write_label_image(temporary, found, palette)
            pixels = np.bincount(found.ravel(), minlength=256)[values]
            rows.append((str(frame), *(f"{count / found.size:.2%}" for count in pixels)))
            counts = {str(value): int(count) for value, count in zip(values, pixels, strict=True)}
            listed.append({"frame": str(frame), "labels": str(path), "pixels": counts})
        seconds = time.perf_counter() - start
    show(table(rows))
    return {"frames": listed, "seconds": seconds}
