"""The golden data for Polygraphy, read by Polygraphy itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

POLYGRAPHY = Path(sys.executable).parent / "polygraphy"


@pytest.mark.parametrize("fixture", ["demo_bundle_float32", "live_bundle"])
def test_polygraphy_compares_onnx_runtime_with_it(ditf, request, tmp_path, fixture):
    bundle = request.getfixturevalue(fixture)
    done = ditf("check", bundle, "--export-polygraphy", "golden")
    assert done.returncode == 0, done.stderr
    command = [POLYGRAPHY, "run", bundle / "features.onnx", "--onnxrt"]
    command += ["--load-inputs", "golden/inputs.json", "--load-outputs", "golden/outputs.json"]
    compared = subprocess.run(
        [*command, "--atol", "2e-2", "--rtol", "2e-2"], cwd=tmp_path, capture_output=True, text=True
    )
    assert compared.returncode == 0, compared.stdout[-2000:] + compared.stderr[-2000:]
    assert "PASSED" in compared.stdout
    strict = subprocess.run([*command, "--atol", "0", "--rtol", "0"], cwd=tmp_path, capture_output=True)
    assert strict.returncode != 0  # it really compares: no two runs sum in one order
