"""What every verb shares: flags of one meaning, progress, and the --json twin."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ditf.runtime.backends import BACKENDS
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.bundles.signing import ANYONE
from ditf.runtime.errors import InputError, missing_extra
from ditf.runtime.files.writing import link_end, write_whole, written_through
from ditf.runtime.model import Model
from ditf.runtime.printable import PrintableFormatter, printable

SCHEMA = 1  # of every --json document
_MANY = 100 << 20  # bytes that a log says anything about
_BETWEEN = 10.0  # seconds from one line of a log to the next, of the same stage


class _State:
    """The running command line and its verbosity."""

    def __init__(self) -> None:
        self.reset("")

    def reset(self, command: str) -> None:
        self.command = command
        self.verbose = False
        self.quiet = False
        self.trust = ANYONE


state = _State()


def _set_verbose(value: bool) -> bool:
    if value:
        state.verbose = True
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(PrintableFormatter("%(name)s: %(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
    return value


def _set_quiet(value: bool) -> bool:
    state.quiet = state.quiet or value
    return value


def _set_signers(value: Optional[Path]) -> Optional[Path]:
    state.trust = replace(state.trust, signers=value)
    return value


def _set_host_code(value: bool) -> bool:
    state.trust = replace(state.trust, host_code=value)
    return value


BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory made by ditf-export.")]
BackendOption = Annotated[
    str,
    typer.Option(
        metavar="|".join(("auto", *BACKENDS)),
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
VaeOption = Annotated[
    Optional[str],
    typer.Option(
        "--vae", metavar="ID|DIR", help="Another encoder of the same latent space, such as madebyollin/taesd."
    ),
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
SignatureOption = Annotated[
    Optional[Path],
    typer.Option(
        "--require-signature",
        metavar="KEYS",
        help="Refuse bundles and engines that no key in this file of OpenSSH public keys has signed.",
        callback=_set_signers,
    ),
]
HostCodeOption = Annotated[
    bool,
    typer.Option(
        "--allow-host-code",
        help="Accept version-compatible engines, which run their own code on the CPU; off by default.",
        callback=_set_host_code,
    ),
]


def open_bundle(path: Path) -> Bundle:
    """Open a bundle as the command's options accept it; see `Bundle.open`."""
    return Bundle.open(path, state.trust)


def load(path: Path, backend: str, fit: str = "stretch") -> Model:
    """Open a bundle on this machine as the command's options accept it; see `ditf.load`."""
    return Model(open_bundle(path), backend, fit)


def tell(line: str) -> None:
    """A line for people, on stderr, whatever --quiet says."""
    print(printable(line), file=sys.stderr, flush=True)


def say(line: str) -> None:
    """A line for people, on stderr, unless --quiet."""
    if not state.quiet:
        tell(line)


def show(text: str) -> None:
    """A result, on stdout. A reader that has gone, as in `| head`, ends the output and nothing else."""
    try:
        print(printable(text), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Stages(ABC):
    """Progress of work in stages."""

    @abstractmethod
    def __call__(self, stage: str) -> None:
        """A stage starts; says which."""

    @abstractmethod
    def amount(self, done: int, total: int) -> None:
        """Bytes of the stage that are done, and of all."""


class _Quiet(Stages):
    def __call__(self, stage: str) -> None:
        pass

    def amount(self, done: int, total: int) -> None:
        pass


class _Lines(Stages):
    """Lines in a log; of bytes one every so often, and none of what is quick."""

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
    """Progress of work in stages: a bar on a terminal, plain lines in a log, nothing with --quiet."""
    if state.quiet:
        yield _Quiet()
    elif not sys.stderr.isatty():
        yield _Lines(total)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            yield _Bar(progress, total)


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
        yield lambda phase, done, total: progress.update(
            task, description=printable(phase), completed=done, total=total
        )


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
    signers = () if state.trust.signers is None else (state.trust.signers,)
    taken = {path.resolve() for path in (*inputs, *signers)}
    for path in outputs:
        check_outside(path, list(taken))
        taken.add(path.resolve())
        if path.is_dir():
            raise InputError(f"{path} is a directory", "name a file")
        if path.name == "-":
            raise InputError("- is no file name here", "results are on stdout already; name a file")
        place = link_end(path)
        if not place.parent.is_dir():
            raise InputError(f"{place.parent} is not a directory", "make it first")
        through = written_through(place)
        if not os.access(place if through or place.exists() else place.parent, os.W_OK):
            raise InputError(f"{place} cannot be written", "choose another path")
        if not through and not os.access(place.parent, os.W_OK):
            raise InputError(f"{place.parent} cannot be written", "choose another path")


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


def write_json(path: Optional[Path], document: dict[str, Any], ok: bool = True) -> None:
    """Write a result's JSON twin: `document` with "schema" and "ok"."""
    if path is not None:
        whole = _finite({"schema": SCHEMA, "ok": ok, **document})
        text = json.dumps(whole, indent=2, allow_nan=False) + "\n"
        write_whole(path, text)


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


def vae_text(vae: dict[str, Any]) -> str:
    """Which encoder a bundle has in place of its checkpoint's own, from a manifest's record of it."""
    revision = "" if vae.get("revision") is None else f" at {vae['revision'][:12]}"
    x_0 = vae["x_0"]
    return (
        f"{vae['id']}{revision} ({vae['class']}); x_0 off by {x_0['relative_error']:.2f} of its spread from"
        f" the checkpoint's own VAE's, channels correlate by {x_0['correlation_min']:.2f} at the least"
    )


def bytes_text(count: int) -> str:
    """A size for people, "9.8 MB"; powers of ten."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
