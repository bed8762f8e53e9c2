"""The parts of `ditf check` that find where a bundle deviates: --ranges, --ladder, --bisect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditf.calib.debug.bisect import bisect
from ditf.calib.debug.graph_ranges import HEADROOM_LIMIT, graph_ranges
from ditf.calib.debug.ladder import first_off, ladder
from ditf.calib.debug.widened_graph import widen
from ditf.calib.golden_parity import golden_result
from ditf.calib.parity import gates
from ditf.cli.support.output import show, table
from ditf.runtime.backends.engine_records import engine_folders
from ditf.runtime.bundles.bundle import FEATURES, Bundle
from ditf.runtime.bundles.golden_file import Golden
from ditf.runtime.features_runner import FeaturesRunner

_SHOWN = 10  # largest values
_COLUMNS = ("cosine_p01", "relative_error", "channel_error", "matches_within_1px")


class Findings:
    """The --json document, the gates, the failures, and the user's own limits that were missed."""

    def __init__(self) -> None:
        self.document: dict[str, Any] = {}
        self.gates: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.missed: list[str] = []


def check_ranges(bundle: Bundle, golden: Golden, findings: Findings) -> None:
    """Print the largest 16-bit values; a value that overflows its type is a failure."""
    found = graph_ranges(bundle, widen(bundle.read_graph(FEATURES)), golden)
    findings.document["ranges"] = [one.to_json() for one in found]
    if not found:
        show("ranges: nothing in this graph is 16-bit")
        return
    rows: list[tuple[str, ...]] = [("value", "largest |x|", "type", "headroom")]
    rows += [(one.name, f"{one.max_abs:.5g}", one.dtype, f"{one.headroom:.3g}x") for one in found[:_SHOWN]]
    show(table(rows))
    least = found[0]
    ok = least.headroom >= HEADROOM_LIMIT
    findings.gates.append({"name": "headroom", "value": least.headroom, "limit": HEADROOM_LIMIT, "ok": ok})
    beyond = [one for one in found if one.headroom < HEADROOM_LIMIT]
    if ok:
        show(f"ranges: {len(found)} values, the least headroom {least.headroom:.3g}x")
    else:
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        findings.failures.append(
            f"{least.name}{more} reaches {least.max_abs:.4g}, which {least.dtype} cannot hold"
        )


def check_ladder(
    bundle: Bundle, golden: Golden, backend: str, limits: Mapping[str, float], findings: Findings
) -> None:
    """Print the parity of every rung; the first rung out of tolerance is a failure."""
    rungs = ladder(bundle, golden, backend)
    rows: list[tuple[str, ...]] = [("", *_COLUMNS, "", "")]
    rows.append(("the unmodified model, float32", *("reference" for _ in _COLUMNS), "", ""))
    for rung in rungs:
        metrics = rung.metrics or {}
        cells = (f"{metrics[name]:.8g}" if name in metrics else "" for name in _COLUMNS)
        verdict = "" if rung.metrics is None else "FAILED" if rung.failed(limits) else "ok"
        rows.append((rung.name, *cells, verdict, rung.note))
    if not rungs[-1].name.startswith("tensorrt"):
        engines = engine_folders(bundle.path)
        why = "give --backend tensorrt or tensorrt-rtx" if engines else "the bundle has none"
        rows.append(("TensorRT engine", *("" for _ in _COLUMNS), "", f"not run: {why}"))
    show(table(rows))
    first = first_off(rungs, limits)
    findings.document["ladder"] = {
        "rungs": [rung.to_json(limits) for rung in rungs],
        "first_off": None if first is None else first.name,
    }
    if first is None:
        show("ladder: every rung that ran is within tolerance")
    else:
        failed = ", ".join(f"{g.name} {g.value:.4g} (limit {g.limit:g})" for g in first.failed(limits))
        findings.failures.append(f"the first rung out of tolerance is {first.name}: {failed}")


def check_bisect(bundle: Bundle, golden: Golden, limits: Mapping[str, float], findings: Findings) -> None:
    """Find the first block and value that deviate; finding one is a failure."""
    rounded_graph = widen(bundle.read_graph(FEATURES), rounded=True)
    runner = FeaturesRunner(bundle, rounded_graph.open())
    metrics = golden_result(golden, runner.run, ()).metrics  # under the first condition
    found = bisect(bundle, rounded_graph, golden, all(gate.ok for gate in gates(metrics, limits)))
    rows: list[tuple[str, ...]] = [("enters block", "worst channel's error", "limit", "")]
    for index, one in enumerate(found.boundaries):
        rows.append((str(index), f"{one.error:.4g}", f"{one.limit:g}", "ok" if one.ok else "FAILED"))
    show(table(rows))
    culprit = found.culprit
    findings.document["bisect"] = {
        "boundaries": [one.to_json() for one in found.boundaries],
        "place": found.place,
        "value": None if culprit is None else culprit.to_json(),
    }
    if not found.place:
        show("bisect: nothing is off")
    elif culprit is None:
        findings.failures.append(
            f"off in {found.place}, where every value is as PyTorch had it at export: the export was not the"
            " model"
        )
    else:
        findings.failures.append(f"off in {found.place}: {culprit.name} by {culprit.error:.3g} of its size")
