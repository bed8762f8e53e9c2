"""Options that several verbs take, and `verb`, which gives them to a function."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ditf.cli.support.state import state
from ditf.cli.support.typer_parameters import ExportFlags
from ditf.export.planning.export_options import ExportOptions
from ditf.runtime.backends import BACKENDS
from ditf.runtime.backends.device import parse_device
from ditf.runtime.printable import PrintableFormatter


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


def _set_device(value: Optional[str]) -> Optional[str]:
    if value is not None:
        parse_device(value)
    state.device = value
    return value


def _set_host_code(value: bool) -> bool:
    state.trust = replace(state.trust, host_code=value)
    return value


BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory made by ditf-export.")]
BackendOption = Annotated[
    str,
    typer.Option(
        metavar="|".join(("auto", *BACKENDS)),
        help="Backend that runs the graphs; naming one that is missing is an error.",
    ),
]
FitOption = Annotated[
    str,
    typer.Option("--fit", help="Fit images to the graph's size: stretch, or pad to keep the aspect ratio."),
]
PromptOption = Annotated[
    Optional[str],
    typer.Option(
        "--prompt",
        metavar="NAME",
        help="Name of the condition, a prompt or class, in a bundle that has several.",
    ),
]
PointsOption = Annotated[
    Optional[list[str]],
    typer.Option("--points", metavar="X,Y", help="Points in pixels of SOURCE; repeat."),
]
BatchDelayOption = Annotated[
    float,
    typer.Option(
        metavar="MS", min=0, max=1000, help="How long an image waits for others to share its batch."
    ),
]
JsonOption = Annotated[
    Optional[Path], typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")
]


def _switch(name: str, default: Any, option: Any) -> inspect.Parameter:
    """An option that acts through its callback, so that the verb's function does not take it."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=option)


SIGNATURE = _switch(
    "signature",
    None,
    Annotated[
        Optional[Path],
        typer.Option(
            "--require-signature",
            metavar="KEYS",
            help="Refuse bundles and engines that no key in this file of OpenSSH public keys has signed.",
            callback=_set_signers,
        ),
    ],
)
HOST_CODE = _switch(
    "host_code",
    False,
    Annotated[
        bool,
        typer.Option(
            "--allow-host-code",
            help="Accept version-compatible engines, which run code of their own on the CPU; off by default.",
            callback=_set_host_code,
        ),
    ],
)
DEVICE = _switch(
    "device",
    None,
    Annotated[
        Optional[str],
        typer.Option(
            "--device",
            metavar="cuda|cuda:N|cpu",
            help="GPU that runs the graphs, as CUDA_VISIBLE_DEVICES numbers them, or the CPU (onnxruntime);"
            " by default the first GPU that the backend can use.",
            callback=_set_device,
        ),
    ],
)
RUNNING = (SIGNATURE, HOST_CODE, DEVICE)
"""The switches of verbs that run a model."""
_VERBOSITY = (
    _switch(
        "verbose",
        False,
        Annotated[
            bool,
            typer.Option(
                "--verbose", "-v", help="Print logs and tracebacks of errors.", callback=_set_verbose
            ),
        ],
    ),
    _switch(
        "quiet",
        False,
        Annotated[
            bool, typer.Option("--quiet", "-q", help="Print results and errors only.", callback=_set_quiet)
        ],
    ),
)


def verb(
    *switches: inspect.Parameter,
    takes: Optional[str] = None,
    helps: Optional[Mapping[str, str]] = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn a function into a verb, which has --verbose and --quiet beside its own options.

    A parameter of type `ExportOptions` becomes one flag for each field.

    Args:
        switches: `SIGNATURE` for verbs that open bundles, `RUNNING` for those that run them.
        takes: names of the fields of `ExportOptions` that become flags, with spaces between; all by default.
        helps: {field: help} where the declared help does not fit this verb.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        block = None
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            if parameter.annotation is ExportOptions:
                block = ExportFlags(parameter.name, takes, helps or {})
                parameters += block.parameters()
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        acting = (*switches, *_VERBOSITY)
        parameters += acting

        @functools.wraps(function)
        def call(**given: Any) -> None:
            for switch in acting:
                del given[switch.name]
            if block is not None:
                given[block.name] = block.collect(given)
            function(**given)

        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return call

    return decorate
