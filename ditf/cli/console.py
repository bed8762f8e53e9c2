"""What every verb shares: flags of one meaning, progress, and the --json twin."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ditf.runtime.errors import InputError, missing_extra

SCHEMA = 1  # of every --json document


class _State:
    """The running command line and its verbosity."""

    def __init__(self) -> None:
        self.reset("")

    def reset(self, command: str) -> None:
        self.command = command
        self.verbose = False
        self.quiet = False


state = _State()


def _set_verbose(value: bool) -> bool:
    if value:
        state.verbose = True
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    return value


def _set_quiet(value: bool) -> bool:
    state.quiet = state.quiet or value
    return value


BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory made by ditf-export.")]
BackendOption = Annotated[
    str,
    typer.Option(
        metavar="auto|tensorrt|tensorrt-rtx|onnxruntime",
        help="What runs it; a named one that is missing is an error.",
    ),
]
FitOption = Annotated[
    str, typer.Option("--fit", help="How images meet the engine's size: stretch, or pad to keep the aspect.")
]
PromptOption = Annotated[
    Optional[str],
    typer.Option("--prompt", metavar="NAME", help="Condition of a bundle that has several: prompt or class."),
]
FeaturesDtypeOption = Annotated[
    Optional[str],
    typer.Option("--features-dtype", metavar="float16|float32", help="Type the features are given in."),
]
JsonOption = Annotated[
    Optional[Path], typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Say more; tracebacks of errors.", callback=_set_verbose)
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Results and errors only.", callback=_set_quiet)
]


def say(line: str) -> None:
    """A line for people, on stderr, unless --quiet."""
    if not state.quiet:
        print(line, file=sys.stderr, flush=True)


def show(text: str) -> None:
    """A result, on stdout. A reader that has gone, as in `| head`, ends the output and nothing else."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def stages(total: int) -> Iterator[Callable[[str], None]]:
    """Progress of work in stages: a bar on a terminal, plain lines in a log, nothing with --quiet.

    Yields a function to call with a description when a stage starts.
    """
    start = time.monotonic()
    if state.quiet:
        yield lambda stage: None
    elif not sys.stderr.isatty():
        done = [0]

        def plain(stage: str) -> None:
            done[0] += 1
            say(f"[{done[0]}/{total} {time.monotonic() - start:5.1f}s] {stage}")

        yield plain
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=total, completed=-1)
            yield lambda stage: progress.update(task, description=stage, advance=1)


@contextmanager
def steps() -> Iterator[Callable[[str, int, int], None]]:
    """Progress of work that counts its own steps: a bar on a terminal, nothing in a log or with --quiet.

    Yields a function to call with a description, the steps done and the steps in all.
    """
    if state.quiet or not sys.stderr.isatty():
        yield lambda phase, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda phase, done, total: progress.update(task, description=phase, completed=done, total=total)


def check_writable(*paths: Optional[Path], inputs: Sequence[Path] = ()) -> None:
    """Reject outputs that cannot be written, before the work starts.

    Args:
        paths: outputs; None for one that was not asked for.
        inputs: files and directories the command reads.

    Raises:
        InputError: a directory, in a folder that is not there or read-only, an input or in one, or the
            same file twice.
    """
    outputs = [path for path in paths if path is not None]
    taken = {path.resolve() for path in inputs}
    for path in outputs:
        check_outside(path, list(taken))
        taken.add(path.resolve())
        if path.is_dir():
            raise InputError(f"{path} is a directory", "name a file")
        if not path.parent.is_dir():
            raise InputError(f"{path.parent} is not a directory", "make it first")
        if not os.access(path.parent, os.W_OK):
            raise InputError(f"{path.parent} cannot be written", "choose another path")


def check_outside(path: Path, inputs: Sequence[Path]) -> None:
    """Reject an output directory that is, or is in, something the command reads.

    Raises:
        InputError: it is.
    """
    resolved = path.resolve()
    if {resolved, *resolved.parents} & {one.resolve() for one in inputs}:
        raise InputError(f"writing {path} would overwrite what this command works with", "choose another")


def check_picture(path: Path, extra: str) -> None:
    """Reject a --plot that cannot be drawn, before the work starts.

    Args:
        extra: the one that brings matplotlib.

    Raises:
        InputError: not a format that is drawn.
        MissingComponent: matplotlib is not installed.
    """
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {path} is no PNG, SVG or PDF", f"for example --plot {path.stem}.png")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise missing_extra("matplotlib", extra) from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `path` when the block ends well, and vanishes otherwise."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Optional[Path], document: dict[str, Any], ok: bool = True) -> None:
    """Write a result's JSON twin: `document` with "schema" and "ok"."""
    if path is not None:
        whole = _finite({"schema": SCHEMA, "ok": ok, **document})
        text = json.dumps(whole, indent=2, allow_nan=False) + "\n"
        with replacing(path) as temporary:
            temporary.write_text(text, "utf-8")


def _finite(value: Any) -> Any:
    """The same document with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_size(text: str) -> tuple[int, int]:
    """Parse "HxW" in pixels.

    Raises:
        InputError: not two positive integers.
    """
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text.lower())
    if not match:
        raise InputError(f"size {text!r} is not HxW", "for example --size 512x768")
    return int(match[1]), int(match[2])


def table(rows: list[tuple[str, ...]]) -> str:
    """Left-aligned columns of plain text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (zip(row, widths, strict=True) for row in rows)
    return "\n".join("  ".join(cell.ljust(width) for cell, width in line).rstrip() for line in lines)


def pca_text(channels: int, pca: dict[str, Any]) -> str:
    """What a projection keeps, from a manifest's record of it."""
    return (
        f"projected to {channels} of {pca['of']} channels: {pca['energy_held_out']:.2%} of the energy and"
        f" {pca['matches_within_1px']:.0%} of the matches within 1 px kept, on the golden pair"
    )


def bytes_text(count: int) -> str:
    """A size for people, "9.8 MB"; powers of ten."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
