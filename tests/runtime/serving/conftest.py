"""The server of the serving tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.serving.tiny import Running, serving


@pytest.fixture(scope="session")
def server(demo_bundle: Path, tiny: Path) -> Iterator[Running]:
    """The demo's bundle, and the tiny one, served with the default limits."""
    with serving(demo_bundle, tiny) as running:
        yield running
