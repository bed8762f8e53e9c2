"""`ditf match`: where points of one image are in another."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Optional

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
    parse_points,
    replacing,
    say,
    show,
    table,
    write_json,
)
from ditf.runtime import load
from ditf.runtime.errors import InputError
from ditf.runtime.images import SUFFIXES, open_image
from ditf.runtime.matching import check_points


def match(
    bundle: BundleArgument,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Image the points are in.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Image to find them in.")],
    more_points: Annotated[
        Optional[list[str]], typer.Argument(metavar="[X,Y]...", help="More points.")
    ] = None,
    points: Annotated[
        Optional[list[str]],
        typer.Option("--points", metavar="X,Y", help="Points in source pixels: x,y, once or several times."),
    ] = None,
    grid: Annotated[
        Optional[int], typer.Option(metavar="N", min=1, max=1000, help="An N x N grid of points instead.")
    ] = None,
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", metavar="PNG", help="Draw both images and the matches."),
    ] = None,
    prompt: PromptOption = None,
    fit: FitOption = "stretch",
    backend: BackendOption = "auto",
    json_file: JsonOption = None,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Match points of SOURCE to TARGET at full resolution."""
    check_writable(output, json_file, inputs=(bundle, source, target))
    _check_picture(output)
    given = parse_points([*(points or []), *(more_points or [])])
    if bool(given) == (grid is not None):
        raise InputError("points are needed" if not given else "points and a grid exclude each other",
                         "give --points x,y or --grid N")  # fmt: skip
    left, right = open_image(source), open_image(target)
    queries = check_points(given or _grid(left.size, grid or 0), (left.height, left.width))
    with load(bundle, backend, fit) as model:
        say(f"{bundle} on {model.detail} ({model.reason})")
        start = time.perf_counter()
        source_map, target_map = (model.features(image, prompt=prompt) for image in (left, right))
        extracted = time.perf_counter()
        found = model.match(source_map, target_map, queries)
        matched = time.perf_counter()
    seconds = {"features": extracted - start, "match": matched - extracted}
    rows: list[tuple[str, ...]] = [("source", "target", "cosine")]
    for (x, y), (u, v), score in zip(queries, found.points, found.scores, strict=True):
        rows.append((f"{x:g},{y:g}", f"{u:g},{v:g}", f"{score:.4f}"))
    show(table(rows))
    say(
        f"features of both images {seconds['features'] * 1e3:.0f} ms,"
        f" matching {seconds['match'] * 1e3:.1f} ms (one run, the first)"
    )
    if output is not None:
        from ditf.runtime.drawing import draw_matches

        picture = draw_matches(left, right, queries, found)
        with replacing(output) as temporary:
            picture.save(temporary)
    write_json(
        json_file,
        {
            "bundle": str(bundle),
            "backend": model.detail,
            "source": str(source),
            "target": str(target),
            "points": queries.tolist(),
            "matches": found.points.tolist(),
            "scores": found.scores.tolist(),
            "seconds": seconds,
        },
    )


def _check_picture(path: Path | None) -> None:
    """Reject a file name that no common picture format has."""
    if path is not None and path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path} does not name a picture format", "for example match.png")


def _grid(size: tuple[int, int], count: int) -> list[tuple[float, float]]:
    """Centres of count x count equal cells of an image of (width, height), whole pixels."""
    xs, ys = (np.floor((np.arange(count) + 0.5) * length / count) for length in size)
    return [(float(x), float(y)) for y in ys for x in xs]
