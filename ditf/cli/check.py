"""`ditf check`: measure a bundle's parity with the unmodified PyTorch model, without PyTorch."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Optional

import typer

from ditf.calib.golden_parity import GoldenResult, golden_result, image_size
from ditf.calib.parity import METRICS, ONNXRUNTIME_CPU, WHOLE, Gate, gates, limits_on, match_parity
from ditf.cli.support.bundles import open_bundle, open_model, vae_text
from ditf.cli.support.check_independent import (
    EmbedsOption,
    ImagesOption,
    IndependentOption,
    ModelOption,
    check_options,
    independent_golden,
)
from ditf.cli.support.check_where import Findings, check_bisect, check_ladder, check_overflow, check_ranges
from ditf.cli.support.options import RUNNING, BackendOption, BundleArgument, JsonOption, verb
from ditf.cli.support.output import say, show, table, write_json
from ditf.cli.support.paths import check_picture, check_writable
from ditf.runtime import FeatureMap, Model
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.bundles.golden_file import Golden, read_golden
from ditf.runtime.bundles.manifest import Manifest
from ditf.runtime.errors import GateFailed, InputError, NoPlan
from ditf.runtime.files.writing import replacing
from ditf.runtime.matching.points import match_points

_GRAPH_LIMIT = 0.9
"""Share of points on which match.onnx and the numpy matcher agree. Another order of summation moved 3 % of a
random model's positions, and TF32 moves 55 % or more."""
_GRAPH_SIDE = 1024
"""Side in px of the image that match.onnx is checked on. At a bundle's own size a cell has few pixels, and
products with 10 mantissa bits (TF32) still find the right one. Here they miss it for most points."""


@verb(*RUNNING)
def check(
    bundle: BundleArgument,
    backend: BackendOption = "auto",
    ranges: Annotated[
        bool, typer.Option("--ranges", help="Show how large every 16-bit value gets, instead of parity.")
    ] = False,
    ladder: Annotated[
        bool, typer.Option("--ladder", help="Show parity step by step, from PyTorch to the backend.")
    ] = False,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Find the first block and value that deviate.")
    ] = False,
    limit: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="METRIC=VALUE", help="Set the limit of a metric, such as whole_cosine_mean=0.9; repeat."
        ),
    ] = None,
    plot: Annotated[
        Optional[Path], typer.Option(metavar="PNG", help="Plot errors over the image, cosines and matches.")
    ] = None,
    polygraphy: Annotated[
        Optional[Path],
        typer.Option(
            "--export-polygraphy", metavar="DIR", help="Write the golden data in Polygraphy's format."
        ),
    ] = None,
    independent: IndependentOption = False,
    model: ModelOption = None,
    images: ImagesOption = None,
    prompt_embeds: EmbedsOption = None,
    json_file: JsonOption = None,
) -> None:
    """Compare a bundle's outputs on the golden images with the unmodified model's; exit 1 if they deviate."""
    check_writable(json_file, plot, inputs=(bundle,))
    if plot is not None:
        check_picture(plot, "check")
    check_options(
        independent,
        {"--model": model, "--images": images, "--prompt-embeds": prompt_embeds},
        {"--ranges": ranges, "--ladder": ladder, "--bisect": bisect, "--export-polygraphy": polygraphy},
    )
    opened = open_bundle(bundle)
    if not opened.manifest.golden and not independent:
        raise InputError(
            f"{bundle} was exported with --golden none: there is nothing to compare it with",
            "export it again without --golden none, or add --independent where its model is",
        )
    opened.verify(opened.manifest.files)
    findings = Findings()
    if independent:
        golden = independent_golden(opened, model, images, prompt_embeds, findings)
    else:
        golden = read_golden(opened)
    asked = dict(_parse_limit(text, golden) for text in limit or ())
    limits = {**limits_on("", opened.manifest), **asked}
    if ranges:
        check_ranges(opened, golden, findings)
    if ladder:
        check_ladder(opened, golden, backend, limits, findings)
    if bisect:
        check_bisect(opened, golden, limits, findings)
    if polygraphy is not None:
        from ditf.calib.debug.polygraphy_data import export_polygraphy

        for path in export_polygraphy(opened, golden, polygraphy):
            show(f"wrote {path}")
    if not (ranges or ladder or bisect or polygraphy) or plot is not None:
        recorded = opened.manifest.golden.get("oracle") == "independent"
        measured = images is None and (recorded or not independent)
        _check_parity(opened, golden, measured, backend, asked, plot, findings)
    write_json(
        json_file,
        {
            "bundle": str(bundle),
            "precision": opened.manifest.precision,
            **findings.document,
            "gates": findings.gates,
        },
        ok=not (findings.failures or findings.missed),
    )
    if findings.failures or findings.missed:
        fix = "export it again" if findings.failures else "export with other options, or ask for less"
        if findings.failures and model is not None:
            fix = "is --model the checkpoint that it was exported from? If so, export it again"
        raise GateFailed(f"{bundle}: {'; '.join([*findings.failures, *findings.missed])}", fix)


