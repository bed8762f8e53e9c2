"""Blocks k.. are not read, traced or shipped: counted."""

from __future__ import annotations

import re

import onnx
import pytest
from safetensors import safe_open

from ditf.export.checkpoints.opening import open_checkpoint
from ditf.export.exporter import export_bundle
from ditf.export.families import family_of
from ditf.export.families.base import TrunkSpec
from ditf.export.graph.precision import FLOAT32
from ditf.export.planning.export_options import ExportOptions
from ditf.runtime.bundles.manifest import read_manifest
from tests.checkpoints import PIXART_WIDTH


@pytest.mark.parametrize("layer", [0, 2])
def test_only_the_modulation_of_block_k_is_read(tiny_pixart, layer):
    with open_checkpoint(str(tiny_pixart)) as checkpoint:
        family = family_of(checkpoint)
        weights = checkpoint.weights("transformer")
        spec = TrunkSpec(layer, (64, 64), (8, 8), 5, FLOAT32)
        family.conditioner(weights, spec)
        family.trunk(weights, spec, None)
    blocks = {name for name in weights.read if name.startswith("transformer_blocks.")}
    beyond = {name for name in blocks if int(name.split(".")[1]) >= layer}
    assert beyond == {f"transformer_blocks.{layer}.scale_shift_table"}
    assert not any(name.startswith(("proj_out", "scale_shift_table")) for name in weights.read)


@pytest.fixture(scope="module")
def two_blocks(tiny_pixart, tmp_path_factory):
    folder = tmp_path_factory.mktemp("truncation")
    return export_bundle(ExportOptions(model=str(tiny_pixart), layer="2", discard=(3,), output=folder / "b"))


def test_the_graph_holds_what_the_blocks_below_k_hold(two_blocks):
    model = onnx.load(str(two_blocks / "features.onnx"), load_external_data=False)
    names = [tensor.name for tensor in model.graph.initializer]
    numbers = {int(match[1]) for name in names if (match := re.search(r"trunk\.blocks\.(\d+)\.", name))}
    assert numbers == {0, 1}
    output_norm = [tensor for tensor in model.graph.initializer if "output_norm" in tensor.name]
    assert sorted(tuple(tensor.dims) for tensor in output_norm) == [(PIXART_WIDTH,)] * 2


def test_parameters_are_those_of_the_checkpoint(tiny_pixart, two_blocks):
    """Linear weights of blocks 0..k-1, less the text keys and values that became constants.

    The key's bias is dropped, and the value's is in the output's.
    """
    parts = read_manifest(two_blocks).parts
    expected = {"self-attention": 0, "feed-forward": 0}
    with safe_open(
        tiny_pixart / "transformer" / "diffusion_pytorch_model.safetensors", framework="pt"
    ) as file:
        for name in file.keys():  # noqa: SIM118  (safe_open is no dict)
            match = re.match(r"transformer_blocks\.[01]\.(attn1|ff)\.", name)
            if match and not re.search(r"attn1\.to_[kv]\.bias", name):
                part = {"attn1": "self-attention", "ff": "feed-forward"}[match[1]]
                expected[part] += file.get_tensor(name).numel()
    counted = {part: parts[part]["float32"]["parameters"] for part in expected}
    assert counted == expected


def test_initializers_are_the_manifests_parts(demo_bundle):
    model = onnx.load(str(demo_bundle / "features.onnx"), load_external_data=False)
    external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    listed = read_manifest(demo_bundle).parts
    total = sum(entry["bytes"] for by_type in listed.values() for entry in by_type.values())
    stored = sum(int(e.value) for t in external for e in t.external_data if e.key == "length")
    inline = sum(len(t.raw_data) for t in model.graph.initializer if t not in external)
    assert total <= stored + inline <= total + 4096  # shapes and scalars
