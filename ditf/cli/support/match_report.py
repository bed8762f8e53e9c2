"""What `ditf match` prints, draws and writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ditf.cli.support.output import show, table
from ditf.runtime import Homography, Matches
from ditf.runtime.files.writing import replacing
from ditf.runtime.matching.flow import Flow

_ROWS = 40  # matches that are printed at most


@dataclass(frozen=True)
class Answer:
    """The result: `points` [N, 2] in SOURCE, their matches, and None for what was not asked for."""

    points: np.ndarray
    matches: Matches
    homography: Homography | None
    heat: np.ndarray | None  # of the request's first point
    flow: Flow | None
    back: Flow | None


def show_answer(answer: Answer, few: bool) -> None:
    """Print what was found.

    Args:
        few: only the first matches, and how many there are.
    """
    rows: list[tuple[str, ...]] = [("source", "target", "cosine")]
    count = len(answer.points)
    shown = _ROWS if few else count
    found = answer.matches
    for (x, y), (u, v), score in zip(
        answer.points[:shown], found.points[:shown], found.scores[:shown], strict=True
    ):
        rows.append((_place(x, y), _place(u, v), f"{score:.4f}"))
    if count or few:
        show(table(rows))
    if count > shown:
        show(f"... {count} matches in all; --json has them")
    elif few:
        show(f"{count} mutual matches")
    if answer.homography is not None:
        inliers = int(answer.homography.inliers.sum())
        show(f"homography: {inliers} of {count} matches agree, {answer.homography.error_px:.2f} px apart")
        show("\n".join(" ".join(f"{value:12.6g}" for value in row) for row in answer.homography.matrix))
    if answer.flow is not None:
        flow = _flow_summary(answer.flow)
        show(
            f"flow: {flow['median_px']:.1f} px in the median, {flow['max_px']:.1f} px at the most,"
            f" cosine {flow['median_confidence']:.4f} in the median"
        )


def _place(x: float, y: float) -> str:
    """Format a position to a hundredth of a pixel."""
    return f"{round(float(x), 2):g},{round(float(y), 2):g}"


def optional_document(answer: Answer, homography: str | None) -> dict[str, Any]:
    """The parts of the --json that depend on options."""
    more: dict[str, Any] = {}
    if answer.homography is not None:
        more["homography"] = {
            "method": homography,
            "matrix": answer.homography.matrix.tolist(),
            "inliers": answer.homography.inliers.tolist(),
            "error_px": answer.homography.error_px,
        }
    if answer.flow is not None:
        more["flow"] = _flow_summary(answer.flow)
    if answer.heat is not None:
        more["heat_map"] = {"min": float(answer.heat.min()), "max": float(answer.heat.max())}
    return more


def _flow_summary(flow: Flow) -> dict[str, float]:
    """Median and maximum length of a flow in pixels, and its median confidence."""
    length = np.linalg.norm(flow.field, axis=2)
    return {
        "median_px": float(np.median(length)),
        "max_px": float(length.max()),
        "median_confidence": float(np.median(flow.confidence)),
    }


def draw_pictures(
    left: Image.Image,
    right: Image.Image,
    first: np.ndarray | None,
    answer: Answer,
    output: Path | None,
    heat_map: Path | None,
    draw_flow: Path | None,
) -> None:
    """Write the pictures that were asked for."""
    from ditf.runtime.drawing import flow as flow_picture
    from ditf.runtime.drawing.heat_map import draw_heat_map
    from ditf.runtime.drawing.matches import draw_matches

    pictures: list[tuple[Path, Image.Image]] = []
    if output is not None:
        pictures.append((output, draw_matches(left, right, answer.points, answer.matches)))
    if heat_map is not None and first is not None and answer.heat is not None:
        picture = draw_heat_map(left, right, first, answer.heat)
        pictures.append((heat_map, picture))
    if draw_flow is not None and answer.flow is not None and answer.back is not None:
        picture = flow_picture.draw_flow(left, right, answer.flow.field, answer.back.field)
        pictures.append((draw_flow, picture))
    for path, picture in pictures:
        with replacing(path) as temporary:
            picture.save(temporary)
