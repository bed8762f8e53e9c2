"""A pytest plugin that measures what a run costs: processor seconds of each folder of tests/.

    OMP_NUM_THREADS=1 python -m pytest -p tests.processor_seconds -n 2 --dist loadfile

User and system time of the process and of the children that it waited for. A fixture counts where it is first
asked for; what test modules import counts as "imports and collection".
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pytest

_FILES, _START = "files of tests/", "imports and collection"
_folders: Counter[str] = Counter()
_before = 0.0


def _spent() -> float:
    """Seconds since this was last asked."""
    global _before
    now = sum(os.times()[:4])
    spent, _before = now - _before, now
    return spent


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[Any]:
    report = yield
    report.processor_seconds = _spent()  # pytest-xdist hands it on
    return report


def pytest_collection_finish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is None:
        _folders[_START] += _spent()
    else:
        output["processor_seconds"] = _spent()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _folders[_START] += node.workeroutput["processor_seconds"]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    folders = PurePosixPath(report.nodeid.partition("::")[0]).parts[1:-1]
    _folders["/".join(folders[:2]) or _FILES] += report.processor_seconds


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section(f"processor seconds: {_folders.total():.0f}")
    for folder, seconds in sorted(_folders.items()):
        terminalreporter.write_line(f"{seconds:8.1f} {folder}")
