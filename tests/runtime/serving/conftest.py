"""Bundles and servers of the serving tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.serving.tiny import Running, serving, tiny_bundle


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, demo_bundle: Path) -> Path:
    """A bundle that fails and lingers when its image says so. Read-only."""
    return tiny_bundle(demo_bundle, tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def server(demo_bundle: Path, tiny: Path) -> Iterator[Running]:
    """The demo's bundle, and the tiny one, served with the default limits."""
    with serving(demo_bundle, tiny) as running:
        yield running
