"""`ditf check --independent`: the golden outputs of the checkpoint's own pipeline, made on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from ditf.cli.support.check_where import Findings
from ditf.cli.support.exporter import needs_exporter
from ditf.cli.support.output import say
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.bundles.golden_file import Golden
from ditf.runtime.errors import InputError

IndependentOption = Annotated[
    bool,
    typer.Option(
        "--independent",
        help="Compare with the checkpoint's own diffusers pipeline, run here, instead of the golden data.",
    ),
]
ModelOption = Annotated[
    Optional[str],
    typer.Option(
        metavar="DIR|ID",
        help="Checkpoint of --independent; the one that the bundle was exported from by default.",
    ),
]
ImagesOption = Annotated[
    Optional[Path],
    typer.Option(metavar="DIR", help="Folder of images of --independent; the golden pair by default."),
]
EmbedsOption = Annotated[
    Optional[list[Path]],
    typer.Option(
        metavar="FILE", help="Embeddings of --independent that the bundle was exported with; repeat."
    ),
]


def check_options(independent: bool, needing: dict[str, object], excluded: dict[str, object]) -> None:
    """Refuse options that do not go together.

    Args:
        needing: {flag: value} of those that need --independent; excluded: of those that it excludes.

    Raises:
        InputError: names the first.
    """
    for flag, value in (excluded if independent else needing).items():
        if value and independent:
            raise InputError(f"{flag} reads the bundle's own golden data, not --independent's", "give one")
        if value:
            raise InputError(f"{flag} is for --independent", f"add --independent, or leave {flag} out")


def independent_golden(
    bundle: Bundle,
    model: Optional[str],
    images: Optional[Path],
    prompt_embeds: Optional[list[Path]],
    findings: Findings,
) -> Golden:
    """Golden outputs as `ditf.runtime.bundles.golden_file.read_golden` gives them; says what made them.

    Raises:
        MissingComponent: the exporter's packages are not installed.
        InputError: as `ditf.export.independent.independent_golden`.
    """
    with needs_exporter():
        from ditf.export.independent import independent_golden as run

    say("running the checkpoint's own pipeline")
    made = run(bundle, model, images, tuple(prompt_embeds or ()))
    record = json.loads(str(made.arrays["oracle"]))
    findings.document["independent"] = record
    say("; ".join(f"{name}: {value}" for name, value in record.items() if name != "oracle"))
    return made.arrays
