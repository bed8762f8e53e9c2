"""docs/triton.md: its commands run, its files are what Docker and Kubernetes take, its client is answered."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

import ditf as package
from ditf.calib.images import golden_pair
from tests.triton_server import Server

DEVICE_PORTS = {8000, 8001, 8002}  # HTTP, gRPC and metrics, of tritonserver by default


@pytest.fixture(scope="module")
def text(root):
    return (root / "docs" / "triton.md").read_text("utf-8")


def blocks(text, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_commands(ditf, text, demo_bundle, tmp_path):
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "demo-l9-fp16").symlink_to(demo_bundle)
    commands = [line for block in blocks(text, "sh") for line in block.splitlines()]
    assert len(commands) == 3
    for command in commands:
        done = ditf(*shlex.split(command)[1:], "-q")
        assert done.returncode == 0, (command, done.stderr)


def test_compose(text):
    document = yaml.safe_load(next(b for b in blocks(text, "yaml") if "compose" in b))
    service = document["services"]["triton"]
    published = {int(port.rpartition(":")[2]) for port in service["ports"]}
    assert published == DEVICE_PORTS
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    mounted = [volume.split(":")[1] for volume in service["volumes"]]
    assert f"--model-repository={mounted[0]}" in service["command"]


def test_kubernetes(text):
    listed = list(yaml.safe_load_all(next(b for b in blocks(text, "yaml") if "apiVersion" in b)))
    deployment, service = listed
    assert [one["kind"] for one in listed] == ["Deployment", "Service"]
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    pod = template["spec"]
    [container] = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert set(ports.values()) == DEVICE_PORTS
    assert {port["targetPort"] for port in service["spec"]["ports"]} < ports.keys()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] in ports
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert f"--model-repository={mounts['models']}" in container["args"]
    drains = int(next(a for a in container["args"] if "exit-timeout" in a).rpartition("=")[2])
    assert pod["terminationGracePeriodSeconds"] > drains


def test_the_client_of_ditf_serve(root, demo_bundle, tmp_path):
    """The script unmodified, in a process of its own, against the server in another."""
    if importlib.util.find_spec("ditf.cli.serve") is None:
        pytest.skip("this ditf has no serve")
    for name, array in zip(("left.png", "right.png"), golden_pair((60, 80)), strict=True):
        Image.fromarray(array).save(tmp_path / name)
    command = [sys.executable, "-m", "ditf", "serve", str(demo_bundle), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path
    ) as server:
        try:
            url = re.search(r"127\.0\.0\.1:\d+", server.stdout.readline())[0]
            script = [sys.executable, str(root / "docs" / "triton_client.py"), "left.png", "right.png"]
            asked = ["--points", "12,8", "30.5,25", "--url", url, "--bundle", "demo-l9-fp16"]
            done = subprocess.run([*script, *asked], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        finally:
            server.terminate()
            server.wait(30)
    assert done.returncode == 0, done.stderr
    with package.load(demo_bundle) as model:
        maps = model.features_of([tmp_path / "left.png", tmp_path / "right.png"])
        expected = model.match(*maps, [[12, 8], [30.5, 25]])
    found = json.loads(done.stdout)
    assert found["matches"] == expected.points.tolist()
    assert found["scores"] == pytest.approx(expected.scores.tolist(), abs=1e-6)


def test_the_client_asks_what_the_repository_takes(ditf, root, demo_bundle, tmp_path):
    """Its tensors, as they would be sent, given to the repository's models."""
    spec = importlib.util.spec_from_file_location("triton_client", root / "docs" / "triton_client.py")
    client = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)
    assert ditf("export-triton", demo_bundle, "--repository", "models", "--name", "cat").returncode == 0
    server = Server(tmp_path / "models")

    class Wire:
        """Where HTTP would be: each tensor's announced type, shape and bytes, and nothing else."""

        def infer(self, name, inputs, headers, parameters):
            types = {"UINT8": np.uint8, "FP32": np.float32}
            arrays = {
                one.name(): np.frombuffer(one._get_binary_data(), types[one.datatype()]).reshape(one.shape())
                for one in inputs
            }
            results = server.infer(name, arrays, parameters)
            return type("Answer", (), {"as_numpy": staticmethod(results.get)})

    source, target = golden_pair((60, 80))
    points = np.array([[12, 8]], np.float32)
    matches, scores = client.correspond(Wire(), "cat", source, target, points)
    with package.load(demo_bundle) as model:
        expected = model.match_with_graph(*model.features_of([source, target]), points)
    np.testing.assert_array_equal(matches, expected.points)
    np.testing.assert_array_equal(scores, expected.scores)
