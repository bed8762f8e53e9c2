"""The main job on the built-in model, as `make demo` runs it: export, check, match two photographs.

The pair is scikit-image's stereo motorcycle (Middlebury 2014), whose disparity is known: a point at x
in the left photograph is at x - disparity in the right one.
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

OUTPUT = Path("demo-output")
BUNDLE = Path("bundles/demo-l9-fp16")
KEPT = Path("bundles/demo-l9-fp16-undiscarded")
GRID = 12
SHOWN = 5  # of GRID columns and rows, in the picture


def main() -> None:
    """Run the commands a user would type, then print what they gave."""
    OUTPUT.mkdir(exist_ok=True)
    left, right, disparity = write_photographs()
    seconds = {
        "export": run("ditf-export", "--layer", "9", "--fp16"),
        "check": run("ditf", "check", BUNDLE, "--json", OUTPUT / "check.json"),
    }
    pair = (left, right)
    run("ditf", "match", BUNDLE, *pair, "--grid", SHOWN, "--output", OUTPUT / "match.png")
    run("ditf", "match", BUNDLE, *pair, "--grid", GRID, "--json", OUTPUT / "match.json", show=False)
    run("ditf-export", "--layer", "9", "--fp16", "--discard", "none", "--output", KEPT, show=False)
    run("ditf", "match", KEPT, *pair, "--grid", GRID, "--json", OUTPUT / "kept.json", show=False)
    print(report(seconds, disparity))


def write_photographs() -> tuple[Path, Path, np.ndarray]:
    """Both photographs as PNG, and the left one's disparity in pixels (infinite where unknown)."""
    left, right, disparity = skimage.data.stereo_motorcycle()
    paths = (OUTPUT / "left.png", OUTPUT / "right.png")
    for path, array in zip(paths, (left, right), strict=True):
        Image.fromarray(array).save(path)
    return (*paths, disparity)


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
    """Distances in pixels of matches from the truth, of the points that have one in view."""
    x, y = points[:, 0].astype(int), points[:, 1].astype(int)
    truth = np.stack([x - disparity[y, x], y], axis=1)
    known = np.isfinite(truth).all(axis=1) & (truth[:, 0] >= 0)
    return np.linalg.norm(matches - truth, axis=1)[known]


def truth_text(errors: np.ndarray) -> str:
    """Distances to the truth in one line."""
    within = ", ".join(f"{(errors < limit).mean():.0%} within {limit} px" for limit in (5, 16))
    return f"median {np.median(errors):.1f} px, {within}; {len(errors)} points of known truth"


def report(seconds: dict[str, float], disparity: np.ndarray) -> str:
    """The closing table."""
    manifest = json.loads((BUNDLE / "manifest.json").read_text())
    check = json.loads((OUTPUT / "check.json").read_text())
    match = json.loads((OUTPUT / "match.json").read_text())
    kept = json.loads((OUTPUT / "kept.json").read_text())
    points = np.array(match["points"])
    distance = {
        name: truth_text(errors_to_truth(points, np.array(matches), disparity))
        for name, matches in (("", match["matches"]), (" undiscarded", kept["matches"]), (" unmoved", points))
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
        **{f"to the truth{name}": text for name, text in distance.items()},
        "picture": OUTPUT / "match.png",
    }
    width = max(map(len, rows))
    lines = [f"{name:{width}}  {value}" for name, value in rows.items()]
    note = "The demo model is untrained: it shows the toolchain, not what trained features can do."
    return "\n" + "\n".join([*lines, note])


if __name__ == "__main__":
    main()
