"""How well the demo model matches animals it has not seen, and what each part of the recipe is worth.

PCK@0.1 on the creatures and the stereo benchmark, and stereo's end-point error: of bundles exported with and
without AdaLN and the discard, in every precision, at other layers and timesteps; beside them what it takes
to beat: raw RGB patches, the same model before training, and points that do not move. Layer and timestep of
the demo were chosen on other pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from harness import Bench, Rows, say, workplace
from PIL import Image
from train_demo import new_model
from train_demo_data import PATCH, SIZE

import ditf
from ditf.calib.eval.benchmarks import BENCHMARKS
from ditf.calib.eval.correspondence import PairMatcher, evaluate_pairs, matcher
from ditf.calib.eval.creature_pairs import CreaturePairs
from ditf.calib.eval.datasets.base import Pair
from ditf.calib.eval.outcomes import totals
from ditf.export.checkpoints.loading import quieten_libraries
from ditf.export.exporter import export_bundle
from ditf.export.families.demo import DEMO_DEFAULTS
from ditf.export.planning.export_options import ExportOptions
from ditf.runtime import FeatureMap
from ditf.runtime.matching.points import match_points

LAYERS = (3, 5, 7, 8, 9, 10, 11)
TIMESTEPS = (20, 50, 100, 150, 300, 500)
RECIPE: dict[str, dict[str, Any]] = {
    "hidden states as they are": {"adaln": False, "discard": "none"},
    "+ AdaLN": {"discard": "none"},
    "+ discard: DiTF's feature": {},
    "the same, float16": {"precision": "float16"},
    "the same, int8": {"precision": "int8"},
    "the same, float16, 64 channels": {"precision": "float16", "pca": 64},
}


def main() -> None:
    """Measure, print and write all tables."""
    bench = Bench(__doc__, torch.get_num_threads())
    bench.parser.add_argument("--pairs", type=int, default=200, help="in species, and as many across")
    arguments = bench.parse(pairs=2)
    quieten_libraries()
    drawn = CreaturePairs(arguments.pairs)[:]
    groups = {"in species": drawn[: arguments.pairs], "across species": drawn[arguments.pairs :]}
    photographs = BENCHMARKS["stereo"].read(Path(), "test").items

    def scores(match: PairMatcher) -> dict[str, float]:
        criteria = BENCHMARKS["creatures"].criteria
        found = {
            name: totals(evaluate_pairs(one, match, criteria))["pck"]["0.1"] for name, one in groups.items()
        }
        seen = totals(evaluate_pairs(photographs, match, BENCHMARKS["stereo"].criteria))
        return {**found, "stereo": seen["pck"]["0.1"], "stereo, px": seen["epe"][""]}

    def bundle_scores(**options: Any) -> dict[str, float]:
        say(str(options))
        with workplace() as folder:
            bundle = export_bundle(ExportOptions(output=folder / "bundle", **options))
            with ditf.load(bundle, "onnxruntime") as model:
                return scores(matcher(model))

    with workplace() as folder:
        write_untrained(folder)
        recipe = {
            "points that do not move": scores(lambda pair: pair.points),
            "raw RGB patches": scores(by_map(rgb_patches)),
            "the same model before training": bundle_scores(
                model=str(folder), layer=str(DEMO_DEFAULTS.layer), timestep=(DEMO_DEFAULTS.timestep,)
            ),
        }
    last = 1 if bench.smoke else None
    recipe |= {name: bundle_scores(**options) for name, options in list(RECIPE.items())[:last]}
    layers = {str(layer): bundle_scores(layer=str(layer)) for layer in LAYERS[:last]}
    timesteps = {str(timestep): bundle_scores(timestep=(timestep,)) for timestep in TIMESTEPS[:last]}
    result = {"pairs": arguments.pairs, "recipe": recipe, "layers": layers, "timesteps": timesteps}
    tables = {
        ("demo.md", mark): score_rows(mark, scored)
        for mark, scored in (("PCK@0.1", recipe), ("layer", layers), ("timestep", timesteps))
    }
    bench.start()
    bench.write("demo", result, score_rows("PCK@0.1", recipe), tables)


def score_rows(head: str, rows: dict[str, dict[str, float]]) -> Rows:
    """Make a table of scores."""
    return [
        (head, *next(iter(rows.values()))),
        *((name, *(text(key, value) for key, value in row.items())) for name, row in rows.items()),
    ]


def text(key: str, value: float) -> str:
    """Format a score."""
    return f"{value:.1f} px" if key.endswith("px") else f"{value:.1%}"


def write_untrained(folder: Path) -> None:
    """Write the demo's checkpoint as training starts from it."""
    torch.manual_seed(0)
    new_model().save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")


def rgb_patches(image: np.ndarray) -> np.ndarray:
    """The pixels of each token, which the model is given: [PATCH * PATCH * 3, h, w]."""
    small = Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels = np.asarray(small, np.float32) / 127.5 - 1
    cells = SIZE // PATCH
    cut = pixels.reshape(cells, PATCH, cells, PATCH, 3)
    return cut.transpose(1, 3, 4, 0, 2).reshape(-1, cells, cells)


def by_map(features: Callable[[np.ndarray], np.ndarray]) -> PairMatcher:
    """Match with features that no bundle computes."""

    def match(pair: Pair) -> np.ndarray:
        source, target = (FeatureMap(features(image), image.shape[:2]) for image in pair.images)
        return match_points(source, target, pair.queries(source.image_size)).points

    return match


if __name__ == "__main__":
    main()
