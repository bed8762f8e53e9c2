"""The stages of a command, as a list that is executed: its length is what a progress bar counts up to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

Report = Callable[[str], None]
"""Takes a line for people at the start of each stage."""

Warn = Callable[[str], None]
"""Takes a line for people about something that the result differs by, though the work goes on."""


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        line: gives the line for people. It is called when the stage starts, after the earlier stages.
        work: does the work; by default the stage only reports its line.
        runs: whether the stage belongs to this command; known from the options alone.
    """

    line: Callable[[], str]
    work: Callable[[], None] = _nothing
    runs: bool = True


def run_stages(stages: Iterable[Stage], report: Report) -> None:
    """Report and execute every stage, in order."""
    for stage in stages:
        report(stage.line())
        stage.work()
