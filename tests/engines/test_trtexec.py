from __future__ import annotations

import shlex

import pytest

from ditf.engines.trtexec import trtexec_lines, unread_opset
from ditf.runtime.bundles.bundle import Bundle

SHAPES = ("point_rows:{points}x12", "point_columns:{points}x12", "rows:{side}x12", "columns:{side}x12")


def flags(line: str) -> dict[str, str]:
    program, *words = shlex.split(line)
    assert program == "trtexec"
    return dict(word.lstrip("-").partition("=")[::2] for word in words)


def test_lines(demo_bundle):
    """Flags of trtexec 10.3 and 11: documented by NVIDIA, and not run here."""
    bundle = Bundle.open(demo_bundle)
    assert bundle.manifest.grid == (12, 12)
    features, match = map(flags, trtexec_lines(bundle))
    assert features == {
        "onnx": f"{demo_bundle}/features.onnx", "saveEngine": "features.plan", "stronglyTyped": "",
        "skipInference": "",
    }  # fmt: skip
    shapes = {
        which: ",".join(one.format(points=points, side=side) for one in SHAPES)
        for which, points, side in (("minShapes", 1, 1), ("optShapes", 16, 640), ("maxShapes", 16, 2048))
    }
    assert match == {
        "onnx": f"{demo_bundle}/match.onnx", "saveEngine": "match.plan", "stronglyTyped": "", "noTF32": "",
        "skipInference": "", **shapes,
    }  # fmt: skip


def test_lines_of_a_dynamic_float32_bundle(pixart_bundle, monkeypatch):
    bundle = Bundle.open(pixart_bundle)
    assert bundle.manifest.batch == "dynamic"
    height, width = bundle.manifest.size
    monkeypatch.setattr(Bundle, "may_round", lambda self, graph: False)
    features, _ = map(flags, trtexec_lines(bundle, ((1, 4, 8),)))
    assert features["noTF32"] == ""
    assert [features[f"{which}Shapes"] for which in ("min", "opt", "max")] == [
        f"image:{n}x{height}x{width}x3" for n in (1, 4, 8)
    ]


@pytest.mark.parametrize(
    ("opset", "version", "warned"),
    [(20, "10.3.0", False), (21, "10.3.0", True), (22, "10.13.3.9", True), (22, "11.4.1.5", False)],
)
def test_an_opset_that_tensorrt_may_not_read(opset, version, warned):
    assert bool(unread_opset(opset, version)) == warned
    assert ("export with --opset 20" in unread_opset(opset, version)) == warned
