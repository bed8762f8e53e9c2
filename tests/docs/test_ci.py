"""The workflow of docs/ci.md: its steps run here as far as they are shell."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


@pytest.fixture(scope="module")
def steps(root) -> list[dict]:
    text = (root / "docs" / "ci.md").read_text("utf-8")
    document = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    return document["jobs"]["bundle"]["steps"]


def test_the_job_passes_and_then_fails_on_a_regression(steps, demo_bundle, tmp_path):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(script):
        script = script.replace("ditf bench", "ditf bench --seconds 0.2 --repetitions 3 --points 4")
        script = script.replace("15%", "400%")  # another test may run beside this one
        return subprocess.run(
            ["bash", "-e", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    scripts = [step["run"] for step in steps if "run" in step]
    assert scripts[0].startswith("pip install")
    assert scripts[1] == "ditf-export --layer 9 --fp16 --output bundle"
    shutil.copytree(demo_bundle, tmp_path / "bundle")  # what that writes, once for all tests
    for script in scripts[2:]:
        done = run(script)
        assert done.returncode == 0, (script, done.stderr)
    assert json.loads((tmp_path / "check.json").read_text())["ok"]
    baseline = json.loads((tmp_path / "baseline.json").read_text())
    for row in baseline["rows"].values():
        row["samples"] = [[value / 100 for value in one] for one in row["samples"]]
    (tmp_path / "baseline.json").write_text(json.dumps(baseline))
    done = run(next(script for script in scripts if "--baseline" in script))
    assert done.returncode == 1
    assert not json.loads((tmp_path / "bench.json").read_text())["ok"]


def test_what_is_cached_is_what_is_written(steps):
    cached = [step["with"]["path"] for step in steps if "cache" in step.get("uses", "")]
    assert cached == ["baseline.json", "baseline.json"]
