"""`ditf check --export-polygraphy`: write golden data for Polygraphy's --load-inputs and --load-outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ditf.calib.debug.widened_graph import widen
from ditf.runtime.bundles.bundle import FEATURES, Bundle
from ditf.runtime.bundles.golden_file import Golden
from ditf.runtime.errors import missing_extra
from ditf.runtime.features_runner import FeaturesRunner
from ditf.runtime.files.writing import replacing

INPUTS, OUTPUTS = "inputs.json", "outputs.json"
RUNNER = "ditf-float32"


def export_polygraphy(bundle: Bundle, golden: Golden, folder: Path) -> tuple[Path, Path]:
    """Write inputs.json and outputs.json for features.onnx.

    Polygraphy compares whole outputs, and golden.npz has only a sample of token rows. The outputs are
    therefore computed from features.onnx in float32 arithmetic, which `ditf check --ladder` compares with the
    model.

    Args:
        folder: where the files go; it is made if it does not exist.

    Returns:
        The paths of inputs.json and outputs.json.

    Raises:
        MissingComponent: polygraphy, onnx or onnxruntime is not installed.
    """
    try:
        from polygraphy.comparator.struct import IterationResult, RunResults
        from polygraphy.json import save_json
    except ImportError:
        raise missing_extra("polygraphy", "check") from None
    runner = FeaturesRunner(bundle, widen(bundle.read_graph(FEATURES)).open())
    feeds = runner.feeds()
    dtype = np.float32 if bundle.manifest.precision == "float32" or not bundle.manifest.adaln else np.float16
    inputs, results = [], []
    for chunk, _ in runner.batches(golden["images"]):
        inputs.append({"image": chunk, **feeds})
        outputs = {"features": runner.run(chunk).astype(dtype)}
        results.append(IterationResult(outputs=outputs, runner_name=RUNNER))
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / INPUTS) as temporary:
        save_json(inputs, str(temporary), description="golden inputs")
    with replacing(folder / OUTPUTS) as temporary:
        RunResults([(RUNNER, results)]).save(str(temporary))
    return folder / INPUTS, folder / OUTPUTS
