"""What --pca saves and costs: bytes and time of matching, matches kept, and how the basis should be chosen.

Photographs: scikit-image's stereo motorcycle, whose disparity is known, and astronaut, chelsea and coffee
against turned and enlarged copies of themselves. The projections are learned at export from the built-in
pictures, never from the photographs.

1. The demo bundle at several --pca, and bases made otherwise, applied outside the graph.
2. A DiT of the real diffusers class with random weights, of width 1152, cut at layer 4.
3. Matching and storing maps of 3072 channels (FLUX's width) against 256. The maps are those of 2, embedded by
   a random isometry, which leaves every cosine as it was. One thread, processor time, sides in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from bench_int8 import write_checkpoint
from demo import errors_to_truth
from harness import (
    Bench,
    Rows,
    interleave,
    paired_ratio,
    say,
    summary,
    workplace,
)
from PIL import Image

import ditf
from ditf.calib.images import procedural_images
from ditf.calib.parity import match_parity
from ditf.calib.projection import SecondMoment, project_features
from ditf.cli.support.output import bytes_text
from ditf.export.checkpoints.loading import quieten_libraries
from ditf.export.exporter import export_bundle
from ditf.export.planning.export_options import ExportOptions
from ditf.runtime import FeatureMap
from ditf.runtime.matching.points import match_points
from ditf.runtime.store.feature_store import FeatureStore, StoreIdentity
from ditf.runtime.store.writer import StoreWriter

THREADS = 1
DEMO = (16, 32, 64)
WIDE = (64,)
HEADS = 16  # of 72 channels
LARGE, SMALL = 3072, 256
GRID = 16  # of points, in columns and rows
POINTS = 100
SIZE = (480, 640)  # of the images in the timing, px

Pair = tuple[np.ndarray, np.ndarray, np.ndarray]  # source, target, points [N, 2]
Maps = list[tuple[FeatureMap, FeatureMap]]


def main() -> None:
    """Measure all three parts, and write the result."""
    bench = Bench(__doc__, THREADS, repeats=7)
    bench.parser.add_argument("--bundles", type=Path, help="exports are kept and found there")
    arguments = bench.parse()
    quieten_libraries()
    bench.start()
    torch.set_num_threads(THREADS)
    pairs = photographs()
    layer = 1 if bench.smoke else 4  # of the wide model
    with workplace() as temporary:
        folder = arguments.bundles or temporary
        say("the demo bundle")
        counts = DEMO[-1:] if bench.smoke else DEMO
        demo = projected_bundles(folder, {"layer": "9", "precision": "float16"}, counts, pairs)
        say("bases made otherwise")
        bases = other_bases(folder / "all", pairs)
        say("width 1152")
        if not (folder / "wide").is_dir():
            write_checkpoint(folder / "wide", 1 if bench.smoke else HEADS, planted=False, layer=layer)
        same = {
            "model": str(folder / "wide"),
            "layer": str(layer),
            "precision": "float16",
            "class_label": ("0",),
        }
        wide = projected_bundles(folder / "wide-bundles", same, WIDE, pairs)
        say("matching")
        matching = match_times(temporary, folder / "wide-bundles" / "all", pairs, arguments.repeats)
    result = {"demo": demo, "bases": bases, "wide": wide, "matching": matching}
    tables = {
        ("features.md", "pca"): agreement_rows(demo, wide),
        ("features.md", "pca-bases"): basis_rows(bases),
        ("features.md", "pca-matching"): matching_rows(matching),
    }
    bench.write("pca", result, agreement_rows(demo, wide), tables)


def photographs() -> dict[str, Pair]:
    """Pairs of photographs by name, with a grid of points in the source."""
    left, right, _ = skimage.data.stereo_motorcycle()
    pairs = {"motorcycle": (left, right)}
    for name in ("astronaut", "chelsea", "coffee"):
        image = getattr(skimage.data, name)()
        pairs[name] = (image, moved(image))
    return {name: (*pair, grid(pair[0])) for name, pair in pairs.items()}


def grid(image: np.ndarray) -> np.ndarray:
    """Centres of the grid's cells, (x, y) in whole pixels."""
    xs, ys = (np.floor((np.arange(GRID) + 0.5) * side / GRID) for side in (image.shape[1], image.shape[0]))
    return np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)


def moved(image: np.ndarray) -> np.ndarray:
    """Turn an image by 6 degrees about its centre, and enlarge it by 1.12."""
    picture = Image.fromarray(image)
    side = picture.size
    larger = picture.resize((round(side[0] * 1.12), round(side[1] * 1.12)), Image.Resampling.BICUBIC).rotate(
        6.0, Image.Resampling.BICUBIC
    )
    x, y = (larger.width - side[0]) // 2, (larger.height - side[1]) // 2
    return np.asarray(larger.crop((x, y, x + side[0], y + side[1])))


