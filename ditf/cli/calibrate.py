"""`ditf calibrate`: measure a model's massive channels and the ranges of its activations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ditf.calib.recipe import FEATURES, INNER, SHOWN, Extent, choose_recipe
from ditf.cli.support.exporter import needs_exporter
from ditf.cli.support.options import JsonOption, verb
from ditf.cli.support.output import say, show, table, write_json
from ditf.cli.support.paths import check_picture, check_writable
from ditf.cli.support.progress import stages
from ditf.export.planning.export_options import ExportOptions
from ditf.runtime.errors import InputError
from ditf.runtime.files.json_file import json_text
from ditf.runtime.files.writing import replacing, write_whole


@verb(
    takes="model base transformer vae lora layer conditioning prompt prompts prompt_embeds class_label"
    " guidance text_tokens text_padding timestep size seed ensemble discard discard_stage adaln",
    helps={
        "layer": "Last layer to measure: 9 or single.9.",
        "discard": "Channels that are zero in the features whose range is measured.",
    },
)
def calibrate(
    *,
    options: ExportOptions,
    images: Annotated[
        Optional[Path],
        typer.Option(metavar="DIR", help="Images to calibrate with; built-in pictures by default."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="JSON", help="File for the statistics.")
    ] = Path("calibration.json"),
    plot: Annotated[
        Optional[Path], typer.Option(metavar="PNG", help="Also plot the statistics by layer.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Run the unmodified model over images and record what enters each block."""
    options = replace(options, calibration_images=images)
    check_writable(output, plot, json_file)
    if plot is not None:
        check_picture(plot, "export")
    with needs_exporter():
        from ditf.export.measure.calibrate import calibrate as run
        from ditf.export.measure.calibrate import calibration_stage_count
    with stages(calibration_stage_count(options)) as report:
        document = run(options, report, output.absolute().parent).to_json()
    write_whole(output, json_text(document, indent=1))
    if plot is not None:
        from ditf.calib.plots.activations import plot_calibration

        with replacing(plot) as temporary:
            plot_calibration(document, temporary)
    if document["images"]["warning"]:
        say(f"warning: {document['images']['warning']}: the statistics say little")
    show(_render(document))
    prediction = _prediction(document, replace(options, precision="float16").float16_features)
    show("\n".join(prediction))
    summary = [{k: layer[k] for k in ("layer", "name")} | _numbers(layer) for layer in document["layers"]]
    write_json(json_file, {"calibration": str(output), "layers": summary, "float16": prediction})


def _numbers(layer: dict[str, Any]) -> dict[str, Any]:
    massive = layer["image"]["massive_channels"]
    return {
        "massive_channels": [entry["channel"] for entry in massive],
        "largest_ratio": max((entry["ratio"] for entry in massive), default=None),
        "max_abs": layer["image"]["max_abs"],
        "text_max_abs": layer["text"]["max_abs"] if layer["text"] else None,
    }


def _render(document: dict[str, Any]) -> str:
    """A row for each layer: its residual, and the ranges inside the branches of the block that follows."""
    from ditf.calib.plots.activations import largest_of

    rows: list[tuple[str, ...]] = [
        (
            "layer",
            "massive channels (times the median)",
            "residual",
            "text",
            "inside branches",
            "branches add",
        )
    ]
    for layer in document["layers"]:
        massive = sorted(layer["image"]["massive_channels"], key=lambda entry: -entry["ratio"])
        shown = ", ".join(f"{entry['channel']} ({entry['ratio']:.0f})" for entry in massive[:6])
        more = f" and {len(massive) - 6} more" if len(massive) > 6 else ""
        text = f"{layer['text']['max_abs']:.4g}" if layer["text"] else ""
        inside, added = (largest_of(document["ranges"], layer, kinds) for kinds in (INNER, ("emitted",)))
        rows.append(
            (
                f"{layer['layer']} ({layer['name']})",
                (shown or "none") + more,
                f"{layer['image']['max_abs']:.4g}",
                text,
                "" if inside is None else f"{inside:.4g}",
                "" if added is None else f"{added:.4g}",
            )
        )
    return table(rows)


def _prediction(document: dict[str, Any], float16_features: bool) -> list[str]:
    """Lines that say which exceptions --fp16 would make for these ranges."""
    extents = [Extent.from_json(entry) for entry in document["ranges"]]
    if not float16_features:  # --no-adaln
        extents = [extent for extent in extents if extent.kind != FEATURES]
    try:
        exceptions = choose_recipe(extents).exceptions()
    except InputError as error:
        return [f"--fp16 would refuse: {error}"]
    if not exceptions:
        tightest = max((e for e in extents if e.kind not in SHOWN), key=lambda e: e.max_abs)
        return [
            f"--fp16: nothing out of range; the largest is the {tightest.kind} of {tightest.name},"
            f" {tightest.headroom:.3g} times below float16's limit"
        ]
    return ["--fp16 makes exceptions:"] + [f"  {e['where']}: {e['is']}; {e['why']}" for e in exceptions]
