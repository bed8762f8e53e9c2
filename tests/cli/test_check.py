"""`ditf check`: 0 on a good bundle, 1 on a changed weight signed for, 2 on one that is not."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import onnx
import pytest


@pytest.fixture
def copy(demo_bundle, tmp_path):
    return shutil.copytree(demo_bundle, tmp_path / "bundle")


def sign(bundle, name):
    """Write the file's present size and hash into the manifest."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    content = (bundle / name).read_bytes()
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def change_weight(bundle, tensor, value):
    """Set the middle element of a float16 weight."""
    model = onnx.load(str(bundle / "features.onnx"), load_external_data=False)
    entry = next(t for t in model.graph.initializer if tensor in t.name)
    where = {e.key: e.value for e in entry.external_data}
    data = bytearray((bundle / "features.onnx.data").read_bytes())
    offset = int(where["offset"]) + int(where["length"]) // 4 * 2
    data[offset : offset + 2] = np.float16(value).tobytes()
    (bundle / "features.onnx.data").write_bytes(data)


def test_a_good_bundle(ditf, demo_bundle, tmp_path):
    done = ditf("check", demo_bundle, "--json", "check.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["ok"] is True
    assert {"name", "value", "limit", "ok"} == set(report["gates"][0])
    assert all(gate["ok"] for gate in report["gates"])
    metrics = report["metrics"]
    names = ("cosine_mean", "cosine_p01", "cosine_min", "relative_error", "max_abs_error", "matches_same")
    assert all(name in metrics for name in names)
    assert metrics["cosine_mean"] > 0.999


def test_other_bundles(ditf, demo_bundle_float32, pixart_bundle):
    for bundle in (demo_bundle_float32, pixart_bundle):
        done = ditf("check", bundle)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "tensor",
    [
        "blocks.0.attention.project.linear.weight",
        "blocks.4.feed_forward.up.weight",
        "blocks.8.attention.out.linear.weight",
        "blocks.8.feed_forward_out.linear.weight",
    ],
)
def test_one_changed_weight(ditf, copy, tmp_path, tensor):
    change_weight(copy, tensor, 30.0)
    done = ditf("check", copy)
    assert done.returncode == 2
    assert "has changed" in done.stderr
    sign(copy, "features.onnx.data")
    done = ditf("check", copy, "--json", "check.json")
    assert done.returncode == 1, done.stdout
    assert "FAILED" in done.stdout
    assert "does not match its model" in done.stderr
    assert done.stderr.count("error:") == 1
    assert json.loads((tmp_path / "check.json").read_text())["ok"] is False


def test_a_weight_of_nan(ditf, copy):
    change_weight(copy, "blocks.3.attention.project.linear.weight", np.nan)
    sign(copy, "features.onnx.data")
    done = ditf("check", copy, "--json", "check.json")
    assert done.returncode == 1
    assert "nan" in done.stdout
    report = json.loads((copy.parent / "check.json").read_text(), parse_constant=pytest.fail)
    assert report["metrics"]["cosine_mean"] is None  # JSON has no NaN


def test_gates_that_the_manifest_lost(ditf, copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "tolerances": {}}))
    done = ditf("check", copy)
    assert done.returncode == 0
    assert "passed: 11 of 11 gates" in done.stdout


