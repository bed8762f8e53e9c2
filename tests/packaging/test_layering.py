"""The import contracts of pyproject.toml hold, and would notice if they did not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def lint_imports(folder):
    program = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([program, "--no-cache"], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def copy(root, tmp_path):
    for name in ("ditf", "calib", "engines", "export", "runtime"):
        shutil.copytree(root / name, tmp_path / name, symlinks=True)
    shutil.copy(root / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_contracts_hold(root):
    done = lint_imports(root)
    assert done.returncode == 0, done.stdout


WRONG = [
    ("ditf.runtime.model", "ditf.calib"),
    ("ditf.runtime.images", "torch"),
    ("ditf.calib.parity", "ditf.engines"),
    ("ditf.calib.channels", "torch"),
    ("ditf.engines.build", "ditf.export"),
    ("ditf.cli.check", "torch"),
]


def test_every_wrong_import_is_noticed(copy):
    for module, wrong in WRONG:
        with (copy / f"{module.replace('.', '/')}.py").open("a") as file:
            file.write(f"\nimport {wrong}\n")
    done = lint_imports(copy)
    assert done.returncode == 1, done.stdout
    for module, wrong in WRONG:
        assert f"{module} -> {wrong} (l." in done.stdout, done.stdout


def test_bare_folder_names_are_banned(root, tmp_path):
    ruff = Path(sys.executable).with_name("ruff")
    (tmp_path / "bad.py").write_text("import runtime\nprint(runtime)\n")
    command = [ruff, "check", "--config", root / "pyproject.toml", "--select", "TID251", tmp_path]
    assert "TID251" in subprocess.run(command, capture_output=True, text=True).stdout
