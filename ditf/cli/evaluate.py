"""`ditf eval`: how often a bundle's matches are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import typer

from ditf.calib.eval.creature_pairs import PAIRS, SIZE, TEST, evaluate, pairs
from ditf.calib.eval.pck import ALPHAS, Scored, by_category, by_keypoint, pck
from ditf.cli.console import (
    BackendOption,
    BundleArgument,
    JsonOption,
    PromptOption,
    QuietOption,
    VerboseOption,
    check_writable,
    say,
    show,
    stages,
    table,
    write_json,
)
from ditf.runtime import load
from ditf.runtime.errors import InputError

BENCHMARKS = ("creatures",)
_HEADLINE = 0.1


def evaluate_bundle(
    benchmark: Annotated[str, typer.Argument(metavar="creatures", help="The benchmark.")],
    bundle: BundleArgument,
    count: Annotated[
        int, typer.Option("--pairs", min=1, max=100_000, help="Pairs in species, and as many across.")
    ] = PAIRS,
    prompt: PromptOption = None,
    backend: BackendOption = "auto",
    json_file: JsonOption = None,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure PCK: the share of keypoints matched within alpha times the target's size."""
    check_writable(json_file, inputs=(bundle,))
    if benchmark not in BENCHMARKS:
        raise InputError(f"unknown benchmark {benchmark!r}", f"choose {', '.join(BENCHMARKS)}")
    scored: dict[str, list[Scored]] = {}
    with load(bundle, backend) as model, stages(2) as stage:
        say(f"{bundle} on {model.detail} ({model.reason})")

        def match(source: np.ndarray, target: np.ndarray, points: np.ndarray) -> np.ndarray:
            one, other = model.features_of([source, target], prompt=prompt)
            return model.match(one, other, points).points

        for name, cross in (("in species", False), ("across species", True)):
            stage(f"{count} pairs {name}")
            scored[name] = evaluate(match, pairs(count, cross))
    rows: list[tuple[str, ...]] = [("PCK, per point", *(f"@{alpha:g}" for alpha in ALPHAS))]
    for name, found in scored.items():
        rows.append((name, *(f"{pck(found, alpha):.1%}" for alpha in ALPHAS)))
    show(table(rows))
    within = scored["in species"]
    parts: tuple[tuple[str, Callable[..., dict[str, float]]], ...] = (
        ("species", by_category), ("keypoint", by_keypoint),
    )  # fmt: skip
    document: dict[str, Any] = {}
    for name, split in parts:
        document[f"by_{name}"] = found_by = split(within, _HEADLINE)
        show("\n" + table([(name, f"@{_HEADLINE:g}"), *((k, f"{v:.1%}") for k, v in found_by.items())]))
    write_json(
        json_file,
        {
            "benchmark": benchmark,
            "bundle": str(bundle),
            "pairs": count,
            "split": TEST,
            "image_size": [SIZE, SIZE],
            "pck": {f"{alpha:g}": pck(within, alpha) for alpha in ALPHAS},
            "pck_across_species": {f"{alpha:g}": pck(scored["across species"], alpha) for alpha in ALPHAS},
            **document,
        },
    )
