"""`ditf track`: where points of one image are in every frame of a video."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Optional

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
    parse_points,
    replacing,
    say,
    show,
    stages,
    table,
    write_json,
)
from ditf.runtime import Matches, load
from ditf.runtime.errors import InputError
from ditf.runtime.images import open_image
from ditf.runtime.matching import check_points


def track(
    bundle: BundleArgument,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Image the points are in.")],
    frames: Annotated[list[Path], typer.Argument(metavar="FRAME...", help="Frames of a video, as images.")],
    points: Annotated[
        list[str],
        typer.Option("--points", metavar="X,Y", help="Points in source pixels: x,y, once or several times."),
    ],
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", metavar="DIR", help="Draw every frame's matches in this directory."),
    ] = None,
    prompt: PromptOption = None,
    fit: FitOption = "stretch",
    backend: BackendOption = "auto",
    json_file: JsonOption = None,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Follow points of SOURCE through FRAMEs; the source's features are computed once."""
    check_writable(json_file, inputs=(bundle, source, *frames))
    image = open_image(source)
    queries = check_points(parse_points(points), (image.height, image.width))
    missing = next((frame for frame in frames if not frame.is_file()), None)
    if missing is not None:
        raise InputError(f"{missing}: no such file", "name the frames of a video, as images")
    if output is not None:
        if output.exists() and not output.is_dir():
            raise InputError(f"{output} is not a directory", "name one, or a new one")
        if not output.exists():
            check_writable(output, inputs=(bundle,))
            output.mkdir()
        check_writable(output / "000000.png", inputs=(bundle,))
    found: list[Matches] = []
    with load(bundle, backend, fit) as model, stages(len(frames)) as stage:
        say(f"{bundle} on {model.detail} ({model.reason})")
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
    say(f"{len(frames) / seconds:.1f} frames a second")
    if output is not None:
        from ditf.runtime.drawing import draw_matches

        for index, (frame, matches) in enumerate(zip(frames, found, strict=True)):
            with replacing(output / f"{index:06d}.png") as temporary:
                draw_matches(image, open_image(frame), queries, matches).save(temporary)
    write_json(
        json_file,
        {
            "bundle": str(bundle),
            "backend": model.detail,
            "source": str(source),
            "points": queries.tolist(),
            "frames": [
                {"frame": str(frame), "matches": matches.points.tolist(), "scores": matches.scores.tolist()}
                for frame, matches in zip(frames, found, strict=True)
            ],
            "seconds": seconds,
        },
    )
