"""Every benchmark runs, on something tiny: its table is printed, and nothing is written."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys

import pytest

SCRIPTS = (
    "build",
    "conditioning",
    "demo",
    "export_memory",
    "features",
    "fusion",
    "int8",
    "matching",
    "pca",
    "planted",
    "residual",
    "runtime",
    "serve",
    "vae",
)

EXPORT_THE_DEMO = ("build", "demo", "pca", "runtime")
"""What these measure comes after an export, so that the tests' own bundle of the demo model will do."""


def test_all_are_named_here(root):
    assert {path.stem for path in (root / "benchmarks").glob("bench_*.py")} == {f"bench_{s}" for s in SCRIPTS}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_tiny_run(root, name, demo_bundle, monkeypatch, capsys, tmp_path):
    """In this process, which has imported torch already."""
    if name in EXPORT_THE_DEMO:
        monkeypatch.setattr(
            "ditf.export.exporter.export_bundle",
            lambda options: shutil.copytree(demo_bundle, options.output, dirs_exist_ok=True),
        )
    monkeypatch.syspath_prepend(root / "benchmarks")
    before = set(sys.modules)
    script = importlib.import_module(f"bench_{name}")
    try:
        monkeypatch.setattr(importlib.import_module("harness"), "RESULTS", tmp_path)
        monkeypatch.setattr(sys, "argv", [f"bench_{name}.py", "--smoke"])
        script.main()
    finally:
        for module in set(sys.modules) - before:
            if str(root / "benchmarks") in str(getattr(sys.modules[module], "__file__", "")):
                del sys.modules[module]
    assert "load" in capsys.readouterr().out  # the machine's, above the table
    assert not list(tmp_path.iterdir())


def test_they_start(root):
    """As a user would start them; one stands for all, which share their options."""
    script = root / "benchmarks" / "bench_matching.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--smoke" in done.stdout
