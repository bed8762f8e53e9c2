"""Tiny real checkpoints and bundles, made once a session."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import save_tiny_pixart

ROOT = Path(__file__).parent.parent

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PixArt checkpoint saved by PixArtAlphaPipeline.save_pretrained."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-pixart"
    save_tiny_pixart(folder)
    return folder


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's float16 bundle. Read-only: copy it before changing anything."""
    return _export(tmp_path_factory, "demo-l9-fp16", fp16=True)


@pytest.fixture(scope="session")
def demo_bundle_float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's float32 bundle, with a batch of 3."""
    return _export(tmp_path_factory, "demo-l9-fp32", fp16=False, batch=3)


@pytest.fixture(scope="session")
def pixart_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_pixart: Path) -> Path:
    """A float16 bundle of the tiny PixArt, with noise as an input and a dynamic batch, not square."""
    return _export(
        tmp_path_factory,
        "pixart-l2-fp16",
        model=str(tiny_pixart),
        layer="2",
        fp16=True,
        size=(48, 80),
        noise="input",
        ensemble=3,
        batch="dynamic",
    )


@pytest.fixture
def ditf(tmp_path: Path) -> Run:
    """Runs `ditf ARGUMENTS` in an empty directory, in a process of its own."""

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ditf", *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            **options,  # type: ignore[call-overload]
        )

    return run


def _export(factory: pytest.TempPathFactory, name: str, **options: object) -> Path:
    from ditf.export.exporter import export_bundle
    from ditf.export.options import ExportOptions

    return export_bundle(ExportOptions(output=factory.mktemp("bundles") / name, **options))