def projected_bundles(
    folder: Path, options: Mapping[str, Any], counts: tuple[int, ...], pairs: Mapping[str, Pair]
) -> dict[str, Any]:
    """Export with all channels and with `counts`; returns the agreement with all, by number of channels."""
    found: dict[str, Any] = {}
    before: dict[str, np.ndarray] = {}
    for count in (None, *counts):
        name = "all" if count is None else str(count)
        bundle = folder / name
        if not bundle.is_dir():
            export_bundle(ExportOptions(output=bundle, pca=count, **options))
        with ditf.load(bundle) as model:
            matches = {key: matched(model.features, pair) for key, pair in pairs.items()}
            channels, pca = model.manifest.channels, model.manifest.pca
        before = before or matches
        found[name] = {"channels": channels, "measured_at_export": pca, **compared(matches, before)}
        say(f"{name}: {found[name]['within_1px']}")
    return found


def matched(features: Callable[[np.ndarray], FeatureMap], pair: Pair) -> np.ndarray:
    """Match a pair's points."""
    return match_points(features(pair[0]), features(pair[1]), pair[2]).points


def compared(matches: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Shares of matches within a pixel of those before, and the motorcycle's distances to the truth."""
    left, _, disparity = skimage.data.stereo_motorcycle()
    errors = errors_to_truth(grid(left), matches["motorcycle"], disparity)
    return {
        "within_1px": {
            name: match_parity(matches[name], before[name], (1, 1))["matches_within_1px"] for name in matches
        },
        "motorcycle": {
            "median_px": float(np.median(errors)),
            "points": len(errors),
            **{f"within_{limit}px": float((errors < limit).mean()) for limit in (5, 16)},
        },
    }


def other_bases(bundle: Path, pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """Bases of 64 channels from unit or plain tokens, about zero or the mean; and centred features."""
    with ditf.load(bundle) as model:
        calibration = [model.features(image).array for image in procedural_images(model.manifest.size)]
        maps = {name: tuple(model.features(image) for image in pair[:2]) for name, pair in pairs.items()}
    tokens = np.concatenate([one.reshape(len(one), -1).T for one in calibration]).astype(np.float64)
    units = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    mean = tokens.mean(axis=0)
    moment = SecondMoment(tokens.shape[1])
    for one in calibration:
        moment.add(one)
    none = np.zeros_like(mean)
    sides = {
        "unit tokens, about zero (ditf)": (moment.projection(64).matrix, none),
        "tokens as they are, about zero": (leading(tokens), none),
        "unit tokens, about their mean": (leading(units - units.mean(axis=0)), none),
        "features centred, too (PCA proper)": (leading(tokens - mean), mean),
    }
    before = {name: match_points(*maps[name], pairs[name][2]).points for name in pairs}
    found = {}
    for side, (matrix, origin) in sides.items():
        matches = {
            name: match_points(*(shifted(one, matrix, origin) for one in maps[name]), pairs[name][2]).points
            for name in pairs
        }
        found[side] = compared(matches, before)
    return found


def leading(tokens: np.ndarray) -> np.ndarray:
    """The 64 leading directions of tokens [N, C]."""
    return np.linalg.eigh(tokens.T @ tokens)[1][:, ::-1].T[:64].astype(np.float32)


def shifted(one: FeatureMap, matrix: np.ndarray, origin: np.ndarray) -> FeatureMap:
    """Project a map: P (F - origin)."""
    array = one.array.astype(np.float32) - origin[:, None, None].astype(np.float32)
    return FeatureMap(project_features(array, matrix), one.image_size)


def match_times(folder: Path, bundle: Path, pairs: Mapping[str, Pair], repeats: int) -> dict[str, Any]:
    """Measure bytes and seconds of maps of 3072 and 256 channels, in memory and from a store."""
    with ditf.load(bundle) as model:
        source, target = (model.features(image).array for image in pairs["motorcycle"][:2])
        calibration = [model.features(image).array for image in procedural_images(model.manifest.size)]
    rng = np.random.default_rng(0)
    isometry = np.linalg.qr(rng.normal(size=(LARGE, len(source))))[0].astype(np.float32)
    moment = SecondMoment(LARGE)
    for one in calibration:
        moment.add(project_features(one, isometry))
    matrix = moment.projection(SMALL).matrix
    points = np.stack([rng.integers(0, SIZE[1], POINTS), rng.integers(0, SIZE[0], POINTS)], axis=1)
    sides: dict[str, Callable[[], np.ndarray]] = {}
    bytes_of: dict[str, int] = {}
    for channels in (LARGE, SMALL):
        maps = []
        path = folder / f"store-{channels}"
        identity = StoreIdentity("0" * 64, "bench", "", None, "stretch", "float16", channels)
        with StoreWriter(path, identity) as writer:
            for name, array in (("source", source), ("target", target)):
                wide = project_features(array, isometry)
                given = wide if channels == LARGE else project_features(wide, matrix)
                maps.append(FeatureMap(given.astype(np.float16), SIZE))
                writer.put(name, "0" * 64, maps[-1])
        bytes_of[str(channels)] = sum(int(entry["bytes"]) for entry in writer.entries.values()) // 2
        sides[f"{channels}, in memory"] = partial(in_memory, maps[0], maps[1], points)
        sides[f"{channels}, from a store"] = partial(from_store, path, points)
    seconds, disturbance = interleave(sides, lambda name, number: sides[name](), repeats)
    large, small = (sides[f"{channels}, in memory"]() for channels in (LARGE, SMALL))
    for channels, expected in ((LARGE, large), (SMALL, small)):
        if not np.array_equal(from_store(folder / f"store-{channels}", points), expected):
            raise AssertionError("stored maps match otherwise than those in memory")
    return {
        "points": POINTS,
        "grid": list(source.shape[1:]),
        "image_size": list(SIZE),
        "bytes": bytes_of,
        "within_1px": match_parity(small, large, (1, 1))["matches_within_1px"],
        "timing": disturbance,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "ratio": {
            where: paired_ratio(seconds[f"{LARGE}, {where}"], seconds[f"{SMALL}, {where}"])
            for where in ("in memory", "from a store")
        },
    }


def in_memory(source: FeatureMap, target: FeatureMap, points: np.ndarray) -> np.ndarray:
    """Match two maps."""
    return match_points(source, target, points).points


def from_store(path: Path, points: np.ndarray) -> np.ndarray:
    """Open a store and match two of its maps."""
    store = FeatureStore(path)
    return match_points(store["source"], store["target"], points).points


def agreement_rows(demo: Mapping[str, Any], wide: Mapping[str, Any]) -> Rows:
    """Make the table of the bundles."""
    lines: Rows = [
        ("model", "channels", "energy kept", "at export", "motorcycle", "astronaut, chelsea, coffee",
         "motorcycle to the truth: median, within 5, 16 px"),
    ]  # fmt: skip
    for title, found in (("demo", demo), ("width 1152", wide)):
        for one in found.values():
            measured, within, truth = one["measured_at_export"], one["within_1px"], one["motorcycle"]
            others = [within[name] for name in ("astronaut", "chelsea", "coffee")]
            lines.append(
                (
                    title,
                    f"{one['channels']}",
                    f"{measured['energy_held_out']:.2%}" if measured else "all",
                    f"{measured['matches_within_1px']:.0%}" if measured else "",
                    f"{within['motorcycle']:.0%}" if measured else "",
                    ", ".join(f"{share:.0%}" for share in others) if measured else "",
                    f"{truth['median_px']:.1f} px, {truth['within_5px']:.0%}, {truth['within_16px']:.0%}",
                )
            )
    return lines


def basis_rows(bases: Mapping[str, Any]) -> Rows:
    """Make the table of the other bases."""
    lines: Rows = [("64 channels of", "motorcycle", "astronaut", "chelsea", "coffee", "mean")]
    for side, found in bases.items():
        shares = list(found["within_1px"].values())
        lines.append((side, *(f"{share:.0%}" for share in (*shares, float(np.mean(shares))))))
    return lines


def matching_rows(found: Mapping[str, Any]) -> Rows:
    """Make the table of bytes and seconds."""
    lines: Rows = [("channels", "bytes of a map", f"{POINTS} points", "from a store")]
    for channels in (LARGE, SMALL):
        times = [
            found["seconds"][f"{channels}, {where}"]["median"] for where in ("in memory", "from a store")
        ]
        stored = bytes_text(found["bytes"][str(channels)])
        lines.append((str(channels), stored, *(f"{value * 1e3:.0f} ms" for value in times)))
    ratios = [found["ratio"][where]["median"] for where in ("in memory", "from a store")]
    smaller = found["bytes"][str(LARGE)] / found["bytes"][str(SMALL)]
    lines.append(("ratio", f"{smaller:.1f}x", *(f"{ratio:.1f}x" for ratio in ratios)))
    return lines


if __name__ == "__main__":
    main()
