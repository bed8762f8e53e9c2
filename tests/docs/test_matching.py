"""Every command block of docs/matching.md runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import numpy as np
from PIL import Image

from ditf.calib.images import golden_pair


def test_blocks(ditf, demo_bundle, root, tmp_path):
    fence = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    found = fence.findall((root / "docs" / "matching.md").read_text("utf-8"))
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "demo-l9-fp16").symlink_to(demo_bundle)
    for name, array in zip(("left.jpg", "right.jpg"), golden_pair((260, 310)), strict=True):
        Image.fromarray(array).save(tmp_path / name)
    Image.fromarray(np.eye(260, 310, dtype=np.uint8) * 3 + 1).save(tmp_path / "mask.png")
    commands = [line for kind, body in found if kind == "sh" for line in body.splitlines()]
    assert len(commands) == 8
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "ditf"
        done = ditf(*arguments, "--quiet")
        assert done.returncode == 0, (command, done.stderr)
    code = "\n".join(body for kind, body in found if kind == "python")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
