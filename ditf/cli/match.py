"""`ditf match`: find points of one image, or all of it, in another."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import numpy as np
import typer

from ditf.cli.support.bundles import open_bundle, open_model
from ditf.cli.support.match_report import Answer, draw_pictures, optional_document, show_answer
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
from ditf.cli.support.output import say, write_json
from ditf.cli.support.paths import check_writable
from ditf.runtime import FeatureMap, Matches, Model
from ditf.runtime.errors import InputError
from ditf.runtime.files.writing import replacing
from ditf.runtime.images import open_image
from ditf.runtime.matching.homography import HOMOGRAPHY_METHODS, cell_threshold, find_homography, opencv
from ditf.runtime.matching.mutual import check_options, mutual_points
from ditf.runtime.matching.points import check_points, parse_points
from ditf.runtime.matching.soft_argmax import check_method

_DRAWINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})


@dataclass(frozen=True)
class _Request:
    """The options of one match; `queries` is None for dense matches, and empty for no points."""

    queries: np.ndarray | None
    method: str | None
    mutual: bool
    max_matches: int | None
    ratio: float | None
    homography: str | None
    heat_map: bool
    flow: bool
    flow_back: bool


@verb(*RUNNING)
def match(
    bundle: BundleArgument,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Image that the points are in.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Image in which to find them.")],
    more_points: Annotated[
        Optional[list[str]], typer.Argument(metavar="[X,Y]...", help="More points.")
    ] = None,
    points: PointsOption = None,
    grid: Annotated[
        Optional[int],
        typer.Option(metavar="N", min=1, max=1000, help="Match an N x N grid of points instead."),
    ] = None,
    method: Annotated[
        Optional[str],
        typer.Option(
            metavar="argmax|window|kernel",
            help="Take the pixel of the highest cosine, or a sub-pixel place: window or kernel soft-argmax."
            " By default argmax; with --mutual of all cells their centres, or window with --homography.",
        ),
    ] = None,
    mutual: Annotated[
        bool,
        typer.Option(
            "--mutual",
            help="Keep matches that hold in both directions: of all cells, or of the points that return"
            " to within a cell.",
        ),
    ] = False,
    max_matches: Annotated[
        Optional[int],
        typer.Option(metavar="N", help="With --mutual: keep the N matches of the highest cosine."),
    ] = None,
    ratio: Annotated[
        Optional[float],
        typer.Option(metavar="R", help="With --mutual of all cells: Lowe's ratio test, for example 0.95."),
    ] = None,
    homography: Annotated[
        Optional[str],
        typer.Option(
            metavar="usac|ransac|lmeds", help="Find the homography that most of the matches agree with."
        ),
    ] = None,
    flow: Annotated[
        Optional[Path],
        typer.Option(
            metavar="NPZ", help="Write where every source pixel is in TARGET: field and confidence."
        ),
    ] = None,
    draw_flow: Annotated[
        Optional[Path],
        typer.Option(metavar="PNG", help="Draw the flow, and the source warped over the target."),
    ] = None,
    heat_map: Annotated[
        Optional[Path],
        typer.Option(metavar="PNG", help="Draw the cosine between the first point and every target pixel."),
    ] = None,
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", metavar="PNG", help="Draw both images and the matches."),
    ] = None,
    prompt: PromptOption = None,
    fit: FitOption = "stretch",
    backend: BackendOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Match points of SOURCE to TARGET at full resolution."""
    check_writable(output, flow, draw_flow, heat_map, json_file, inputs=(bundle, source, target))
    for picture in (output, draw_flow, heat_map):
        _check_picture(picture)
    if flow is not None and flow.suffix.lower() != ".npz":
        raise InputError(f"{flow} is no .npz file", "for example --flow flow.npz")
    given = parse_points([*(points or []), *(more_points or [])])
    dense = mutual and not given and grid is None
    some = bool(given) or grid is not None or mutual
    _check_choice(bool(given), grid is not None, some or bool(flow or draw_flow))
    _check_needs(
        {
            "--max-matches": (max_matches is not None, mutual, "--mutual"),
            "--ratio": (ratio is not None, dense, "--mutual and no points"),
            "--homography": (homography is not None, some, "matches: --mutual, --grid or --points"),
            "--output": (output is not None, some, "matches: --mutual, --grid or --points"),
            "--heat-map": (heat_map is not None, bool(given), "a point: --points x,y"),
        }
    )
    if method is not None:
        check_method(method)
    check_options(max_matches=max_matches, ratio=ratio)
    if homography is not None:
        if homography not in HOMOGRAPHY_METHODS:
            raise InputError(
                f"unknown method {homography!r}", f"choose one of {', '.join(HOMOGRAPHY_METHODS)}"
            )
        opencv()
    left, right = open_image(source), open_image(target)
    queries = check_points(given or _grid(left.size, grid or 0), (left.height, left.width))
    request = _Request(
        queries=None if dense else queries,
        method=method or ("window" if dense and homography else None),
        mutual=mutual,
        max_matches=max_matches,
        ratio=ratio,
        homography=homography,
        heat_map=heat_map is not None,
        flow=bool(flow or draw_flow),
        flow_back=draw_flow is not None,
    )
    with open_model(open_bundle(bundle), backend, fit) as model:
        start = time.perf_counter()
        source_map, target_map = (model.features(image, prompt=prompt) for image in (left, right))
        extracted = time.perf_counter()
        answer = _answer(model, source_map, target_map, request)
        matched = time.perf_counter()
    seconds = {"features": extracted - start, "match": matched - extracted}
    show_answer(answer, few=request.mutual or request.queries is None)
    say(
        f"features of both images {seconds['features'] * 1e3:.0f} ms,"
        f" matching {seconds['match'] * 1e3:.1f} ms (one run, the first)"
    )
    if flow is not None and answer.flow is not None:
        with replacing(flow) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, field=answer.flow.field, confidence=answer.flow.confidence)
    draw_pictures(left, right, queries[0] if given else None, answer, output, heat_map, draw_flow)
    write_json(
        json_file,
        {
            "bundle": str(bundle),
            "backend": model.detail,
            "source": str(source),
            "target": str(target),
            "method": request.method or ("cells" if dense else "argmax"),
            "mutual": mutual,
            "points": answer.points.tolist(),
            "matches": answer.matches.points.tolist(),
            "scores": answer.matches.scores.tolist(),
            **optional_document(answer, homography),
            "seconds": seconds,
        },
    )


