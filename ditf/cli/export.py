"""`ditf export`, also `ditf-export`: a checkpoint becomes a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, Union

import typer

from ditf.cli.build import TargetOption, build_targets
from ditf.cli.support.console import (
    FeaturesDtypeOption,
    JsonOption,
    QuietOption,
    VaeOption,
    VerboseOption,
    bytes_text,
    check_writable,
    parse_size,
    pca_text,
    show,
    stages,
    state,
    vae_text,
    write_json,
)
from ditf.runtime.backends.flavour import choose_flavour
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.bundles.staging import check_output
from ditf.runtime.errors import InputError, missing_extra

if TYPE_CHECKING:
    from ditf.export.planning.options import ExportOptions


PromptEmbedsOption = Annotated[
    Optional[list[Path]],
    typer.Option(
        metavar="FILE",
        help="Embeddings instead of a prompt: text encoders need not be there; repeat for a bank.",
    ),
]


def export(
    model: Annotated[str, typer.Option(help="'demo', a directory saved by diffusers, or a hub id.")] = "demo",
    revision: Annotated[Optional[str], typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    variant: Annotated[
        Optional[str], typer.Option(help="Of the weights, such as fp16; the plain ones by default.")
    ] = None,
    vae: VaeOption = None,
    vae_revision: Annotated[
        Optional[str], typer.Option(help="Branch, tag or commit of --vae, where it is a hub id.")
    ] = None,
    layer: Annotated[
        Optional[str],
        typer.Option(help="Block whose input is the feature: 9 or single.9."),
    ] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="Short for --precision fp16.")] = False,
    precision: Annotated[
        Optional[str],
        typer.Option(metavar="fp32|fp16|bf16|int8", help="Of weights, GEMMs and attention; fp32 by default."),
    ] = None,
    conditioning: Annotated[
        str,
        typer.Option(
            metavar="bake|bank|live",
            help="The condition: a constant, one of several chosen by name, or an input.",
        ),
    ] = "bake",
    timestep: Annotated[
        Optional[list[int]], typer.Option(help="Diffusion timestep, 0..999; repeat it for a bank.")
    ] = None,
    prompt: Annotated[
        Optional[list[str]], typer.Option(help="For text-conditional models; repeat it for a bank.")
    ] = None,
    prompts: Annotated[
        Optional[Path], typer.Option(metavar="FILE", help="Prompts for a bank, in lines 'name: prompt'.")
    ] = None,
    prompt_embeds: PromptEmbedsOption = None,
    save_prompt_embeds: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE", help="Only encode the prompt, for --prompt-embeds on another machine."),
    ] = None,
    class_label: Annotated[
        Optional[list[str]],
        typer.Option(help="For class-conditional models, number or name; the null class by default."),
    ] = None,
    guidance: Annotated[
        Optional[float], typer.Option(help="For guidance-distilled models (FLUX.1-dev).")
    ] = None,
    text_tokens: Annotated[
        Optional[int], typer.Option(help="T5 tokens to keep: an approximation; all by default.")
    ] = None,
    size: Annotated[
        Optional[str], typer.Option(metavar="HxW", help="Input size in pixels; the model's own by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    ensemble: Annotated[int, typer.Option(help="Noises averaged inside the graph.")] = 1,
    discard: Annotated[
        str,
        typer.Option(
            metavar="auto|published|none|I,J",
            help="Massive channels to zero; auto measures them, published takes DiTF's.",
        ),
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
    pca: Annotated[
        Optional[int],
        typer.Option(metavar="N", help="Project the features to N channels, learned from the images."),
    ] = None,
    features_dtype: FeaturesDtypeOption = None,
    batch: Annotated[str, typer.Option(metavar="N|dynamic", help="Images in one call.")] = "1",
    opset: Annotated[int, typer.Option(help="ONNX opset, 18..25.")] = 20,
    calibration: Annotated[
        Optional[Path], typer.Option(metavar="FILE", help="What ditf calibrate wrote, for --discard auto.")
    ] = None,
    calibration_images: Annotated[
        Optional[Path],
        typer.Option(metavar="DIR", help="For --discard auto and --pca; built-in by default."),
    ] = None,
    golden: Annotated[
        str,
        typer.Option(
            metavar="reference|none",
            help="Run the unmodified model, which ditf check compares with; none leaves it out.",
        ),
    ] = "reference",
    output: Annotated[
        Optional[Path],
        typer.Option(
            "--output", "-o", metavar="DIR", help="bundles/<model>-l<k>-<precision>[-<vae>] by default."
        ),
    ] = None,
    build: Annotated[bool, typer.Option("--build", help="Then build an engine, as ditf build does.")] = False,
    target: TargetOption = None,
    json_file: JsonOption = None,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Trace a checkpoint up to a layer and write a bundle."""
    check_writable(json_file, save_prompt_embeds, inputs=prompt_embeds or ())
    values: dict[str, Any] = {
        "model": model,
        "revision": revision,
        "variant": variant,
        "vae": vae,
        "vae_revision": vae_revision,
        "layer": layer,
        "precision": parse_precision(precision, fp16),
        "conditioning": conditioning,
        "timestep": timestep,
        "prompt": prompt,
        "prompts": prompts,
        "prompt_embeds": prompt_embeds,
        "class_label": class_label,
        "guidance": guidance,
        "text_tokens": text_tokens,
        "size": None if size is None else parse_size(size),
        "seed": seed,
        "ensemble": ensemble,
        "discard": _parse_discard(discard),
        "discard_stage": discard_stage,
        "noise": noise,
        "adaln": not no_adaln,
        "pca": pca,
        "features_dtype": features_dtype,
        "batch": _parse_batch(batch),
        "opset": opset,
        "calibration": calibration,
        "calibration_images": calibration_images,
        "golden": golden,
        "output": output,
        "command": state.command,
    }
    options = options_of(values)
    if output is not None:
        check_output(output, options.inputs)
    if target is not None and not build:
        raise InputError("--target is of an engine", "add --build")
    if build:
        choose_flavour("auto")  # or fail before the long work
    with needs_exporter():
        from ditf.export.checkpoints.loading import quieten_libraries

        if not state.verbose:
            quieten_libraries()  # before the exporter imports what warns
        from ditf.export.exporter import export_bundle, stage_count
        from ditf.export.planning.save_prompt import save_prompt
    if save_prompt_embeds is not None:
        name = save_prompt(options, save_prompt_embeds)
        show(f"{save_prompt_embeds}: embeddings of {name!r}")
        write_json(json_file, {"prompt_embeds": str(save_prompt_embeds), "prompt": name})
        return
    with stages(stage_count(options)) as report:
        path = export_bundle(options, report, report.amount)
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


