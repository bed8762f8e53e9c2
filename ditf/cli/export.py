"""`ditf export`, also `ditf-export`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ditf.cli.build import TargetOption, build_targets, parse_targets
from ditf.cli.support.bundles import pca_text, vae_text
from ditf.cli.support.exporter import needs_exporter
from ditf.cli.support.options import JsonOption, verb
from ditf.cli.support.output import bytes_text, show, tell, write_json
from ditf.cli.support.paths import check_writable
from ditf.cli.support.progress import stages
from ditf.engines.build import check_target
from ditf.engines.compile import BuildOptions
from ditf.export.planning.export_options import ExportOptions
from ditf.runtime.backends.flavour import choose_flavour
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.bundles.staging import check_output
from ditf.runtime.errors import InputError


@verb()
def export(
    *,
    options: ExportOptions,
    save_prompt_embeds: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FILE",
            help="Encode the prompt into FILE and stop; --prompt-embeds reads it on another machine.",
        ),
    ] = None,
    build: Annotated[
        bool, typer.Option("--build", help="Build an engine afterwards, as ditf build does.")
    ] = False,
    target: TargetOption = None,
    json_file: JsonOption = None,
) -> None:
    """Trace a checkpoint up to a layer and write a bundle."""
    check_writable(json_file, save_prompt_embeds, inputs=options.prompt_embeds)
    if options.output is not None:
        check_output(options.output, options.inputs)
    if target is not None and not build:
        raise InputError("--target requires --build", "add --build")
    if build:  # what would fail after the export fails now
        flavour, _ = choose_flavour("auto")
        for one in parse_targets(target):
            check_target(flavour, BuildOptions(target=one))
    with needs_exporter():
        from ditf.export.exporter import export_bundle, stage_count
        from ditf.export.planning.save_prompt import save_prompt
    if save_prompt_embeds is not None:
        name = save_prompt(options, save_prompt_embeds, tell)
        show(f"{save_prompt_embeds}: embeddings of {name!r}")
        write_json(json_file, {"prompt_embeds": str(save_prompt_embeds), "prompt": name})
        return
    with stages(stage_count(options)) as report:
        path = export_bundle(options, report, report.amount, tell)
    manifest = Bundle.open(path).manifest
    size_text = bytes_text(sum(file["bytes"] for file in manifest.files.values()))
    height, width = manifest.size
    show(
        f"{path}: {manifest.layer_name}, {manifest.precision}, {height}x{width} px ->"
        f" {manifest.channels}x{manifest.grid[0]}x{manifest.grid[1]}, {size_text}"
    )
    if manifest.pca is not None:
        show(pca_text(manifest.channels, manifest.pca))
    if manifest.vae is not None:
        show(vae_text(manifest.vae))
    built = build_targets(Bundle.open(path), "auto", target) if build else []
    write_json(
        json_file,
        {
            "bundle": str(path),
            "layer": manifest.layer,
            "layer_name": manifest.layer_name,
            "pca": manifest.pca,
            "vae": manifest.vae,
            "engines": [str(one.folder) for one in built],
        },
    )
