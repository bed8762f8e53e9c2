"""`ditf check --ranges --ladder --bisect --plot`: what is broken on purpose is found and named."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import onnx
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from ditf.calib.recipe import Recipe
from tests.checkpoints import save_untrained
from tests.cli.test_check import sign


@pytest.fixture
def copied(request, tmp_path):
    def copy(fixture):
        return shutil.copytree(request.getfixturevalue(fixture), tmp_path / "bundle")

    return copy


def edit_weight(bundle, tensor, change):
    """Change a weight in the file, and sign for it."""
    model = onnx.load(str(bundle / "features.onnx"), load_external_data=False)
    [entry] = [t for t in model.graph.initializer if t.name == tensor]
    where = {e.key: e.value for e in entry.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(entry.data_type)
    data = bytearray((bundle / "features.onnx.data").read_bytes())
    offset, length = int(where["offset"]), int(where["length"])
    values = np.frombuffer(bytes(data[offset : offset + length]), dtype).reshape(entry.dims).copy()
    change(values)
    data[offset : offset + length] = values.tobytes()
    (bundle / "features.onnx.data").write_bytes(data)
    sign(bundle, "features.onnx.data")


def one_output(values):
    """The weights of one output channel."""
    values[:, 5] = np.resize([0.5, -0.5], len(values))


def forgotten_scale(values):
    """1 + scale without the 1."""
    values -= 1


BLOCKS = "trunk.blocks"
MIDDLE = "encoder.encoder.mid_block.resnets"
BROKEN = [
    ("demo_bundle", f"{BLOCKS}.4.feed_forward.up.weight", one_output, "block 4", "feed_forward.up/MatMul"),
    ("demo_bundle", f"{BLOCKS}.8.attention.out.linear.weight", one_output, "block 8", "out.linear/MatMul"),
    ("demo_bundle", f"{BLOCKS}.2.norm_feed_forward.weight", forgotten_scale, "block 2", "forward/LayerN"),
    ("demo_bundle", "trunk.output_norm.weight", forgotten_scale, "after block 8: discard", "norm/LayerN"),
    ("demo_bundle", "trunk.embedder.position", forgotten_scale, "before block 0", "hidden_states.0"),
    ("bank_bundle", "trunk.doubles.1.project.linear.weight", one_output, "block 1", "project.linear/MatMul"),
    (
        "bank_bundle",
        "trunk.singles.0.out.linear.weight",
        one_output,
        "block 2",
        "singles.0.out.linear/MatMul",
    ),
    ("pixart_bundle", f"{MIDDLE}.0.conv1.weight", forgotten_scale, "before block 0", "0.conv1/Conv"),
]


@pytest.mark.parametrize(("fixture", "tensor", "change", "place", "value"), BROKEN)
def test_what_was_broken_is_named(ditf, copied, tmp_path, fixture, tensor, change, place, value):
    bundle = copied(fixture)
    edit_weight(bundle, tensor, change)
    done = ditf("check", bundle, "--ladder", "--json", "ladder.json")
    assert done.returncode == 1
    assert "the first rung out of tolerance is features.onnx, float32 arithmetic" in done.stderr
    done = ditf("check", bundle, "--bisect", "--json", "bisect.json")
    assert done.returncode == 1, done.stdout
    assert f"off in {place}" in done.stderr
    found = json.loads((tmp_path / "bisect.json").read_text())["bisect"]
    assert value in found["value"]["name"]
    assert done.stderr.count("error:") == 1


def test_good_bundles(ditf, demo_bundle, demo_bundle_float32, pixart_bundle, live_bundle, tmp_path):
    for bundle in (demo_bundle, demo_bundle_float32, pixart_bundle, live_bundle):
        done = ditf("check", bundle, "--ranges", "--ladder", "--bisect", "--json", "check.json")
        assert done.returncode == 0, done.stderr
        report = json.loads((tmp_path / "check.json").read_text())
        assert report["ok"] is True
        assert report["ladder"]["first_off"] is None
        assert report["bisect"]["place"] == ""
        assert bool(report["ranges"]) == (report["precision"] == "float16")
        assert all(one["headroom"] > 1 for one in report["ranges"])


def test_a_bfloat16_bundle_on_a_cpu(ditf, bfloat16_bundle):
    """No kernel runs it here; its twin does."""
    done = ditf("check", bfloat16_bundle, "--ladder", "--bisect", "--ranges")
    assert done.returncode == 0, done.stderr
    assert re.search(r"not run: .*ONNX Runtime .* has no kernel on CPUExecutionProvider", done.stdout)
    assert "features.onnx, bfloat16 arithmetic" in done.stdout


def test_overflow_that_onnx_runtime_hides_is_found(ditf, tmp_path, monkeypatch):
    """Exported with neither recipe nor emulation: parity on a CPU cannot tell, everything else can."""
    monkeypatch.setattr("ditf.export.exporter.choose_recipe", lambda extents: Recipe())
    monkeypatch.setattr(
        "ditf.export.exporter.check_against_golden",
        lambda *args: {"relative_error": 1e-3, "channel_error": 3e-3, "scale_error": 1e-4},
    )
    save_untrained(tmp_path / "demo")
    overflowing_logits(tmp_path / "demo" / "transformer" / "diffusion_pytorch_model.safetensors")
    options = ("--layer", "2", "--fp16", "--size", "64x64", "-o", "b")
    assert ditf("export", "--model", "demo/", *options).returncode == 0
    done = ditf("check", "b", "--json", "check.json")
    assert done.returncode == 1
    assert "FAILED" not in done.stdout
    assert "trunk.blocks.0.attention/MatMul reaches" in done.stderr
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["overflow"]["tested"]
    assert [gate["name"] for gate in report["gates"] if not gate["ok"]] == ["headroom"]
    monkeypatch.setattr("ditf.cli.support.check_where.available_bytes", lambda: 10**5)
    done = ditf("check", "b", "--json", "check.json")
    assert done.returncode == 0
    assert "overflow was not tested, and ONNX Runtime on a CPU hides it: it takes" in done.stdout
    assert not json.loads((tmp_path / "check.json").read_text())["overflow"]["tested"]
    done = ditf("check", "b", "--ranges")
    assert done.returncode == 1
    assert "trunk.blocks.0.attention/MatMul reaches" in done.stderr
    assert "which float16 cannot hold" in done.stderr
    done = ditf("check", "b", "--ladder")
    assert done.returncode == 1
    assert "the first rung out of tolerance is features.onnx, float16 arithmetic" in done.stderr
    done = ditf("check", "b", "--bisect")
    assert "off in block 0: trunk.blocks.0.attention/MatMul by" in done.stderr


def overflowing_logits(path):
    """Parameters, queries and keys that float16 holds, and products that it does not.

    One channel of the keys is the same for all of them: it moves a query's logits together, which the softmax
    does not see. It reads a channel of the norm that is shifted and scaled to be 1.
    """
    tensors = load_file(path)
    modulation = "transformer_blocks.0.norm1.linear"
    channels = tensors[f"{modulation}.weight"].shape[1]
    for row, value in ((7, 1.0), (channels + 7, -1.0)):  # shift; 1 + scale = 0
        tensors[f"{modulation}.weight"][row] = 0
        tensors[f"{modulation}.bias"][row] = value
    tensors["transformer_blocks.0.attn1.to_k.weight"][3] = 0
    tensors["transformer_blocks.0.attn1.to_k.weight"][3, 7] = 6e4
    tensors["transformer_blocks.0.attn1.to_q.weight"][3] *= 20
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("broken", [False, True])
def test_the_picture(ditf, copied, tmp_path, broken):
    bundle = copied("demo_bundle")
    if broken:
        edit_weight(bundle, "trunk.blocks.4.feed_forward.up.weight", lambda values: values.fill(np.nan))
    done = ditf("check", bundle, "--plot", "check.png")
    assert done.returncode == broken
    with Image.open(tmp_path / "check.png") as picture:
        assert picture.size[0] > 1000


def test_bundles_from_before(ditf, copied):
    bundle = copied("demo_bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["files"]["trace.npz"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    done = ditf("check", bundle, "--bisect")
    assert done.returncode == 2
    assert "has no trace.npz; export it again with this version" in done.stderr


def test_a_picture_of_another_kind(ditf, demo_bundle):
    done = ditf("check", demo_bundle, "--plot", "check.gif")
    assert done.returncode == 2
    assert "is no PNG, SVG or PDF" in done.stderr


def test_a_trace_that_no_export_wrote(ditf, copied):
    bundle = copied("demo_bundle")
    np.savez(bundle / "trace.npz", names=np.array(["a"]))
    sign(bundle, "trace.npz")
    done = ditf("check", bundle, "--bisect")
    assert done.returncode == 2
    assert "trace.npz and golden.npz do not fit together" in done.stderr
