"""Nothing reports usage: an export, a match and a server are watched for sockets and for files left at home.

The libraries that report do it in native code, so strace watches the calls to the kernel. ONNX Runtime leaves
files when it is imported, and looks its collector up 9 seconds after a session was opened.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from ditf.runtime.telemetry import SWITCHES
from tests.processes import started

_WATCHED_SECONDS = 11


@dataclass(frozen=True)
class Watched:
    """Three commands that ran with an empty home.

    Attributes:
        home: the folder.
        calls: lines of strace; None where it cannot trace.
    """

    home: Path
    calls: list[str] | None


def _tracer(log: Path) -> list[str]:
    """The start of a command line that logs calls of the network; [] where it cannot."""
    if shutil.which("strace") is None:
        return []
    command = ["strace", "-f", "-qq", "-e", "trace=network", "-o", str(log)]
    return command if subprocess.run([*command, "true"], capture_output=True).returncode == 0 else []


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, demo_bundle: Path, tiny_pixart: Path) -> Watched:
    folder = tmp_path_factory.mktemp("watched")
    home = folder / "home"
    home.mkdir()
    image = folder / "a.png"
    Image.new("RGB", (32, 32)).save(image)
    unset = ("HF_", "XDG_", "DO_NOT_TRACK", "DISABLE_TELEMETRY", *SWITCHES)
    env = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    env |= {"HOME": str(home)}

    def command(number: int, arguments: Sequence[object]) -> list[str]:
        ditf = [sys.executable, "-m", "ditf", *map(str, arguments)]
        return [*_tracer(folder / f"calls-{number}"), *ditf]

    server = started(
        command(0, ["serve", "--port", "0", demo_bundle]),
        env=env,
        stdout=subprocess.PIPE,
        start_new_session=True,  # strace keeps a signal to itself: it goes to both
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("http://")
        opened = time.monotonic()
        for number, arguments in enumerate(
            [
                ["match", demo_bundle, image, image, "--points", "3,5"],
                ["export", "--model", tiny_pixart, "--layer", "1", "--output", folder / "bundle"],
                ["check", demo_bundle],
            ],
            start=1,
        ):
            done = subprocess.run(command(number, arguments), env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        time.sleep(max(0.0, opened + _WATCHED_SECONDS - time.monotonic()))
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.communicate(timeout=30)
    logs = sorted(folder.glob("calls-*"))
    return Watched(home, [line for log in logs for line in log.read_text().splitlines()] if logs else None)


def test_nothing_is_left_at_home(watched: Watched) -> None:
    assert [path for path in watched.home.rglob("*") if path.is_file()] == []


def test_no_name_is_looked_up_and_nothing_beyond_this_machine_is_called(watched: Watched) -> None:
    if watched.calls is None:
        pytest.skip("strace is not installed, or may not trace here")
    assert any("listen(" in line for line in watched.calls)  # the server is among what was watched
    called = [line for line in watched.calls if re.search(r"\b(connect|sendto|sendmsg|sendmmsg)\(", line)]
    outside = [line for line in called if "AF_INET" in line and not re.search(r'"(127\.|::1")', line)]
    assert outside == []
    assert not any("htons(53)" in line for line in called)


def test_a_user_who_asked_keeps_the_choice() -> None:
    program = "import os, ditf; print([os.environ[name] for name in ditf.runtime.telemetry.SWITCHES])"
    env = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    for chosen, found in (({}, [*SWITCHES.values()]), ({"ORT_DISABLE_TELEMETRY": "0"}, ["0", "1", "0"])):
        done = subprocess.run(
            [sys.executable, "-c", program], env={**env, **chosen}, capture_output=True, text=True
        )
        assert done.stdout.strip() == str(found), done.stderr


def test_the_libraries_read_these_variables() -> None:
    """Another name for a switch would switch nothing off."""
    program = (
        "import ditf, huggingface_hub.constants as hub; print(hub.HF_HUB_DISABLE_TELEMETRY)\n"
        "import ray._common.usage.usage_lib as ray; print(ray.usage_stats_enabled())\n"
    )
    env = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr
