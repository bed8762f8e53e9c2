"""The command of docs/engines.md."""

from __future__ import annotations

import json
import re
import shlex
import shutil


def test_the_report(root, ditf, demo_bundle, tmp_path):
    text = (root / "docs" / "engines.md").read_text("utf-8")
    (command,) = re.findall(r"```sh\nditf (.*?)\n```", text, re.DOTALL)
    shutil.copytree(demo_bundle, tmp_path / "bundle")
    done = ditf(*shlex.split(command))
    assert done.returncode == 0, done.stderr
    assert "at least" in done.stdout
    plans = json.loads((tmp_path / "report.json").read_text())["plans"]
    assert [plan["target"] for plan in plans] == ["sm_86", "sm_89"]
