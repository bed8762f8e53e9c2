"""`ditf export-triton`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests.triton_server import read_config


def test_a_repository(ditf, demo_bundle, tmp_path):
    done = ditf("export-triton", demo_bundle, "--repository", "models", "--json", "t.json")
    assert done.returncode == 0, done.stderr
    names = [f"demo-l9-fp16.{model}" for model in ("features", "match_graph", "match", "correspond")]
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == names
    assert "for ONNX Runtime (auto; " in done.stderr
    assert "has no tensorrt engine: it has none" in done.stderr
    report = json.loads((tmp_path / "t.json").read_text())
    assert [model["name"] for model in report["models"]] == names
    assert (report["ok"], report["tensorrt"], report["engines"], report["removed"]) == (True, None, [], [])
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == sorted(names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "t.json"]

    done = ditf("export-triton", demo_bundle, "--repository", "models", "--device", "cpu", "--instances", "3")
    assert "removed demo-l9-fp16.match_graph, which this bundle no longer has" in done.stdout
    config = read_config(tmp_path / "models" / "demo-l9-fp16.features")
    assert config.instance_group[0].count == 3
    done = ditf("export-triton", demo_bundle, "--repository", "models", "--name", "cat", "-q")
    assert done.returncode == 0
    assert done.stderr == ""
    assert len(list((tmp_path / "models").iterdir())) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "tensorrt"], "has no tensorrt engine: it has none; build one on the GPU"),
        (["--backend", "tensorrt-rtx"], "not one that Triton runs here"),
        (["--backend", "onnxruntime", "--target", "sm_87"], "leave out --target"),
        (["--backend", "tensorrt", "--device", "cpu"], "engines need TensorRT and a GPU"),
        (["--target", "sm_87"], "has no tensorrt engine for sm_87: it has none"),
        (["--target", "orin"], "no compute capability"),
        (["--device", "tpu"], "device 'tpu' is not cpu, cuda or cuda:N; choose "),
        (["--max-batch", "4"], "this bundle's batch is 1; export it with --batch dynamic"),
        (["--name", "a/b"], "cannot be in a model's name"),
        (["--instances", "0"], "--instances"),
        (["--json", "models/t.json"], "would overwrite"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(ditf, demo_bundle, tmp_path, arguments, message):
    done = ditf("export-triton", demo_bundle, "--repository", "models", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_places_that_are_no_repository(ditf, demo_bundle, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.pbtxt").write_text("")
    shutil.copytree(demo_bundle, tmp_path / "bundle")
    for place, message in (
        ("file", "file is a file"),
        ("theirs", "is a bundle or a model, not a repository"),
        ("bundle", "would overwrite"),
        ("bundle/models", "would overwrite"),
        ("/proc/models", "/proc"),
    ):
        done = ditf("export-triton", tmp_path / "bundle", "--repository", place)
        assert done.returncode == 2, place
        assert message in done.stderr, place
    done = ditf("export-triton", tmp_path / "theirs", "--repository", "models")
    assert "is not a bundle" in done.stderr


def test_a_batch_of_a_dynamic_bundle(ditf, bank_bundle, tmp_path):
    done = ditf("export-triton", bank_bundle, "--repository", "m", "--max-batch", "4", "--batch-delay", "2.5")
    assert done.returncode == 0, done.stderr
    listed = {line.split()[0] for line in done.stdout.splitlines()[1:]}
    assert listed == {
        f"flux-bank.{m}" for m in ("features", "features_graph", "match_graph", "match", "correspond")
    }
    parameters = read_config(tmp_path / "m" / "flux-bank.correspond").parameters
    assert parameters["ditf_largest_batch"].string_value == "4"


def test_a_killed_export_leaves_the_repository_alone(ditf, demo_bundle, tmp_path):
    """Killed as it copies: what was there is there, and the next one removes what is left."""
    assert ditf("export-triton", demo_bundle, "--repository", "models").returncode == 0
    before = sorted(path.stat().st_ino for path in (tmp_path / "models").rglob("*"))
    code = (
        "import os, signal, sys\n"
        "from ditf.cli.main import run\n"
        "from ditf.runtime.files.hashed import HashedFile\n"
        "copy = HashedFile.copy\n"
        "def killed(*arguments):\n"
        "    copy(*arguments)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "HashedFile.copy = killed\n"
        f"run(['export-triton', {str(demo_bundle)!r}, '--repository', 'models'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert sorted(path.stat().st_ino for path in (tmp_path / "models").rglob("*")) == before
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".models.partial-")]) == 1
    assert ditf("export-triton", demo_bundle, "--repository", "models").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_it_needs_neither_torch_nor_onnx_nor_protobuf(demo_bundle, tmp_path):
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxruntime', 'google.protobuf', 'tritonclient', 'tensorrt'):\n"
        "    sys.modules[name] = None\n"
        "from ditf.cli.main import run\n"
        f"sys.exit(run(['export-triton', {str(demo_bundle)!r}, '--repository', 'models', '-q']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
