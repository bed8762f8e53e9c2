from __future__ import annotations

import contextlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditf.runtime.bundles.manifest import MANIFEST, SCHEMA, Manifest, read_manifest, tool_versions
from ditf.runtime.errors import BundleError

# Bundles of earlier versions have none.
OPTIONAL = ("conditions", "guidance", "text_tokens", "removed", "features_dtype", "pca", "vae", "measured")
VAE_X_0 = {"relative_error": 0.1, "correlation_min": 0.9}
FIELDS = [field.name for field in fields(Manifest) if field.name not in OPTIONAL]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def write(folder: Path, document: Any) -> Path:
    text = document if isinstance(document, str) else json.dumps(document)
    (folder / MANIFEST).write_text(text, "utf-8")
    return folder


@pytest.fixture(scope="module")
def document(demo_bundle) -> dict[str, Any]:
    return json.loads((demo_bundle / MANIFEST).read_text("utf-8"))


def test_round_trip(demo_bundle, tmp_path):
    manifest = read_manifest(demo_bundle)
    assert read_manifest(write(tmp_path, manifest.to_json())) == manifest
    assert manifest.to_json() == (demo_bundle / MANIFEST).read_text("utf-8")
    assert manifest.size == (96, 96)
    assert isinstance(manifest.grid, tuple)


def test_dynamic_batch_and_noise_input(pixart_bundle):
    manifest = read_manifest(pixart_bundle)
    assert (manifest.batch, manifest.noise) == ("dynamic", "input")


def test_unknown_fields_are_ignored(document, tmp_path):
    assert read_manifest(write(tmp_path, {**document, "later": [1]})).layer == document["layer"]


@pytest.mark.parametrize("name", FIELDS)
def test_missing_field_is_named(document, tmp_path, name):
    rest = {key: value for key, value in document.items() if key != name}
    with pytest.raises(BundleError, match="not a ditf manifest" if name == "schema" else name) as caught:
        read_manifest(write(tmp_path, rest))
    assert "export the bundle again" in caught.value.fix


def test_fields_that_earlier_bundles_lack(document, tmp_path):
    rest = {key: value for key, value in document.items() if key not in OPTIONAL}
    assert read_manifest(write(tmp_path, rest)).conditions == []
    with pytest.raises(BundleError, match="conditions are missing"):
        read_manifest(write(tmp_path, {**rest, "conditioning": "bank"}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("schema", "1"),
        ("schema", None),
        ("schema", True),
        ("model", "demo"),
        ("model", {"id": 3}),
        ("layer", "9"),
        ("layer", 9.0),
        ("timestep", None),
        ("prompt", 5),
        ("class_label", "cat"),
        ("ensemble", True),
        ("noise", "fresh"),
        ("noise", ["baked"]),
        ("size", 256),
        ("size", [256]),
        ("size", [256, 256, 3]),
        ("size", ["256", "256"]),
        ("grid", None),
        ("batch", "static"),
        ("batch", 1.5),
        ("adaln", 1),
        ("discard", [5, 41]),
        ("precision", "int4"),
        ("parts", {"vae": {"float16": 3}}),
        ("tolerances", {"cosine_min": "0.98"}),
        ("tolerances", {"cosine_min": True}),
        ("versions", {"torch": None}),
        ("files", []),
        ("files", {"features.onnx": "abc"}),
    ],
)
def test_mistyped_field_is_named(document, tmp_path, name, value):
    with pytest.raises(BundleError, match="manifest" if name == "schema" else name):
        read_manifest(write(tmp_path, {**document, name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", [0, 256]),
        ("size", [-256, 256]),
        ("grid", [32, 0]),
        ("batch", 0),
        ("batch", -1),
        ("files", {"features.onnx": {}}),
        ("files", {"features.onnx": {"bytes": 10}}),
        ("files", {"features.onnx": {"bytes": "10", "sha256": 3}}),
        ("vae", {}),
        ("vae", {"id": "a", "class": "b", "x_0": {"relative_error": 0.1}}),
        ("vae", {"id": "a", "class": "b", "revision": 3, "x_0": VAE_X_0}),
        ("vae", {"id": 1, "class": "b", "x_0": VAE_X_0}),
    ],
)
def test_impossible_value_is_named(document, tmp_path, name, value):
    # Well typed by JSON's measure, but nothing that a bundle can have.
    with pytest.raises(BundleError, match=name):
        read_manifest(write(tmp_path, {**document, name: value}))


@pytest.mark.parametrize("rest", [{}, {"anything": "else"}], ids=["alone", "with-unknown-fields"])
def test_newer_schema(tmp_path, rest):
    with pytest.raises(BundleError, match=f"schema {SCHEMA + 1}, this ditf reads up to {SCHEMA}") as caught:
        read_manifest(write(tmp_path, {"schema": SCHEMA + 1, **rest}))
    assert "pip install --upgrade" in caught.value.fix


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", '"schema"', "{}", '{"schema": NaN}'])
def test_other_text_is_refused(tmp_path, text):
    with pytest.raises(BundleError, match=MANIFEST) as caught:
        read_manifest(write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"\xff\xfe{}", b"\x00", b"\x80"])
def test_other_bytes_are_refused(tmp_path, data):
    (tmp_path / MANIFEST).write_bytes(data)
    with pytest.raises(BundleError, match="cannot be read"):
        read_manifest(tmp_path)


def test_nested_without_end_is_refused(tmp_path):
    with pytest.raises(BundleError):
        read_manifest(write(tmp_path, "[" * 100_000 + "]" * 100_000))


def test_no_manifest(tmp_path):
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(BundleError, match="is not a bundle"):
            read_manifest(place)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(value=json_values)
def test_random_json_is_a_bundle_error(tmp_path_factory, value):
    with pytest.raises(BundleError):
        read_manifest(write(tmp_path_factory.getbasetemp(), value))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(name=st.sampled_from(FIELDS), value=json_values)
def test_random_field_is_read_or_a_bundle_error(tmp_path_factory, document, name, value):
    folder = write(tmp_path_factory.getbasetemp(), {**document, name: value})
    with contextlib.suppress(BundleError):
        assert isinstance(read_manifest(folder), Manifest)


def test_tool_versions():
    found = tool_versions("numpy", "no-such-package")
    assert list(found) == ["python", "numpy"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", {}),
        ("model", {"id": 3, "family": "dit"}),
        ("discard", {}),
        ("discard", {"channels": [-1], "stage": "before", "source": "auto"}),
        ("recipe", {"float32": {"norm": -1}}),
        ("recipe", {"float32": {"norm": {}}}),
        ("recipe", {"float32": {}, "exceptions": [{"where": 1, "is": [], "why": {}}]}),
        ("recipe", {"float32": {}, "float32_products": 5}),
        ("removed", {"x": {}}),
        ("golden", {"conditions": -1}),
        ("golden", {"conditions": [7]}),
        ("parts", {"x": {"float16": {"parameters": 10**400, "bytes": 1}}}),
        ("pca", {"of": 1, "energy_held_out": 10**400, "matches_within_1px": 0.5}),
        ("seed", 10**19),
    ],
)
def test_values_that_no_export_writes(tmp_path, document, field, value):
    with pytest.raises(BundleError, match=r"is invalid|cannot be read \(a number of"):
        read_manifest(write(tmp_path, {**document, field: value}))
