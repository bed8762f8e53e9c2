"""`ditf check --ladder`: compare each step from the unmodified model to the backend with the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditf.calib.debug.widened_graph import widen
from ditf.calib.golden_parity import golden_result
from ditf.calib.parity import Gate, gates
from ditf.runtime import Model
from ditf.runtime.bundles.bundle import FEATURES, Bundle
from ditf.runtime.bundles.golden_file import Golden
from ditf.runtime.errors import MissingComponent
from ditf.runtime.features_runner import FeaturesRunner


@dataclass(frozen=True)
class Rung:
    """One way to compute the features.

    Attributes:
        metrics: parity with the unmodified model in float32; None if it did not run.
        note: how it was computed, or why it did not run.
    """

    name: str
    metrics: Mapping[str, float] | None
    note: str = ""

    def failed(self, limits: Mapping[str, float]) -> list[Gate]:
        """The gates that this rung fails."""
        return [] if self.metrics is None else [g for g in gates(self.metrics, limits) if not g.ok]

    def to_json(self, limits: Mapping[str, float]) -> dict[str, Any]:
        return {
            "name": self.name,
            "metrics": None if self.metrics is None else dict(self.metrics),
            "note": self.note,
            "ok": not self.failed(limits),
        }


def ladder(bundle: Bundle, golden: Golden, backend: str, device: str | None = None) -> list[Rung]:
    """Compute a bundle's rungs and compare each with golden.npz.

    Args:
        backend, device: what runs the last rung, see `ditf.load`.
    """
    precision = bundle.manifest.precision
    rungs = [
        Rung(f"PyTorch, {precision}", bundle.manifest.rehearsal, "recorded at export"),
        Rung("features.onnx, float32 arithmetic", _twin_metrics(bundle, golden, rounded=False)),
    ]
    if precision != "float32":
        name = f"features.onnx, {precision} arithmetic"
        rungs.append(Rung(name, _twin_metrics(bundle, golden, rounded=True), "every value rounded"))
    try:
        with Model(bundle, backend, device=device) as model:
            metrics = golden_result(golden, model.run, model.conditions).metrics
            rungs.append(Rung(f"{model.backend}", metrics, model.detail))
    except MissingComponent as error:
        rungs.append(Rung(backend, None, f"not run: {error.problem}"))
    return rungs


def first_off(rungs: list[Rung], limits: Mapping[str, float]) -> Rung | None:
    """The first rung that fails a gate."""
    return next((rung for rung in rungs if rung.failed(limits)), None)


def _twin_metrics(bundle: Bundle, golden: Golden, rounded: bool) -> dict[str, float]:
    runner = FeaturesRunner(bundle, widen(bundle.read_graph(FEATURES), rounded).open())
    return golden_result(golden, runner.run, runner.conditions).metrics