def _answer(model: Model, source: FeatureMap, target: FeatureMap, request: _Request) -> Answer:
    """Compute what the request asks for."""
    method = request.method or "argmax"
    if request.queries is None or request.mutual:
        both = (
            model.mutual(source, target, request.max_matches, request.ratio, refine=request.method)
            if request.queries is None
            else mutual_points(
                source, target, request.queries, method=method, max_matches=request.max_matches
            )
        )
        points, matches = both.source_points, Matches(both.points, both.scores)
    else:
        points, matches = request.queries, model.match(source, target, request.queries, method)
    return Answer(
        points,
        matches,
        find_homography(points, matches.points, cell_threshold(target), request.homography)
        if request.homography
        else None,
        model.heat_map(source, target, request.queries[0])
        if request.heat_map and request.queries is not None
        else None,
        model.flow(source, target, method) if request.flow else None,
        model.flow(target, source, method) if request.flow_back else None,
    )


def _check_choice(points: bool, grid: bool, anything: bool) -> None:
    """Require points, a grid, or an option that needs neither."""
    if points and grid:
        raise InputError("points and a grid exclude each other", "give --points x,y or --grid N")
    if not anything:
        raise InputError("points are needed", "give --points x,y, --grid N, --mutual or --flow FILE")


def _check_needs(options: dict[str, tuple[bool, bool, str]]) -> None:
    """Reject options without effect: {option: (given, has an effect, what it needs)}."""
    for option, (given, useful, needs) in options.items():
        if given and not useful:
            raise InputError(f"{option} needs {needs}", "or leave it out")


def _check_picture(path: Path | None) -> None:
    """Reject a file name without a picture format's suffix."""
    if path is not None and path.suffix.lower() not in _DRAWINGS:
        raise InputError(f"{path} does not name a picture format", "for example match.png")


def _grid(size: tuple[int, int], count: int) -> list[tuple[float, float]]:
    """Centres of count x count equal cells of an image of (width, height), whole pixels."""
    xs, ys = (np.floor((np.arange(count) + 0.5) * length / count) for length in size)
    return [(float(x), float(y)) for y in ys for x in xs]
