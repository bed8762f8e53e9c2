"""NVIDIA's parser and compiler take our graphs: TensorRT-RTX builds them, which needs no GPU."""

from __future__ import annotations

import onnx
import pytest

from ditf.runtime.bundles.manifest import read_manifest
from ditf.runtime.errors import BundleError, InputError
from tests.engines.rtx import build_engine, parsed_layers


def match_profile(bundle):
    h, w = read_manifest(bundle).grid
    return {
        "point_rows": ((1, h), (64, h), (1024, h)),
        "point_columns": ((1, w), (64, w), (1024, w)),
        "rows": ((1, h), (480, h), (2160, h)),
        "columns": ((1, w), (640, w), (3840, w)),
    }


def test_demo_features_for_any_gpu(demo_bundle):
    """For one GPU at a time: test_build.py."""
    assert len(build_engine(demo_bundle / "features.onnx", None).plan) > 1_000_000


def test_demo_features_float32(demo_bundle_float32):
    build_engine(demo_bundle_float32 / "features.onnx", "sm_89")


def test_pixart_features_with_vae_noise_input_and_dynamic_batch(pixart_bundle):
    height, width = read_manifest(pixart_bundle).size
    profile = {"image": tuple((n, height, width, 3) for n in (1, 4, 8))}
    build_engine(pixart_bundle / "features.onnx", "sm_89", profile)


@pytest.mark.parametrize("fixture", ["demo_bundle", "demo_bundle_float32", "pixart_bundle"])
def test_match(request, fixture):
    bundle = request.getfixturevalue(fixture)
    build_engine(bundle / "match.onnx", "sm_89", match_profile(bundle))


def test_the_parsed_network_is_typed_as_the_recipe_says(demo_bundle):
    by_kind: dict[str, set[str]] = {}
    for layer in parsed_layers(demo_bundle / "features.onnx"):
        by_kind.setdefault(layer.kind, set()).add(layer.dtype)
    assert by_kind["MATRIX_MULTIPLY"] == {"HALF"}
    assert by_kind["SOFTMAX"] == {"HALF"}
    assert by_kind["NORMALIZATION"] == {"FLOAT"}


def test_bfloat16_is_really_there(bfloat16_bundle):
    layers = build_engine(bfloat16_bundle / "features.onnx", "sm_89").layers
    kept = read_manifest(bfloat16_bundle).recipe["float32_products"]
    products = {one.dtype for one in layers if one.kind == "MATRIX_MULTIPLY" and one.name not in kept}
    assert products == {"BF16"}
    encoder = {one.dtype for one in layers if one.kind == "CONVOLUTION" and one.name.startswith("encoder")}
    assert encoder == {"BF16"}
    assert {layer.dtype for layer in layers if layer.kind == "NORMALIZATION"} == {"FLOAT"}


def test_a_graph_it_cannot_parse_is_refused_with_its_reason(tmp_path):
    node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"])
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, [1])], [value("y", 1, [1])])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "bad.onnx")
    with pytest.raises(BundleError, match=r"cannot parse bad\.onnx .*NoSuchOperator"):
        build_engine(tmp_path / "bad.onnx")


def test_a_graph_it_cannot_compile_is_refused(demo_bundle):
    with pytest.raises(BundleError, match=r"cannot compile match\.onnx"):
        build_engine(demo_bundle / "match.onnx", "sm_89")  # dynamic inputs, no profile


def test_an_unknown_target(demo_bundle):
    with pytest.raises(InputError, match="unknown target"):
        build_engine(demo_bundle / "match.onnx", "sm_1")