def _check_parity(
    bundle: Bundle,
    golden: Golden,
    measured: bool,
    backend: str,
    asked: Mapping[str, float],
    plot: Optional[Path],
    findings: Findings,
) -> None:
    """Measure the parity of the backend, and plot it.

    Args:
        measured: whether the images and their judge are those of the export; with others rounding differs.
        asked: the limits that the user gave.
    """
    manifest = bundle.manifest
    with open_model(bundle, backend) as model:
        known, checked = len(model.conditions), len(manifest.golden.get("conditions", [0]))
        if known > 1:
            say(f"features under {checked} of {known} conditions; the worst of each metric counts")
        metrics, result = golden_metrics(model, golden)
        findings.document["backend"] = model.detail
        on_cpu = "CPUExecutionProvider" in model.detail
    narrow = measured and on_cpu and platform.machine().lower() in ("x86_64", "amd64")
    limits = {**limits_on(ONNXRUNTIME_CPU if narrow else model.backend, manifest), **asked}
    results = gates(metrics, {"match_graph_agrees": _GRAPH_LIMIT, **limits})
    failed = [gate for gate in results if not gate.ok]
    show(_render(metrics, results))
    if "whole_features" in golden:
        show(_whole_text(manifest))
    findings.gates += [gate.to_json() for gate in results]
    if on_cpu and manifest.precision != "float32":
        check_overflow(bundle, golden, measured, findings)
    else:
        findings.document["overflow"] = {"tested": True, "how": "the backend computes in the graph's types"}
    if not failed and not findings.failures:
        show(f"passed: {len(findings.gates)} of {len(findings.gates)} gates")
    findings.document |= {
        "metrics": metrics,
        "vae": manifest.vae,
        "text_tokens": manifest.text_tokens,
    }
    for mine, what, told in (
        (False, "does not match its model", findings.failures),
        (True, "misses --limit", findings.missed),
    ):
        names = [
            f"{gate.name} {gate.value:.6g} (limit {gate.limit:g})"
            for gate in failed
            if (gate.name in asked) == mine
        ]
        if names:
            told.append(f"{what}: {', '.join(names)}")
    if plot is not None:
        from ditf.calib.plots.parity import plot_parity

        with replacing(plot) as temporary:
            plot_parity(golden, result, bundle.manifest.grid, limits, temporary)
        say(f"drew {plot}")


def _parse_limit(text: str, golden: Golden) -> tuple[str, float]:
    """Metric and value of "METRIC=VALUE".

    Raises:
        InputError: the text has another form, or this bundle has no such metric.
    """
    name, _, number = text.partition("=")
    try:
        value = float(number)
        if not math.isfinite(value):
            raise ValueError
    except ValueError:
        raise InputError(
            f"--limit {text} is not METRIC=VALUE", "for example whole_matches_within_patch=0.8"
        ) from None
    if name not in METRICS and name.removeprefix(WHOLE) in METRICS and "whole_features" not in golden:
        raise InputError(
            f"--limit {text}: this bundle has its model's own encoder and all its text", "leave whole_ out"
        )
    if name.removeprefix(WHOLE) not in METRICS:
        raise InputError(
            f"--limit {text}: {name!r} is not measured", f"choose {', '.join(METRICS)}, or one after {WHOLE}"
        )
    return name, value


def _whole_text(manifest: Manifest) -> str:
    """Describe the second parity: the model with its own VAE and all its text, against this bundle."""
    against, has = [], []
    if manifest.vae is not None:
        against.append("with its own VAE")
        has.append(f"encodes by {vae_text(manifest.vae)}")
    if manifest.text_tokens is not None:
        against.append("with all its text")
        has.append(f"keeps {manifest.text_tokens} T5 tokens")
    return f"{WHOLE}*: against the model {' and '.join(against)}; this bundle {' and '.join(has)}"


def golden_metrics(model: Model, golden: Golden) -> tuple[dict[str, float], GoldenResult]:
    """Every parity metric of a bundle, with match.onnx's agreement, and the outputs behind them."""
    result = golden_result(golden, model.run, model.conditions)
    metrics = dict(result.metrics)
    if result.matches is not None:
        source = FeatureMap(result.pair[0], image_size(golden))
        target = FeatureMap(result.pair[1], (_GRAPH_SIDE, _GRAPH_SIDE))
        try:
            by_graph = model.match_with_graph(source, target, golden["points"])
        except NoPlan as error:
            say(f"{error.problem}: match.onnx is not checked")
            return metrics, result
        by_numpy = match_points(source, target, golden["points"])
        cell = (_GRAPH_SIDE / target.array.shape[1], _GRAPH_SIDE / target.array.shape[2])
        agreement = match_parity(by_graph.points, by_numpy.points, cell)
        metrics["match_graph_agrees"] = agreement["matches_within_1px"]
    return metrics, result


def _render(metrics: dict[str, float], results: list[Gate]) -> str:
    by_name = {gate.name: gate for gate in results}
    rows: list[tuple[str, ...]] = [("metric", "value", "limit", "")]
    for name, value in metrics.items():
        gate = by_name.get(name)
        if gate is None:
            rows.append((name, _digits(value), "", ""))
        else:
            rows.append((name, _digits(value), _digits(gate.limit), "ok" if gate.ok else "FAILED"))
    return table(rows)


def _digits(value: float) -> str:
    """A number for people; of one just below 1, the distance counts."""
    return f"1 - {1 - value:.3g}" if 0 < 1 - value < 1e-4 else f"{value:.4g}"
