"""Progress of long work: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ditf.cli.support.output import bytes_text, say
from ditf.cli.support.state import state
from ditf.runtime.printable import printable

_MANY = 100 << 20  # bytes; less is not worth a line
_BETWEEN = 10.0  # seconds between lines of one stage


class Stages:
    """Progress of work in stages; this class itself, for --quiet, shows nothing."""

    def __call__(self, stage: str) -> None:
        """A stage starts; `stage` says which."""

    def amount(self, done: int, total: int) -> None:
        """`done` bytes of the stage's `total` are done."""


class _Lines(Stages):
    """Lines in a log: one for each stage, and one every ten seconds of a stage that moves many bytes."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._start = self._said = time.monotonic()

    def __call__(self, stage: str) -> None:
        self._done += 1
        self._said = time.monotonic()
        say(f"[{self._done}/{self._total} {self._said - self._start:5.1f}s] {stage}")

    def amount(self, done: int, total: int) -> None:
        now = time.monotonic()
        if total > _MANY and now - self._said > _BETWEEN:
            self._said = now
            say(f"[{self._done}/{self._total} {now - self._start:5.1f}s] {_amount(done, total)}")


class _Bar(Stages):
    def __init__(self, progress: Any, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total, completed=-1)
        self._stage = ""

    def __call__(self, stage: str) -> None:
        self._stage = stage
        self._progress.update(self._task, description=printable(stage), advance=1)

    def amount(self, done: int, total: int) -> None:
        self._progress.update(self._task, description=printable(f"{self._stage}: {_amount(done, total)}"))


def _amount(done: int, total: int) -> str:
    return f"{bytes_text(done)} of {bytes_text(max(done, total))}"


@contextmanager
def stages(total: int) -> Iterator[Stages]:
    """Show progress of work in stages: a bar on a terminal, lines in a log, nothing with --quiet."""
    if state.quiet:
        yield Stages()
    elif not sys.stderr.isatty():
        yield _Lines(total)
    else:
        with _terminal_progress() as progress:
            yield _Bar(progress, total)


@contextmanager
def steps() -> Iterator[Callable[[str, int, int], None]]:
    """Show progress of work that counts its own steps: a bar on a terminal, nothing in a log or with --quiet.

    Yields a function to call with a description, the steps done and the steps in all.
    """
    if state.quiet or not sys.stderr.isatty():
        yield lambda phase, done, total: None
        return
    with _terminal_progress() as progress:
        task = progress.add_task("", total=None)
        yield lambda phase, done, total: progress.update(
            task, description=printable(phase), completed=done, total=total
        )


@contextmanager
def _terminal_progress() -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield progress
