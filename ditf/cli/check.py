"""`ditf check`: parity of a bundle with the unmodified PyTorch model, with no PyTorch."""

from __future__ import annotations

import numpy as np

from ditf.calib.parity import TOLERANCES, Gate, feature_parity, gates, match_parity, worst
from ditf.cli.console import (
    BackendOption,
    BundleArgument,
    JsonOption,
    QuietOption,
    VerboseOption,
    check_writable,
    say,
    show,
    table,
    write_json,
)
from ditf.runtime import FeatureMap, Model
from ditf.runtime.bundle import GOLDEN, Bundle
from ditf.runtime.errors import GateFailed

_GRAPH_LIMIT = 0.98  # share of points on which match.onnx and the numpy matcher agree


def check(
    bundle: BundleArgument,
    backend: BackendOption = "auto",
    json_file: JsonOption = None,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run the golden images through a bundle and gate the result: exit 1 if it is off."""
    check_writable(json_file, inputs=(bundle,))
    opened = Bundle.open(bundle)
    opened.verify(opened.manifest.files)
    with Model(opened, backend) as model:
        say(f"{bundle} on {model.detail} ({model.reason})")
        known, checked = len(model.conditions), len(opened.manifest.golden.get("conditions", [0]))
        if known > 1:
            say(f"features under {checked} of {known} conditions; the worst of each metric counts")
        metrics = golden_metrics(model)
    limits = {**TOLERANCES[opened.manifest.precision], **opened.manifest.tolerances}
    results = gates(metrics, {**limits, "match_graph_agrees": _GRAPH_LIMIT})
    failed = [gate for gate in results if not gate.ok]
    show(_render(metrics, results))
    if opened.manifest.text_tokens is not None:
        show(
            f"whole_*: against the model with all its text; this bundle keeps {opened.manifest.text_tokens}"
            " T5 tokens"
        )
    if not failed:
        show(f"passed: {len(results)} of {len(results)} gates")
    write_json(
        json_file,
        {
            "bundle": str(bundle),
            "backend": model.detail,
            "precision": opened.manifest.precision,
            "metrics": metrics,
            "gates": [gate.to_json() for gate in results],
        },
        ok=not failed,
    )
    if failed:
        names = ", ".join(f"{gate.name} {gate.value:.6g} (limit {gate.limit:g})" for gate in failed)
        raise GateFailed(f"{bundle} does not match its model: {names}", "export it again")


def golden_metrics(model: Model) -> dict[str, float]:
    """Every parity metric of a bundle on its golden data.

    Of the features the worst over the conditions that golden.npz has. Of a bundle that approximates also
    what the approximation costs: whole_*, against the model without it.
    """
    golden = model.bundle.read_arrays(GOLDEN)
    maps = model.run(golden["images"])
    rows = _rows(maps, golden["rows"])
    measured = [feature_parity(rows, golden["features"])]
    for index, name in enumerate(model.conditions):
        if f"rows_{index}" in golden:
            one = model.run(golden["images"][:1], prompt=name)
            measured.append(
                feature_parity(_rows(one, golden[f"rows_{index}"][None])[0], golden[f"features_{index}"])
            )
    metrics = worst(measured)
    if not np.isfinite(maps).all():
        return metrics  # NaN metrics fail their gates; there is nothing to match
    height, width = golden["images"].shape[1:3]
    source, target = (FeatureMap(array, (height, width)) for array in maps)
    cell = (height / maps.shape[2], width / maps.shape[3])
    found = model.match(source, target, golden["points"])
    metrics |= match_parity(found.points, golden["match_points"], cell)
    by_graph = model.match_with_graph(source, target, golden["points"])
    agreement = match_parity(by_graph.points, found.points, cell)
    metrics["match_graph_agrees"] = agreement["matches_within_1px"]
    if "whole_features" in golden:
        cost = feature_parity(rows, golden["whole_features"])
        cost |= match_parity(found.points, golden["whole_match_points"], cell)
        metrics |= {f"whole_{name}": value for name, value in cost.items()}
    return metrics


def _rows(maps: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Token rows [n, R, C] of maps [n, C, h, w] at indices [n, R]."""
    tokens = maps.reshape(len(maps), maps.shape[1], -1).transpose(0, 2, 1)
    return np.take_along_axis(tokens, rows[:, :, None], axis=1)


def _render(metrics: dict[str, float], results: list[Gate]) -> str:
    by_name = {gate.name: gate for gate in results}
    rows: list[tuple[str, ...]] = [("metric", "value", "limit", "")]
    for name, value in metrics.items():
        gate = by_name.get(name)
        if gate is None:
            rows.append((name, f"{value:.7g}", "", ""))
        else:
            rows.append((name, f"{value:.7g}", f"{gate.limit:g}", "ok" if gate.ok else "FAILED"))
    return table(rows)
