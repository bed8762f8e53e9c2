"""The main job on the built-in model, as `make demo` runs it: export, check, match, measure accuracy.

Two pairs: drawn animals that the model was not trained on, whose keypoints are known, and scikit-image's
stereo motorcycle (Middlebury 2014), whose disparity is known: a point at x in the left photograph is at
x - disparity in the right one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from ditf.calib.eval.creature_pairs import CreaturePairs

OUTPUT = Path("demo-output")
BUNDLE = Path("bundles/demo-l9-fp16")
GRID = 12
SHOWN = 5  # of GRID columns and rows, in the picture
CREATURE = 7  # which pair of the benchmark: two pigs


def main() -> None:
    """Run the commands a user would type, then print what they gave."""
    OUTPUT.mkdir(exist_ok=True)
    animals, points = write_creatures()
    photographs, disparity = write_photographs()
    seconds = {
        "export": run("ditf-export", "--layer", "9", "--fp16"),
        "check": run("ditf", "check", BUNDLE, "--json", OUTPUT / "check.json"),
    }
    run("ditf", "match", BUNDLE, *animals, *points, "--output", OUTPUT / "creatures.png")
    run("ditf", "match", BUNDLE, *photographs, "--grid", SHOWN, "--output", OUTPUT / "photographs.png")
    grid = ("--grid", GRID, "--json", OUTPUT / "match.json")
    run("ditf", "match", BUNDLE, *photographs, *grid, show=False)
    run("ditf", "eval", "creatures", BUNDLE, "--pairs", 40, "--json", OUTPUT / "eval.json")
    print(report(seconds, disparity))


def write_creatures() -> tuple[tuple[Path, Path], list[str]]:
    """Two held-out animals of one species as PNG, and the first one's keypoints as "x,y"."""
    drawn = CreaturePairs()[CREATURE]
    paths = (OUTPUT / "creature-source.png", OUTPUT / "creature-target.png")
    for path, image in zip(paths, drawn.images, strict=True):
        Image.fromarray(image).save(path)
    return paths, [f"{x:.0f},{y:.0f}" for x, y in drawn.points]


def write_photographs() -> tuple[tuple[Path, Path], np.ndarray]:
    """Both photographs as PNG, and the left one's disparity in pixels (infinite where unknown)."""
    left, right, disparity = skimage.data.stereo_motorcycle()
    paths = (OUTPUT / "left.png", OUTPUT / "right.png")
    for path, array in zip(paths, (left, right), strict=True):
        Image.fromarray(array).save(path)
    return paths, disparity


def run(program: str, *arguments: object, show: bool = True) -> float:
    """Run an installed command; returns its seconds. Ends this script if it fails."""
    print("\n$", program, *arguments, flush=True)
    command = [str(Path(sys.executable).with_name(program)), *map(str, arguments)]
    start = time.perf_counter()
    code = subprocess.run(command, stdout=None if show else subprocess.DEVNULL).returncode
    if code:
        sys.exit(code)
    return time.perf_counter() - start


def errors_to_truth(points: np.ndarray, matches: np.ndarray, disparity: np.ndarray) -> np.ndarray:
    """Distances in pixels between matches and the truth, for points whose truth is in view."""
    x, y = points[:, 0].astype(int), points[:, 1].astype(int)
    truth = np.stack([x - disparity[y, x], y], axis=1)
    known = np.isfinite(truth).all(axis=1) & (truth[:, 0] >= 0)
    return np.linalg.norm(matches - truth, axis=1)[known]


def truth_text(errors: np.ndarray) -> str:
    """Format distances to the truth in one line."""
    within = ", ".join(f"{(errors < limit).mean():.0%} within {limit} px" for limit in (5, 16))
    return f"median {np.median(errors):.1f} px, {within}; {len(errors)} points of known truth"


def report(seconds: dict[str, float], disparity: np.ndarray) -> str:
    """Make the closing table."""
    manifest = json.loads((BUNDLE / "manifest.json").read_text())
    check = json.loads((OUTPUT / "check.json").read_text())
    match = json.loads((OUTPUT / "match.json").read_text())
    points = np.array(match["points"])
    accuracy = json.loads((OUTPUT / "eval.json").read_text())
    distance = {
        name: truth_text(errors_to_truth(points, np.array(matches), disparity))
        for name, matches in (("", match["matches"]), (" unmoved", points))
    }
    bundle_bytes = sum(file["bytes"] for file in manifest["files"].values())
    rows = {
        "layer": manifest["layer_name"],
        "size": f"{manifest['size']} px -> {manifest['channels']} x {manifest['grid']} features",
        "bundle": f"{bundle_bytes / 1e6:.1f} MB, {manifest['precision']}",
        "discarded channels": manifest["discard"]["channels"],
        "parity with PyTorch": f"cosine mean {check['metrics']['cosine_mean']:.7f},"
        f" min {check['metrics']['cosine_min']:.7f};"
        f" {check['metrics']['matches_same']:.0%} of matches the same",
        "export, check": f"{seconds['export']:.1f} s, {seconds['check']:.1f} s (process start included)",
        "features, match": f"{match['seconds']['features'] / 2 * 1e3:.0f} ms an image,"
        f" {match['seconds']['match'] / len(points) * 1e3:.2f} ms a point, one first run"
        f" ({match['backend']})",
        "PCK@0.1, unseen creatures": f"{accuracy['pck']['0.1']:.0%} in species,"
        f" {accuracy['groups']['across species']['pck']['0.1']:.0%} across",
        **{f"motorcycle{name}": text for name, text in distance.items()},
        "pictures": f"{OUTPUT / 'creatures.png'}, {OUTPUT / 'photographs.png'}",
    }
    width = max(map(len, rows))
    lines = [f"{name:{width}}  {value}" for name, value in rows.items()]
    note = "The demo model was trained on drawn animals alone: export/demo_model/README.md."
    return "\n" + "\n".join([*lines, note])


if __name__ == "__main__":
    main()
