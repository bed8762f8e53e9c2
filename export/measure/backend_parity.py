"""Feature parity of the written files on ONNX Runtime: `ditf check` takes its limits there from it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ditf.calib.golden_parity import golden_result
from ditf.calib.memory import available_bytes
from ditf.calib.parity import METRICS, ONNXRUNTIME_CPU, gates, limits_on
from ditf.runtime.backends import load_backend
from ditf.runtime.bundles.bundle import FEATURES, FEATURES_DATA, Bundle
from ditf.runtime.bundles.golden_file import read_golden
from ditf.runtime.errors import GateFailed
from ditf.runtime.features_runner import FeaturesRunner

_COPIES = 6
"""Memory that ONNX Runtime takes, over the bytes of the weights: float16 ones are also held in float32, once
as they are and once packed for its products."""


def runs_on_cpu(precision: str) -> bool:
    """Whether ONNX Runtime is installed and has kernels for this precision on a CPU."""
    return precision != "bfloat16" and find_spec("onnxruntime") is not None


def fits_on_cpu(folder: Path) -> bool:
    """Whether ONNX Runtime has the memory to run a bundle's features.onnx; unknown memory is enough."""
    available = available_bytes()
    return available is None or _COPIES * (folder / FEATURES_DATA).stat().st_size <= available


def measure_on_cpu(folder: Path) -> dict[str, dict[str, float]]:
    """Run features.onnx of a complete bundle on ONNX Runtime, as `ditf check` will.

    Returns:
        {backend: feature parity}, as the manifest's `measured`; empty if ONNX Runtime runs on another device
        than a CPU.

    Raises:
        GateFailed: the features are not the model's, though they were before the file was written.
    """
    bundle = Bundle.open(folder)
    session = load_backend("onnxruntime").open_session(bundle, FEATURES)
    try:
        if "CPUExecutionProvider" not in session.detail:
            return {}
        runner = FeaturesRunner(bundle, session)
        metrics = golden_result(read_golden(bundle), runner.run, runner.conditions).metrics
    finally:
        session.close()
    features = {name: metrics[name] for name in METRICS if name in metrics and not name.startswith("match")}
    for gate in gates(features, limits_on("", bundle.manifest)):
        if not gate.ok:
            raise GateFailed(
                f"features.onnx does not match the model on ONNX Runtime: {gate.name} {gate.value:.6g}, limit"
                f" {gate.limit:g}",
                "export with the versions in constraints.txt; if it stays, this is a defect of ditf",
            )
    return {ONNXRUNTIME_CPU: features}
