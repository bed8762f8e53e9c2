"""Entry points `ditf` and `ditf-export`: dispatch verbs, and turn failures into one line and an exit code."""

from __future__ import annotations

import io
import logging
import os
import re
import shlex
import signal
import sys
import traceback
from typing import Annotated, NoReturn, Optional

import typer

import ditf
from ditf.cli import (
    bench,
    build,
    calibrate,
    check,
    doctor,
    evaluate,
    export,
    export_triton,
    features,
    inspect,
    match,
    plan,
    serve,
    sign,
    track,
)
from ditf.cli.support.output import tell
from ditf.cli.support.state import state
from ditf.cli.support.termination import Terminated, exit_code, exit_now, message, terminable
from ditf.runtime.errors import DitfError
from ditf.runtime.printable import PrintableFormatter

_SIGINT = exit_code(signal.SIGINT)

app = typer.Typer(
    name="ditf",
    help="Deploy DiTF features: export a Diffusion Transformer up to a layer, check it, match with it.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("export")(export.export)
app.command("build")(build.build)
app.add_typer(build.engines, name="engines")
app.command("calibrate")(calibrate.calibrate)
app.command("check")(check.check)
app.command("bench")(bench.bench)
app.command("match")(match.match)
app.command("eval")(evaluate.evaluate_bundle)
app.command("track")(track.track)
app.command("export-triton")(export_triton.export_triton)
app.command("features")(features.features)
app.command("serve")(serve.serve)
app.command("sign")(sign.sign)
app.command("plan")(plan.plan)
app.command("inspect")(inspect.inspect)
app.command("doctor")(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ditf {ditf.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        Optional[bool],
        typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True),
    ] = None,
) -> None:
    pass


def main() -> NoReturn:
    """The `ditf` command."""
    _use_utf8()
    _leave(run(sys.argv[1:]))


def export_main() -> NoReturn:
    """The `ditf-export` command: `ditf export`."""
    _use_utf8()
    arguments = sys.argv[1:]
    verb = [] if arguments == ["--version"] else ["export"]
    _leave(run([*verb, *arguments], shlex.join(["ditf-export", *arguments])))


def run(arguments: list[str], command: str | None = None) -> int:
    """Run a command line.

    Args:
        arguments: the arguments after the program's name.
        command: the command line as the user typed it, which manifests record; `ditf` and the arguments by
            default.

    Returns:
        The exit code: 0 for success, 1 for a failed gate, 2 for wrong usage or bad input, 3 for a missing
        component, 70 for a defect of ditf, 129, 130 and 143 for SIGHUP, SIGINT and SIGTERM.
    """
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(PrintableFormatter())  # warnings, where nothing else is set up
    state.reset(command or shlex.join(["ditf", *arguments]))
    try:
        program = typer.main.get_command(app)
        with terminable(forced=arguments[:1] != ["serve"]):  # a server answers running requests first
            code = program.main(arguments or ["--help"], prog_name="ditf", standalone_mode=False)
        return _interrupted() if code == _SIGINT else int(code or 0)
    except DitfError as error:
        return _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        return _fail(error.format_message(), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except Terminated as ended:
        return _fail(message(ended.number), exit_code(ended.number))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}; check the path and the disk", 2)
    except Exception as error:
        # torch and ONNX Runtime have no exception class for it.
        if isinstance(error, MemoryError) or re.search("allocate memory|out of memory", str(error)):
            return _fail("out of memory; use a smaller --size or --ensemble 1", 2)
        if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # of Path.resolve
            return _fail(f"{error}; check the path", 2)
        tell(traceback.format_exc())
        return _fail("this is a defect of ditf; please report it with the lines above", 70)


def _use_utf8() -> None:
    """Read arguments and file names as UTF-8 where the locale is ASCII, and print what the locale can show.

    Python would read each byte that is not ASCII as a surrogate, which the libraries that are written in C++
    and Rust refuse. Its UTF-8 mode can only be chosen at the start, so the process starts itself again.
    """
    if sys.getfilesystemencoding() == "ascii" and not sys.flags.utf8_mode and sys.executable:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _leave(code: int) -> NoReturn:
    if code > 128:  # a signal
        exit_now(code)  # an interpreter that has imported torch takes seconds to leave
    sys.exit(code)


def _interrupted() -> int:
    return _fail(message(signal.SIGINT), _SIGINT)


def _fail(message: str, code: int) -> int:
    if state.verbose and sys.exc_info()[0] is not None:
        tell(traceback.format_exc())
    tell(f"error: {' '.join(message.split())}")
    return code