def test_a_bundle_from_before_limits_by_backend(ditf, copy, tmp_path):
    """Neither `measured` nor a limit of the scale, and no exact features in trace.npz."""
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["measured"], manifest["tolerances"]["scale_error"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with np.load(copy / "trace.npz") as trace:
        kept = {name: trace[name] for name in trace.files if not name.startswith("exact")}
    np.savez(copy / "trace.npz", **kept)
    sign(copy, "trace.npz")
    done = ditf("check", copy, "--json", "check.json")
    assert done.returncode == 0, done.stderr
    gates = {gate["name"]: gate for gate in json.loads((tmp_path / "check.json").read_text())["gates"]}
    assert gates["relative_error"]["limit"] == manifest["tolerances"]["relative_error"]
    assert "headroom" in gates
    assert "file_error" not in gates


def test_match_graph_with_products_in_tf32(ditf, copy):
    """GPUs round the factors of float32 products to 10 mantissa bits unless told otherwise: emulated here."""
    model = onnx.load(str(copy / "match.onnx"))
    nodes, split = [], onnx.numpy_helper.from_array(np.float32(2**13 + 1), "split")
    for node in model.graph.node:
        for index, name in enumerate(node.input if node.op_type == "MatMul" else ()):
            rounded = f"{node.output[0]}.{index}"  # Veltkamp's splitting: x (2^13 + 1) - (x (2^13 + 1) - x)
            nodes += [
                onnx.helper.make_node("Mul", [name, "split"], [f"{rounded}.scaled"]),
                onnx.helper.make_node("Sub", [f"{rounded}.scaled", name], [f"{rounded}.low"]),
                onnx.helper.make_node("Sub", [f"{rounded}.scaled", f"{rounded}.low"], [rounded]),
            ]
            node.input[index] = rounded
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(split)
    onnx.save(model, str(copy / "match.onnx"))
    sign(copy, "match.onnx")
    done = ditf("check", copy)
    assert done.returncode == 1
    assert "match_graph_agrees" in done.stderr


def test_an_output_that_is_a_thousandth_too_large(ditf, copy, tmp_path):
    """Which float16's own rounding nearly hides from every other metric."""
    from tests.cli.test_check_where import edit_weight

    for part in ("weight", "bias"):
        edit_weight(copy, f"trunk.output_norm.{part}", lambda values: np.multiply(values, 1.001, out=values))
    done = ditf("check", copy, "--json", "check.json")
    assert done.returncode == 1
    report = json.loads((tmp_path / "check.json").read_text())
    failed = {gate["name"] for gate in report["gates"] if not gate["ok"]}
    assert {"scale_error", "file_error"} <= failed
    assert "scale_error 0.001" in done.stderr


def test_two_parities_where_the_encoder_is_another(ditf, swapped_bundle, tmp_path):
    """The graph's is gated; the choice's is shown, and gated where a limit is named."""
    done = ditf("check", swapped_bundle, "--json", "check.json")
    assert done.returncode == 0, done.stderr
    assert "whole_*: against the model with its own VAE; this bundle encodes by" in done.stdout
    assert "(AutoencoderTiny); x_0 off by 0." in done.stdout
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["vae"]["class"] == "AutoencoderTiny"
    metrics = report["metrics"]
    assert metrics["cosine_mean"] > 0.999 > metrics["whole_cosine_mean"] > 0.5
    assert not any(gate["name"].startswith("whole_") for gate in report["gates"])
    passing = f"whole_cosine_mean={metrics['whole_cosine_mean'] - 0.01}"
    limits = ("--limit", passing, "--limit", "whole_relative_error=0.0001", "--limit", "cosine_min=0.5")
    done = ditf("check", swapped_bundle, *limits, "--json", "check.json")
    assert done.returncode == 1
    assert "misses --limit: whole_relative_error" in done.stderr
    assert "export it again" not in done.stderr  # the graph is right
    gates = {gate["name"]: gate for gate in json.loads((tmp_path / "check.json").read_text())["gates"]}
    assert gates["whole_cosine_mean"]["ok"]
    assert gates["cosine_min"]["limit"] == 0.5
    shown = ditf("inspect", swapped_bundle)
    assert "(AutoencoderTiny); x_0 off by" in shown.stdout
    assert "VAE that --vae replaces" in shown.stdout


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("cosine_mean", "is not METRIC=VALUE"),
        ("cosine_mean=high", "is not METRIC=VALUE"),
        ("cosine_mean=nan", "is not METRIC=VALUE"),
        ("speed=1", "'speed' is not measured; choose cosine_mean, "),
        ("whole_cosine_mean=0.9", "this bundle has its model's own encoder and all its text"),
    ],
)
def test_limits_that_are_none(ditf, demo_bundle, limit, message):
    done = ditf("check", demo_bundle, "--limit", limit, "--quiet")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"size": [128, 128]}, "golden.npz does not fit the bundle"),
        ({"batch": 3}, "manifest says otherwise"),
        ({"batch": "dynamic"}, "manifest says otherwise"),
    ],
)
def test_a_manifest_of_another_graph(ditf, copy, change, problem):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, **change}))
    done = ditf("check", copy, "--quiet")
    assert done.returncode == 2
    assert problem in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_truncated_file(ditf, copy):
    path = copy / "features.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])
    done = ditf("check", copy)
    assert done.returncode == 2
    assert "truncated" in done.stderr


def test_a_newer_schema(ditf, copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "schema": 2}))
    done = ditf("check", copy)
    assert done.returncode == 2
    assert "pip install --upgrade ditf" in done.stderr


@pytest.mark.parametrize(("backend", "code"), [("onnxruntime", 0), ("tensorrt", 3), ("coreml", 2)])
def test_backends_by_name(ditf, demo_bundle, backend, code):
    done = ditf("check", demo_bundle, "--backend", backend, "--quiet")
    assert done.returncode == code
    assert done.stderr.count("\n") == (code != 0)
