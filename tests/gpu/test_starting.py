"""CUDA graphs, kernels that are kept between processes, and commands, on a GPU and on the stand-in."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import ditf
from ditf.calib.images import procedural_images
from ditf.runtime.backends.cuda import Cuda
from tests.gpu.conftest import FULL, GPU
from tests.processes import started

RTX = pytest.mark.parametrize("machine", ["standin-rtx", GPU], indirect=True)
KILLED = """
import os, signal, sys
import numpy as np
import ditf
model = ditf.load(sys.argv[1], sys.argv[2])
features = model.features(np.zeros((48, 64, 3), np.uint8))
model.match(features, features, [(1, 1)])
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def child(machine, request):
    """The environment of child processes that run on the same machine."""
    if machine.world is not None:
        request.getfixturevalue("standin_environment")(full=FULL if machine.backend == "tensorrt" else None)
    return dict(os.environ)


@pytest.fixture
def images(tmp_path):
    """Two image files."""
    made = []
    for index, pixels in enumerate(procedural_images((48, 64), 2)):
        made.append(tmp_path / f"{index}.png")
        Image.fromarray(pixels).save(made[-1])
    return made


def use(model):
    features = model.features(procedural_images((120, 160), 1)[0])
    model.match(features, features, [(10, 10)])


def kernels(needed):
    """The files of kernels of this test's cache."""
    if not needed:
        return {}
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "ditf" / "kernels"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.cache"))}


def test_runs_are_captured(machine, built, demo_bundle, monkeypatch, caplog):
    """From the second run at one shape on. TensorRT-RTX captures itself; only the stand-in counts that."""
    called = Counter()
    real = Cuda.__call__

    def counted(self, name, *arguments):
        called[name] += 1
        return real(self, name, *arguments)

    monkeypatch.setattr(Cuda, "__call__", counted)
    with caplog.at_level(logging.WARNING), ditf.load(built(demo_bundle), machine.backend) as model:
        for _ in range(5):
            use(model)
    assert "without a CUDA graph" not in caplog.text
    if machine.backend == "tensorrt":
        assert called["cudaGraphInstantiate"] == 2  # features and match
        assert called["cudaGraphLaunch"] == 2 * 4
    else:
        assert called["cudaStreamBeginCapture"] == 0
    if machine.name == "standin-rtx":
        assert machine.world.own_graphs["captured"] == 2
        assert machine.world.own_graphs["replayed"] >= 2 * 2


@RTX
def test_the_second_start_compiles_nothing(machine, built, demo_bundle):
    if machine.backend != "tensorrt-rtx":
        pytest.skip("TensorRT compiles when it builds")
    for start in range(2):
        with ditf.load(built(demo_bundle), machine.backend) as model:
            for _ in range(3):
                use(model)
        if start == 0:
            found = kernels(True)
            compiled = None if machine.world is None else machine.world.compilations.total()
    assert len(found) == 2  # of features.plan and match.plan
    assert kernels(True) == found
    assert machine.world is None or machine.world.compilations.total() == compiled


def test_a_killed_process_leaves_its_kernels(machine, built, demo_bundle, child):
    path = built(demo_bundle)
    done = subprocess.run([sys.executable, "-c", KILLED, path, machine.backend], env=child, text=True,
                          stderr=subprocess.PIPE, check=False)  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    needed = machine.backend == "tensorrt-rtx"
    assert len(kernels(needed)) == 2 * needed
    with ditf.load(path, machine.backend) as model:
        use(model)


def test_commands(ditf, machine, built, demo_bundle, images, tmp_path):
    path, backend = built(demo_bundle), ("--backend", machine.backend)
    for command in (
        ("match", path, *images, "--points", "5,7", *backend, "--json", tmp_path / "found.json"),
        ("track", path, *images, "--points", "5,7", *backend, "--json", tmp_path / "found.json"),
        ("features", path, images[0], "-o", tmp_path / "features.npz", *backend),
    ):
        done = ditf(*command)
        assert done.returncode == 0, done.stderr
        assert machine.backend in done.stderr + done.stdout
        assert "without a CUDA graph" not in done.stderr


def test_the_server_starts(machine, built, demo_bundle, child):
    process = started(
        [sys.executable, "-m", "ditf", "serve", str(built(demo_bundle)), "--port", "0", "--backend",
         machine.backend],
        stdout=subprocess.PIPE, env=child,
    )  # fmt: skip
    try:
        address = process.stdout.readline().split()
        assert address, process.communicate(timeout=60)[1]
        with urllib.request.urlopen(f"{address[0]}/v2/health/ready", timeout=30) as answer:
            assert answer.status == 200
    finally:
        process.send_signal(signal.SIGTERM)
        messages = process.communicate(timeout=60)[1]
    assert process.returncode == 0, messages
    assert "Traceback" not in messages
    assert machine.backend in messages
