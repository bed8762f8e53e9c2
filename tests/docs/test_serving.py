"""The curl lines and the client of docs/serving.md run against a server."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from ditf.runtime.serving.decoding import JPEG_SCANS, SLOW_BYTES
from ditf.runtime.serving.protocol.v2 import REST_BYTES
from tests.runtime.serving.tiny import LIMITS, serving


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    import skimage.data
    from PIL import Image

    folder = tmp_path_factory.mktemp("serving")
    left, right, _ = skimage.data.stereo_motorcycle()
    Image.fromarray(left).save(folder / "left.jpg")
    Image.fromarray(right).save(folder / "right.jpg")
    return folder


@pytest.fixture(scope="module")
def page(root, demo_bundle):
    with serving(demo_bundle) as server:
        text = (root / "docs" / "serving.md").read_text("utf-8")
        yield text.replace("127.0.0.1:8000", server.address)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(page, workplace):
    [block] = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = block.splitlines()
    assert len(lines) == 6
    for line in lines:
        done = subprocess.run(
            ["bash", "-c", line.replace("curl ", "curl --fail -sS ")],
            cwd=workplace,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (line, done.stderr)
    assert {"match.png", "heat.png", "heat.npy", "features.npy"} <= {
        path.name for path in workplace.iterdir()
    }


def test_the_client(page, workplace):
    [block] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", block], cwd=workplace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[[118.")


def test_the_limits(page):
    """The table says what the defaults are."""
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \| [^|]+ \|$", page, re.MULTILINE))
    found = [re.sub(r"\D", "", value) for value in rows.values() if value[:1].isdigit()]
    expected = [
        LIMITS.requests, LIMITS.body_bytes >> 20, LIMITS.json_bytes >> 20, REST_BYTES >> 20,
        LIMITS.buffered_bytes >> 20,
        LIMITS.pixels // 1_000_000, LIMITS.side, JPEG_SCANS, SLOW_BYTES >> 20,
        LIMITS.points, LIMITS.scores / LIMITS.deadline_s / 1e6,
        LIMITS.head_s, LIMITS.body_s, LIMITS.stall_s,
        LIMITS.connections, LIMITS.connections_each,
    ]  # fmt: skip
    assert found == [f"{value:g}" for value in expected]
