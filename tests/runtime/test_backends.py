from __future__ import annotations

import sys

import numpy as np
import pytest

from ditf.runtime import backends
from ditf.runtime.bundle import FEATURES, MATCH
from ditf.runtime.errors import BundleError, InputError, MissingComponent


def test_auto_picks_onnxruntime_and_says_why():
    name, module, reason = backends.choose()
    assert name == "onnxruntime"
    assert module is backends.load_backend("onnxruntime")
    assert reason == "first available of onnxruntime"


def test_named_backend():
    name, module, reason = backends.choose("onnxruntime")
    assert (name, reason) == ("onnxruntime", "named")
    assert "CPUExecutionProvider" in module.probe().detail


@pytest.mark.parametrize("name", ["", "onnx", "ONNXRuntime", "cuda"])
def test_unknown_backend(name):
    with pytest.raises(InputError, match="unknown backend") as caught:
        backends.choose(name)
    assert caught.value.exit_code == 2
    assert "onnxruntime" in caught.value.fix


@pytest.mark.parametrize("name", backends.PLANNED)
def test_planned_backend(name):
    with pytest.raises(
        MissingComponent, match=f"{name} engines are built by this version of ditf, but not run"
    ) as caught:
        backends.choose(name)
    assert caught.value.exit_code == 3
    assert caught.value.fix == "use --backend onnxruntime"


@pytest.mark.parametrize("name", ["auto", "onnxruntime"])
def test_without_onnxruntime(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # what an import of a missing package meets
    with pytest.raises(MissingComponent, match="onnxruntime does not import") as caught:
        backends.choose(name)
    assert caught.value.exit_code == 3
    assert "pip install 'ditf[onnxruntime]'" in caught.value.fix


def test_open_session_without_onnxruntime(monkeypatch, demo_bundle):
    module = backends.load_backend("onnxruntime")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingComponent, match="pip install"):
        module.open_session(demo_bundle / MATCH)


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_session(name, demo_bundle):
    session = backends.load_backend(name).open_session(demo_bundle / MATCH)
    assert tuple(session.inputs) == ("source", "target", "point_rows", "point_columns", "rows", "columns")
    assert session.outputs == ("points", "scores")
    assert "onnxruntime" in session.detail
    session.close()
    with pytest.raises(RuntimeError, match="closed"):
        session.run({"source": np.zeros(1)})
    session.close()  # twice does no harm


@pytest.mark.parametrize("name", backends.BACKENDS)
@pytest.mark.parametrize("damage", ["random", "empty", "cut", "text", "missing", "weights missing"])
def test_corrupt_graph_is_refused(name, damage, demo_bundle, tmp_path):
    path = tmp_path / FEATURES
    whole = (demo_bundle / FEATURES).read_bytes()
    data = {
        "random": np.random.default_rng(0).bytes(5000),
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "text": b"version https://git-lfs.github.com/spec/v1\n",
        "weights missing": whole,
    }
    if damage in data:
        path.write_bytes(data[damage])
    with pytest.raises(BundleError, match="refuses") as caught:
        backends.load_backend(name).open_session(path)
    assert str(path) in caught.value.problem
    assert "\n" not in str(caught.value)
    assert "export" in caught.value.fix
