"""The parts of `ditf check` that find where a bundle deviates: --ranges, --ladder, --bisect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ditf.calib.debug.bisect import bisect
from ditf.calib.debug.graph_ranges import HEADROOM_LIMIT, GraphRange, run_widened
from ditf.calib.debug.ladder import first_off, ladder
from ditf.calib.debug.widened_graph import widen
from ditf.calib.golden_parity import golden_result
from ditf.calib.memory import available_bytes
from ditf.calib.parity import Gate, feature_parity, gates
from ditf.cli.support.output import show, table
from ditf.cli.support.state import state
from ditf.runtime.backends.engine_records import engine_folders
from ditf.runtime.bundles.bundle import FEATURES, TRACE, Bundle
from ditf.runtime.bundles.golden_file import Golden
from ditf.runtime.errors import MissingComponent
from ditf.runtime.features_runner import FeaturesRunner

_SHOWN = 10  # largest values
_COPIES = 8  # bytes of memory over bytes of 16-bit weights: widened, as a message, and in ONNX Runtime
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
    widened = widen(bundle.read_graph(FEATURES))
    found = run_widened(bundle, widened, golden).ranges if widened.short else []
    findings.document["ranges"] = [one.to_json() for one in found]
    if not found:
        show("ranges: nothing in this graph is 16-bit")
        return
    rows: list[tuple[str, ...]] = [("value", "largest |x|", "type", "headroom")]
    rows += [(one.name, f"{one.max_abs:.5g}", one.dtype, f"{one.headroom:.3g}x") for one in found[:_SHOWN]]
    show(table(rows))
    _gate_headroom("ranges", found, findings)


def check_overflow(bundle: Bundle, golden: Golden, measured: bool, findings: Findings) -> None:
    """Run a 16-bit graph in float32 arithmetic, where ONNX Runtime on a CPU hides what 16 bits would give.

    It shows whether a value overflows, and whether the file gives what the exported graph gave apart from
    rounding. The --json document has `overflow`: whether it was `tested`, and `how` or why not.

    Args:
        measured: whether the images are those of the export, on which the exported graph was computed.
    """
    needed = _COPIES * sum(
        entry["bytes"] for name, entry in bundle.manifest.files.items() if name.startswith(FEATURES)
    )
    available = available_bytes()
    how = "every 16-bit value of features.onnx was computed in float32"
    why = ""
    if available is not None and needed > available:
        why = f"it takes {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are available"
    else:
        try:
            run = run_widened(bundle, widen(bundle.read_graph(FEATURES)), golden)
            if run.ranges:
                _gate_headroom("overflow", run.ranges, findings)
            if measured:
                _gate_file(bundle, run.features, golden, findings)
        except MissingComponent as error:
            why = f"{error.problem}; {error.fix}"
    if why:
        show(f"overflow was not tested, and ONNX Runtime on a CPU hides it: {why}")
    findings.document["overflow"] = {"tested": not why, "how": why or how}


def _gate_file(bundle: Bundle, features: np.ndarray, golden: Golden, findings: Findings) -> None:
    """Gate the difference between the file and the exported graph, both in float32 arithmetic.

    Args:
        features: the file's, of the first golden image, [C, h, w].
    """
    trace = bundle.read_arrays(TRACE) if TRACE in bundle.manifest.files else {}
    if "exact" not in trace:
        return  # int8, or a bundle from before
    exact, limit = trace["exact"], float(trace["exact_limit"])
    rows = features.reshape(len(features), -1).T[golden["rows"][0][: len(exact)]]
    gate = Gate("file_error", feature_parity(rows, exact)["relative_error"], limit)
    findings.gates.append(gate.to_json())
    if gate.ok:
        show(f"file: in float32 arithmetic {gate.value:.2g} from the exported graph (limit {limit:.2g})")
    else:
        findings.failures.append(
            f"features.onnx is not the exported graph: file_error {gate.value:.3g} (limit {limit:.2g})"
        )


def _gate_headroom(what: str, found: Sequence[GraphRange], findings: Findings) -> None:
    """Gate the least headroom of values; a value that overflows its type is a failure."""
    least = found[0]
    ok = least.headroom >= HEADROOM_LIMIT
    findings.gates.append({"name": "headroom", "value": least.headroom, "limit": HEADROOM_LIMIT, "ok": ok})
    beyond = [one for one in found if one.headroom < HEADROOM_LIMIT]
    if ok:
        show(f"{what}: {len(found)} 16-bit values, the least headroom {least.headroom:.3g}x ({least.name})")
    else:
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        findings.failures.append(
            f"{least.name}{more} reaches {least.max_abs:.4g}, which {least.dtype} cannot hold"
        )


def check_ladder(
    bundle: Bundle, golden: Golden, backend: str, limits: Mapping[str, float], findings: Findings
) -> None:
    """Print the parity of every rung; the first rung out of tolerance is a failure."""
    rungs = ladder(bundle, golden, backend, state.device)
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
