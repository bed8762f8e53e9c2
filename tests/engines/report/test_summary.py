"""`ditf build --report`, and the least time of an engine."""

from __future__ import annotations

import json
import shutil

import pytest

from ditf.engines.report.layer_log import CompiledLayer, EngineLayers, Tensor
from ditf.engines.report.summary import Report
from ditf.export.estimate.devices import DEVICES
from tests.engines.reports import report_of, unfused


@pytest.fixture(scope="module")
def report(demo_bundle):
    return report_of(demo_bundle / "features.onnx", "sm_89")


def test_each_block_of_the_demo_is_one_attention_kernel(report):
    assert report.kernels["float16 fused attention"] == 9
    assert unfused(report) == []
    assert "float32 product" not in report.kernels


def test_the_least_time_is_the_sum_of_the_layers():
    """A product that the rate bounds, and a copy that the bandwidth bounds, worked out by hand."""
    x, w, y = (Tensor(name, (2048, 2048), "Half", 2 << 22) for name in "xwy")
    product = CompiledLayer("p", "gemm", (x,), (w,), (y,), ())
    copy = CompiledLayer("__myl_Move_myl0_1", "kgen", (x,), (), (y,), ())
    report = Report("features.plan", "sm_89", EngineLayers((product, copy), 0, 0))
    l4 = DEVICES["l4"]  # 121 tera-operations and 300 GB a second
    assert report.least_seconds(l4) == pytest.approx(2 * 2048**3 / 121e12 + 4 * (1 << 22) / 300e9)


def test_a_device_without_a_rate_is_left_out():
    layer = CompiledLayer("p", "gemm", (Tensor("x", (8, 8), "Int8", 64),), (), (), ())
    found = Report("features.plan", "sm_89", EngineLayers((layer,), 0, 0)).least_ms(DEVICES)
    assert "thor" not in found
    assert "orin" in found


def test_build_writes_a_report_for_each_target(ditf, demo_bundle, tmp_path):
    shutil.copytree(demo_bundle, tmp_path / "bundle")
    done = ditf("build", "bundle", "--target", "sm_86,sm_89", "--report", "report.json")
    assert done.returncode == 0, done.stderr
    assert "features.plan for sm_86" in done.stdout
    written = json.loads((tmp_path / "report.json").read_text())
    assert [plan["target"] for plan in written["plans"]] == ["sm_86", "sm_89"]
    for plan in written["plans"]:
        assert sum(plan["kernels"].values()) == len(plan["layers"])
        assert sum(layer["read"] + layer["written"] for layer in plan["layers"]) == plan["bytes"]
        assert plan["activation_bytes"] > 0
    again = ditf(
        "build", "bundle", "--target", "sm_89", "--report", "again.json"
    )  # of an engine that was there
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "again.json").read_text())["plans"] == written["plans"][1:]


def test_a_report_inside_the_bundle_is_refused_before_anything_is_built(ditf, demo_bundle, tmp_path):
    shutil.copytree(demo_bundle, tmp_path / "bundle")
    done = ditf("build", "bundle", "--report", "bundle/report.json")
    assert done.returncode == 2
    assert not (tmp_path / "bundle" / "engines").exists()
