"""`ditf serve` as a process: its address, its log, its key, its end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import requests

from tests.runtime.serving.http.test_gate import infer
from tests.runtime.serving.pictures import encoded
from tests.runtime.serving.tiny import image, mean_colours


class Server:
    """A running `ditf serve`."""

    def __init__(self, process):
        self.process = process
        self.url = process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), process.stderr.read()
        self.port = int(self.url.rpartition(":")[2])


@contextmanager
def serving(*arguments, ulimit="-S -c 0", **environment):
    """Ended by SIGKILL if it is still there."""
    command = [sys.executable, "-m", "ditf", "serve", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(
        ["sh", "-c", f'ulimit {ulimit}; exec "$@"', "sh", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        yield Server(process)
    finally:
        process.kill()
        process.communicate()


def test_serving_a_bundle_that_is_deleted_and_a_sigterm_under_load(tiny, tmp_path):
    """What was let in before the signal is answered rightly, what comes later is refused; exit code 0."""
    bundle = shutil.copytree(tiny, tmp_path / "mine")
    with serving(bundle, "--batch-delay", "0", "--max-batch", "1", "--cache", "0") as server:
        shutil.rmtree(bundle)
        pair = {"source": encoded(image(1)), "target": encoded(image(2))}
        found = requests.post(f"{server.url}/match", files=pair, data={"points": "3,5"}, timeout=20)
        assert found.status_code == 200, found.text
        outcomes = []

        def client(seed):
            try:
                while True:
                    status, features, _ = infer(server, image(seed, loops=2))
                    outcomes.append((seed, status, features))
                    if status != 200:
                        return
            except OSError:  # it no longer listens
                return

        with ThreadPoolExecutor(8) as pool:
            for seed in range(8):
                pool.submit(client, seed)
            while len(outcomes) < 8:
                time.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            out, err = server.process.communicate(timeout=30)
        assert server.process.returncode == 0, err
        assert out == ""
        assert {status for _, status, _ in outcomes} <= {200, 503}
        for seed, status, features in outcomes:
            if status == 200:
                np.testing.assert_allclose(features, mean_colours(image(seed, loops=2)), rtol=1e-5)
        lines = [json.loads(line) for line in err.splitlines()]
        assert (lines[0]["event"], lines[0]["bundle"]) == ("opened", str(bundle))
        assert (lines[-1]["event"], lines[-1]["engine"]) == ("stopped", "closed")
        answered = [line["status"] for line in lines[1:-1] if line["path"].endswith("/infer")]
        assert answered.count(200) == sum(status == 200 for _, status, _ in outcomes)
        assert set(answered) <= {200, 503}


def test_a_key_from_the_environment_or_a_file_and_an_engine_that_fails(tiny, tmp_path):
    key = tmp_path / "key"
    key.write_text("k3y\n")
    key.chmod(0o600)
    with serving(tiny, "--api-key-file", key, DITF_API_KEY="other") as server:
        assert requests.get(f"{server.url}/v2", timeout=9).status_code == 401
        headers = {"Authorization": "Bearer k3y", "X-Request-Id": "id-1"}
        assert requests.get(f"{server.url}/v2", headers=headers, timeout=9).status_code == 200
        answer = requests.post(
            f"{server.url}/features",
            files={"image": encoded(image(1, fails=True))},
            headers=headers,
            timeout=20,
        )
        assert answer.status_code == 500
        server.process.send_signal(signal.SIGINT)
        _, err = server.process.communicate(timeout=30)
        assert server.process.returncode == 0
    [failure] = [json.loads(line) for line in err.splitlines() if '"the engine failed"' in line]
    assert failure["request_ids"] == ["id-1"]
    assert "out of data bounds" in failure["exception"]


def test_more_idle_connections_than_there_are_descriptors(tiny):
    """Health is answered, and the log stays short and in its own format."""
    with serving(tiny, ulimit="-n 250") as server, ExitStack() as held:
        for _ in range(400):
            held.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=9))
        assert requests.get(f"{server.url}/v2/health/live", timeout=9).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        _, err = server.process.communicate(timeout=30)
        assert server.process.returncode == 0
    lines = [json.loads(line) for line in err.splitlines()]
    assert len(lines) < 50
    assert any(line["event"].endswith("too many are open (repeated)") for line in lines)


def test_lines_about_what_is_no_http(tiny):
    """Each names the client and the id that the answer has; after a few they are counted."""
    with serving(tiny) as server:
        ids = []
        for _ in range(30):
            with socket.create_connection(("127.0.0.1", server.port), timeout=9) as connection:
                connection.sendall(b"nonsense\r\n\r\n")
                head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400 ")
            assert json.loads(body)["error"]
            ids.append(head.decode().partition("x-request-id: ")[2].split()[0])
        server.process.send_signal(signal.SIGTERM)
        _, err = server.process.communicate(timeout=30)
    lines = [json.loads(line) for line in err.splitlines() if "Invalid HTTP" in line]
    assert [line["request_id"] for line in lines[:-1]] == ids[: len(lines) - 1]
    assert {line["client"] for line in lines[:-1]} == {"127.0.0.1"}
    assert len(lines) - 1 + lines[-1]["times"] == 30


def test_the_deadline_bounds_points_times_pixels(tiny):
    with serving(tiny, "--deadline", "1") as server:
        pair = {"source": encoded(image(1)), "target": encoded(np.zeros((1000, 2000, 3), np.uint8))}
        answers = [
            requests.post(f"{server.url}/match", files=pair, data={"points": ["1,1"] * count}, timeout=20)
            for count in (3, 151)
        ]
    assert [answer.status_code for answer in answers] == [200, 413]
    assert "151 points in a target of 2000x1000 pixels are more than 150, what 1 s" in answers[1].text


def test_the_soft_limit_of_open_files_is_raised_to_what_is_needed(tiny):
    with serving(tiny, ulimit="-S -n 128") as server:
        limits = Path(f"/proc/{server.process.pid}/limits").read_text()
    soft = int(next(line for line in limits.splitlines() if line.startswith("Max open files")).split()[3])
    assert soft > 512


def test_too_few_files_may_be_open(tiny):
    command = [sys.executable, "-m", "ditf", "serve", "--port", "0", str(tiny)]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 100; exec "$@"', "sh", *command], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (
        2,
        "error: a limit of 100 open files is too low for a server; run: ulimit -n 1024\n",
    )


def test_a_port_that_is_taken(ditf, tiny):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = ditf("serve", tiny, "--port", port)
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: cannot listen on 127.0.0.1:{port} (Address already in use); choose"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "prometheus_client"])
def test_without_its_extra(ditf, demo_bundle, monkeypatch, missing):
    for name in list(sys.modules):
        if name.startswith("ditf.runtime.serving"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    done = ditf("serve", demo_bundle)
    assert (done.returncode, done.stderr) == (
        3,
        f"error: {missing} is not installed; run: pip install 'ditf[serve]'\n",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent: no such bundle directory"),
        (["{bundle}", "{bundle}"], "are both called"),
        (["{bundle}", "--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["{bundle}", "--max-pixels", "100"], "more than Pillow's own; at most 89,478,485"),
        (["{bundle}", "--log-format", "xml"], "--log-format 'xml' is not auto, json, text"),
        (["{bundle}", "--api-key-file", "absent"], "absent holds no key"),
        (["{bundle}", "--backend", "abacus"], "unknown backend 'abacus'"),
        (["{bundle}", "--fit", "squeeze"], "unknown fit 'squeeze'"),
        (["{bundle}", "--port", "70000"], "'--port': Input should be less than or equal to 65535"),
        (["{bundle}", "--queue", "0"], "'--queue': Input should be greater"),
    ],
)
def test_bad_input(ditf, demo_bundle, arguments, message):
    given = [argument.format(bundle=demo_bundle) for argument in arguments]
    done = ditf("serve", *(given if "--port" in given else [*given, "--port", 0]))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_key_file_that_others_may_use(ditf, demo_bundle, tmp_path, mode):
    key = tmp_path / "my key"
    key.write_text("k3y")
    key.chmod(mode)
    done = ditf("serve", demo_bundle, "--port", 0, "--api-key-file", key)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {key} holds the key and others may use it (mode {mode:o}); run: chmod 600 '{key}'\n",
    )


def test_a_key_that_is_no_file(ditf, demo_bundle, tmp_path):
    os.mkfifo(tmp_path / "key", 0o600)
    done = ditf("serve", demo_bundle, "--port", 0, "--api-key-file", tmp_path / "key")
    assert (done.returncode, "holds no key (it is a FIFO, not a regular file)" in done.stderr) == (2, True)


@pytest.mark.parametrize("key", ["", "two words", "caf\u00e9"])
def test_keys_that_no_header_holds(ditf, demo_bundle, monkeypatch, key):
    monkeypatch.setenv("DITF_API_KEY", key)
    done = ditf("serve", demo_bundle, "--port", 0)
    assert (done.returncode, "DITF_API_KEY holds no key" in done.stderr) == (2, True)
