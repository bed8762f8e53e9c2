"""`ditf export`, also `ditf-export`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import typer

from ditf.cli.console import (
    JsonOption,
    QuietOption,
    VerboseOption,
    bytes_text,
    check_writable,
    parse_size,
    show,
    stages,
    state,
    write_json,
)
from ditf.runtime.bundle import Bundle
from ditf.runtime.errors import InputError, missing_extra


def export(
    model: Annotated[str, typer.Option(help="'demo', a directory saved by diffusers, or a hub id.")] = "demo",
    layer: Annotated[
        Optional[str], typer.Option(help="Block whose input is the feature: 9 or block.9.")
    ] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="float16 with float32 islands.")] = False,
    timestep: Annotated[Optional[int], typer.Option(help="Diffusion timestep, 0..999.")] = None,
    prompt: Annotated[Optional[str], typer.Option(help="For text-conditional models.")] = None,
    class_label: Annotated[
        Optional[int], typer.Option(help="For class-conditional models; the null class by default.")
    ] = None,
    size: Annotated[
        Optional[str], typer.Option(metavar="HxW", help="Input size in pixels; the model's own by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    ensemble: Annotated[int, typer.Option(help="Noises averaged inside the graph.")] = 1,
    discard: Annotated[
        str, typer.Option(metavar="auto|none|I,J", help="Massive channels to zero; auto measures them.")
    ] = "auto",
    discard_stage: Annotated[
        str, typer.Option(metavar="before|after", help="Zero them before or after the norm.")
    ] = "before",
    noise: Annotated[
        str, typer.Option(metavar="baked|input", help="A constant, or an input of the graph.")
    ] = "baked",
    no_adaln: Annotated[
        bool, typer.Option("--no-adaln", help="Ablation: hidden states without the norm; output in float32.")
    ] = False,
    batch: Annotated[str, typer.Option(metavar="N|dynamic", help="Images in one call.")] = "1",
    opset: Annotated[int, typer.Option(help="ONNX opset, 18..25.")] = 20,
    calibration_images: Annotated[
        Optional[Path], typer.Option(metavar="DIR", help="Images for --discard auto; built-in by default.")
    ] = None,
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", metavar="DIR", help="bundles/<model>-l<k>-<precision> by default."),
    ] = None,
    json_file: JsonOption = None,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Trace a checkpoint up to a layer and write a bundle."""
    check_writable(json_file)
    values: dict[str, Any] = {
        "model": model,
        "layer": layer,
        "fp16": fp16,
        "timestep": timestep,
        "prompt": prompt,
        "class_label": class_label,
        "size": None if size is None else parse_size(size),
        "seed": seed,
        "ensemble": ensemble,
        "discard": _parse_discard(discard),
        "discard_stage": discard_stage,
        "noise": noise,
        "adaln": not no_adaln,
        "batch": _parse_batch(batch),
        "opset": opset,
        "calibration_images": calibration_images,
        "output": output,
        "command": state.command,
    }
    try:
        from pydantic import ValidationError

        from ditf.export.exporter import STAGES, export_bundle
        from ditf.export.options import ExportOptions
        from ditf.export.pretrained import quieten_libraries
    except ImportError as error:
        raise missing_extra(error.name or "a package of the exporter", "export") from error
    try:
        options = ExportOptions(**values)
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        raise InputError(
            f"{flag} {first['input']}: {first['msg'].lower()}", "see ditf export --help"
        ) from None
    if not state.verbose:
        quieten_libraries()
    with stages(STAGES) as report:
        path = export_bundle(options, report)
    manifest = Bundle.open(path).manifest
    size_text = bytes_text(sum(file["bytes"] for file in manifest.files.values()))
    height, width = manifest.size
    show(
        f"{path}: {manifest.layer_name}, {manifest.precision}, {height}x{width} px ->"
        f" {manifest.channels}x{manifest.grid[0]}x{manifest.grid[1]}, {size_text}"
    )
    write_json(json_file, {"bundle": str(path), "layer": manifest.layer, "layer_name": manifest.layer_name})


def _parse_discard(text: str) -> Union[Literal["auto", "none"], tuple[int, ...]]:
    if text == "auto":
        return "auto"
    if text == "none":
        return "none"
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--discard {text!r} is not auto, none or channels", "for example 5,41") from None


def _parse_batch(text: str) -> Union[int, Literal["dynamic"]]:
    if text == "dynamic":
        return "dynamic"
    if not text.isdecimal():
        raise InputError(f"--batch {text!r} is not a number or dynamic", "for example --batch 4")
    return int(text)
