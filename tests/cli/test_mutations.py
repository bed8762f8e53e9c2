"""Small changes of a written graph: `ditf check` finds them on ONNX Runtime, or they cost no match.

The changes are those that a wrong export would make: heads that are swapped, columns, scales and noise that
are a little off. They are made in the initializers of a copy of a bundle, whose hashes are then written anew.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import numpy as np
import onnx
import pytest

import ditf
from ditf.calib.golden_parity import golden_result
from ditf.calib.parity import ONNXRUNTIME_CPU, gates, limits_on
from ditf.cli.support.check_where import Findings, check_overflow
from ditf.runtime.bundles.golden_file import read_golden
from tests.cli.test_check import sign

HEADS = {"demo": 4, "pixart": 3}
LINEARS = ("attention.project.linear", "attention.out.linear", "feed_forward.up", "feed_forward_out.linear")
BLOCKS = {"demo": (0, 4), "pixart": (0, 1)}


class Written:
    """A copy of a bundle whose initializers can be replaced."""

    def __init__(self, bundle, folder):
        self.folder = shutil.copytree(bundle, folder)
        self._graph = (folder / "features.onnx").read_bytes()
        self._data = (folder / "features.onnx.data").read_bytes()
        self._noise = folder / "noise.npy"
        self.baked = not self._noise.exists()
        if not self.baked:
            self._noise_values = np.load(self._noise)
        self._model = onnx.load_from_string(self._graph)
        onnx.load_external_data_for_model(self._model, str(folder))
        self._tensors = {one.name: one for one in self._model.graph.initializer}

    def values(self, name):
        return onnx.numpy_helper.to_array(self._tensors[name]).copy()

    def write(self, changes):
        """Write the graph with some initializers replaced: {name: values}, or None to restore it."""
        model = onnx.load_from_string(self._graph)
        data = bytearray(self._data)
        for entry in model.graph.initializer:
            if entry.name not in changes:
                continue
            dtype = onnx.helper.tensor_dtype_to_np_dtype(entry.data_type)
            content = changes[entry.name].astype(dtype).tobytes()
            where = {e.key: e.value for e in entry.external_data}
            if where:
                data[int(where["offset"]) : int(where["offset"]) + int(where["length"])] = content
            else:
                entry.raw_data = content
        (self.folder / "features.onnx").write_bytes(model.SerializeToString())
        (self.folder / "features.onnx.data").write_bytes(data)
        for name in ("features.onnx", "features.onnx.data"):
            sign(self.folder, name)
        if not self.baked:
            np.save(self._noise, changes.get("noise.npy", self._noise_values))
            sign(self.folder, "noise.npy")

    def check(self):
        """The names of the gates that fail, and the parity metrics."""
        with ditf.load(self.folder, "onnxruntime") as model:
            golden = read_golden(model.bundle)
            metrics = golden_result(golden, model.run, model.conditions).metrics
            found = gates(metrics, limits_on(ONNXRUNTIME_CPU, model.manifest))
            failed = [gate.name for gate in found if not gate.ok]
            findings = Findings()
            if not failed and model.manifest.precision == "float16":
                check_overflow(model.bundle, golden, True, findings)
        return failed + [gate["name"] for gate in findings.gates if not gate["ok"]], metrics

    @property
    def noise_name(self):
        """The initializer of the scaled noise; PyTorch folds noise and its level into one constant."""
        return next(n for n, t in self._tensors.items() if n == "noise" or (len(t.dims) == 4 and "mul" in n))


def mutations(written, model, column) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(name, initializers) of every mutation."""
    for block in BLOCKS[model]:
        name = f"trunk.blocks.{block}.attention.project"
        weight, bias = written.values(f"{name}.linear.weight"), written.values(f"{name}.query_bias")
        size = weight.shape[1] // 3 // HEADS[model]
        order = np.arange(weight.shape[1])
        order[: 2 * size] = np.roll(order[: 2 * size], size)
        bias[:, :2] = np.roll(bias[:, :2], 1, axis=1)
        swapped = {f"{name}.linear.weight": weight[:, order], f"{name}.query_bias": bias}
        yield f"two query heads of block {block} swapped", swapped
        for linear in LINEARS:
            name = f"trunk.blocks.{block}.{linear}.weight"
            weight = written.values(name).astype(np.float32)
            changed = weight.copy()
            changed[:, 5] *= column
            yield f"a column of {block}.{linear} x {column}", {name: changed}
            changed = weight.copy()
            changed.reshape(-1)[changed.size // 2] *= 16
            yield f"a weight of {block}.{linear} x 16", {name: changed}
    scale = np.float32(1.001)
    norm = [f"trunk.output_norm.{part}" for part in ("weight", "bias")]
    yield "output x 1.001", {name: written.values(name) * scale for name in norm}
    if written.baked:
        yield "noise x 1.001", {written.noise_name: written.values(written.noise_name) * scale}
    else:
        yield "noise x 1.001", {"noise.npy": np.load(written.folder / "noise.npy") * scale}
    if model == "pixart":
        conv = [f"encoder.quant_conv.{part}" for part in ("weight", "bias")]
        yield "VAE scale x 1.01", {name: written.values(name) * np.float32(1.01) for name in conv}


@pytest.fixture(scope="module")
def pixart_float32(tiny_pixart, tmp_path_factory):
    from ditf.export.exporter import export_bundle
    from ditf.export.planning.export_options import ExportOptions

    output = tmp_path_factory.mktemp("pixart") / "fp32"
    return export_bundle(ExportOptions(model=str(tiny_pixart), layer="2", size=(48, 80), output=output))


BELOW_ROUNDING = {
    "demo_bundle": {
        "a column of 0.attention.out.linear x 1.2",
        "a weight of 0.attention.out.linear x 16",  # it no longer multiplies the value's bias
        "a weight of 4.feed_forward_out.linear x 16",
    },
    "demo_bundle_float32": {"a column of 0.attention.out.linear x 1.02"},
}
"""Mutations that change the features by less than 1e-5, or in the float32 graph by less than its rounding."""


@pytest.mark.parametrize(
    ("model", "fixture", "column"),
    [
        ("demo", "demo_bundle", 1.2),
        ("demo", "demo_bundle_float32", 1.02),
        ("pixart", "pixart_bundle", 1.2),
        ("pixart", "pixart_float32", 1.02),
    ],
)
def test_a_mutation_is_found_or_costs_no_match(request, tmp_path, model, fixture, column):
    written = Written(request.getfixturevalue(fixture), tmp_path / "bundle")
    assert written.check()[0] == []
    missed = {}
    for name, changes in mutations(written, model, column):
        written.write(changes)
        failed, metrics = written.check()
        if not failed:
            missed[name] = metrics
    assert set(missed) <= BELOW_ROUNDING.get(fixture, set())
    for name, metrics in missed.items():
        assert metrics["matches_within_1px"] == 1, name
        assert metrics["match_displacement"] == 0, name