def options_of(values: dict[str, Any]) -> ExportOptions:
    """Options checked one by one, before anything heavy is imported.

    Raises:
        InputError: names the first flag that is wrong.
    """
    with needs_exporter():
        from pydantic import ValidationError

        from ditf.export.planning.options import ExportOptions
    try:
        return ExportOptions(**values)
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        raise InputError(
            f"{flag} {first['input']}: {first['msg'].lower()}", "see ditf export --help"
        ) from None


@contextmanager
def needs_exporter() -> Iterator[None]:
    """Turns a failed import into the line that installs what is missing."""
    try:
        yield
    except ImportError as error:
        package = (error.name or "a package of the exporter").partition(".")[0]
        raise missing_extra(package, "export") from error


def _parse_discard(text: str) -> Union[str, tuple[int, ...]]:
    if text in ("auto", "published", "none"):
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"--discard {text!r} is not auto, published, none or channels", "for example 5,41"
        ) from None


def parse_precision(text: Optional[str], fp16: bool) -> str:
    """The precision that --precision or --fp16 names.

    Raises:
        InputError: unknown, or the two contradict each other.
    """
    with needs_exporter():
        from ditf.export.planning.options import SHORT_NAMES
    if text is None:
        text = "fp16" if fp16 else "fp32"
    if text not in SHORT_NAMES:
        raise InputError(
            f"--precision {text!r} is not {', '.join(SHORT_NAMES)}", "for example --precision fp16"
        )
    if fp16 and text != "fp16":
        raise InputError(f"--fp16 and --precision {text} contradict each other", "give one of them")
    return SHORT_NAMES[text]


def _parse_batch(text: str) -> Union[int, Literal["dynamic"]]:
    if text == "dynamic":
        return "dynamic"
    if not text.isdecimal():
        raise InputError(f"--batch {text!r} is not a number or dynamic", "for example --batch 4")
    return int(text)
