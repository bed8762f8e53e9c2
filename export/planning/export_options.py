"""The options of an export: each is declared here once, for Python and for the command line.

Nothing heavy is imported: `ditf --help` reads the declarations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union, get_type_hints

from ditf.export.checkpoints import DEMO
from ditf.export.checkpoints.formats.lora.given import Lora, parse_lora
from ditf.runtime.errors import InputError
from ditf.runtime.printable import valid_unicode

DEFAULT_OPSET = 20
OPSETS = range(18, 26)  # torch's exporter writes an invalid Split at 17 and silently stamps 18 at 26

SHORT_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}
"""Short names of the precisions, on the command line and in the names of bundles."""


@dataclass(frozen=True)
class Flag:
    """How an option is written on the command line, and which values it accepts.

    The flag has the name of the field, with dashes. --no-NAME turns off a bool that is true by default.
    Repeating the flag fills a tuple.

    Attributes:
        help: description in `--help`.
        metavar: placeholder of the value in `--help`; a Literal's choices, or the type, by default.
        parse: turns the text into the value; None if the type is enough.
        aliases: further names of the flag, such as "-o".
        shorthands: flags without a value, and the text that each stands for.
        limits: constraints as `pydantic.Field` takes them, such as `ge` and `lt`.
    """

    help: str
    metavar: Optional[str] = None
    parse: Optional[Callable[[str], Any]] = None
    aliases: tuple[str, ...] = ()
    shorthands: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)


def parse_size(text: str) -> tuple[int, int]:
    """Parse "HxW", in pixels.

    Raises:
        InputError: the text is not two positive integers.
    """
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text.lower())
    if not match:
        raise InputError(f"size {text!r} is not HxW", "for example --size 512x768")
    return int(match[1]), int(match[2])


def parse_precision(text: str) -> str:
    """Parse a short name of a precision."""
    if text not in SHORT_NAMES:
        raise InputError(
            f"--precision {text!r} is not {', '.join(SHORT_NAMES)}", "for example --precision fp16"
        )
    return SHORT_NAMES[text]


def parse_discard(text: str) -> Union[str, tuple[int, ...]]:
    """Parse "auto", "published", "none" or channels such as "5,41"."""
    if text in ("auto", "published", "none"):
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"--discard {text!r} is not auto, published, none or channels", "for example 5,41"
        ) from None


def parse_batch(text: str) -> Union[int, str]:
    """Parse a number or "dynamic"."""
    if text == "dynamic":
        return text
    if not text.isdecimal():
        raise InputError(f"--batch {text!r} is not a number or dynamic", "for example --batch 4")
    return int(text)


@dataclass(frozen=True)
class ExportOptions:
    """Options of one export, each described by its flag's help. None and () stand for the family's default.

    Attributes:
        precision: the long name; the command line takes a name of `SHORT_NAMES`.
        timestep, prompt, class_label, prompt_embeds, lora: a tuple; a single value becomes a tuple of one.
        size: (H, W) in pixels.
        adaln: whether the block's norm and modulation are applied to the hidden states.
        command: the command line, which the manifest records.

    Raises:
        InputError: a value has the wrong type or is out of range. The message names its flag.
    """

    model: Annotated[
        str, Flag("'demo', a directory saved by diffusers, a hub id, or with --base a file of weights.")
    ] = DEMO
    base: Annotated[
        Optional[str],
        Flag(
            "Take everything but the transformer from this pipeline; --model is then only a transformer.",
            metavar="ID|DIR",
        ),
    ] = None
    transformer: Annotated[
        Optional[str],
        Flag(
            "Replace the transformer of --model, for example with a fine-tuned one.",
            metavar="FILE|DIR",
        ),
    ] = None
    revision: Annotated[Optional[str], Flag("Branch, tag or commit of a hub id.")] = None
    variant: Annotated[
        Optional[str], Flag("Variant of the weights files, such as fp16; the plain ones by default.")
    ] = None
    vae: Annotated[
        Optional[str],
        Flag(
            "Replace the VAE with another of the same latent space, such as madebyollin/taesd.",
            metavar="ID|DIR",
        ),
    ] = None
    vae_revision: Annotated[Optional[str], Flag("Branch, tag or commit of --vae, if it is a hub id.")] = None
    lora: Annotated[
        tuple[str, ...],
        Flag(
            "Fold a LoRA file into the weights, SCALE times (1 by default); repeat for several.",
            metavar="FILE[=SCALE]",
        ),
    ] = ()
    layer: Annotated[Optional[str], Flag("Block whose input is the feature: 9 or single.9.")] = None
    precision: Annotated[
        Literal["float32", "float16", "bfloat16", "int8"],
        Flag(
            "Precision of weights, GEMMs and attention; fp32 by default.",
            metavar="|".join(SHORT_NAMES),
            parse=parse_precision,
            shorthands={"--fp16": "fp16"},
        ),
    ] = "float32"
    conditioning: Annotated[
        Literal["bake", "bank", "live"],
        Flag("Prompt or class and timestep are a constant, one of several chosen by name, or inputs."),
    ] = "bake"
    timestep: Annotated[tuple[int, ...], Flag("Diffusion timestep, 0..999; repeat for a bank.")] = ()
    prompt: Annotated[tuple[str, ...], Flag("Prompt of a text-conditional model; repeat for a bank.")] = ()
    prompts: Annotated[
        Optional[Path], Flag("File of prompts for a bank, in lines 'name: prompt'.", metavar="FILE")
    ] = None
    prompt_embeds: Annotated[
        tuple[Path, ...],
        Flag(
            "Read embeddings instead of encoding a prompt; needs no text encoders. Repeat for a bank.",
            metavar="FILE",
        ),
    ] = ()
    class_label: Annotated[
        tuple[str, ...],
        Flag("Class of a class-conditional model, number or name; the null class by default."),
    ] = ()
    guidance: Annotated[
        Optional[float],
        Flag(
            "Guidance scale of a guidance-distilled model (FLUX.1-dev).",
            limits={"ge": 0, "le": 100, "allow_inf_nan": False},
        ),
    ] = None
    text_tokens: Annotated[
        Optional[int],
        Flag("Keep only this many T5 tokens, an approximation; all by default.", limits={"ge": 1}),
    ] = None
    text_padding: Annotated[
        Optional[Literal["pipeline", "masked"]],
        Flag(
            "How Chroma reads the padding of its text: as diffusers' pipeline, which only weighs it less, or"
            " masked but for one token, as its authors; pipeline by default."
        ),
    ] = None
    size: Annotated[
        Optional[tuple[int, int]],
        Flag("Input size in pixels; the model's own by default.", metavar="HxW", parse=parse_size),
    ] = None
    seed: Annotated[int, Flag("Seed of the noise.", limits={"ge": 0, "lt": 2**63})] = 0
    ensemble: Annotated[
        int, Flag("Number of noises whose features are averaged.", limits={"ge": 1, "le": 64})
    ] = 1
    discard: Annotated[
        Union[Literal["auto", "published", "none"], tuple[int, ...]],
        Flag(
            "Massive channels to set to zero: auto measures them, published takes DiTF's.",
            metavar="auto|published|none|I,J",
            parse=parse_discard,
        ),
    ] = "auto"
    discard_stage: Annotated[
        Literal["before", "after"], Flag("Set massive channels to zero before or after the norm.")
    ] = "before"
    noise: Annotated[
        Literal["baked", "input"], Flag("Whether the noise is a constant or an input of the graph.")
    ] = "baked"
    adaln: Annotated[
        bool, Flag("Ablation: give the hidden states without norm and modulation, in float32.")
    ] = True
    pca: Annotated[
        Optional[int],
        Flag(
            "Project the features to N channels; the projection is learned from the calibration images.",
            metavar="N",
            limits={"ge": 1},
        ),
    ] = None
    features_dtype: Annotated[
        Optional[Literal["float16", "float32"]],
        Flag("Type of the output; float16 by default, float32 with fp32 or --no-adaln."),
    ] = None
    batch: Annotated[
        Union[int, Literal["dynamic"]],
        Flag("Number of images in one call.", metavar="N|dynamic", parse=parse_batch),
    ] = 1
    opset: Annotated[
        Optional[int],
        Flag(
            f"ONNX opset, {OPSETS[0]}..{OPSETS[-1]}; {DEFAULT_OPSET} by default, or 22 where bf16 needs it.",
            metavar="N",
        ),
    ] = None
    calibration: Annotated[
        Optional[Path],
        Flag(
            "File that ditf calibrate wrote; --discard auto and fp16 use it instead of measuring.",
            metavar="FILE",
        ),
    ] = None
    calibration_images: Annotated[
        Optional[Path],
        Flag("Images to calibrate and to learn --pca from; built-in pictures by default.", metavar="DIR"),
    ] = None
    golden: Annotated[
        Literal["reference", "none"],
        Flag("Record the unmodified model's outputs for ditf check, or none."),
    ] = "reference"
    output: Annotated[
        Optional[Path],
        Flag(
            "Directory of the bundle; bundles/<model>-l<k>-<precision>[-<vae>] by default.",
            metavar="DIR",
            aliases=("-o",),
        ),
    ] = None
    command: str = ""

    def __post_init__(self) -> None:
        from pydantic import ValidationError

        given = dict(vars(self))
        for name in ("timestep", "prompt", "class_label", "prompt_embeds", "lora"):
            value = () if given[name] is None else given[name]
            given[name] = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        given["class_label"] = tuple(map(str, given["class_label"]))
        given["lora"] = tuple(map(str, given["lora"]))
        _check_utf8("--prompt", given["prompt"], "type it in a terminal that uses UTF-8")
        for name in ("model", "base", "transformer", "vae", "lora", "prompt_embeds"):
            paths = given[name] if isinstance(given[name], tuple) else (given[name],)
            _check_utf8("--" + name.replace("_", "-"), paths, "rename it")  # safetensors opens no other names
        try:
            checked = _checks().model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            flag = "--" + str(first["loc"][0]).replace("_", "-")
            raise InputError(
                f"{flag} {first['input']}: {first['msg'].lower()}", "see ditf export --help"
            ) from None
        for name in given:
            object.__setattr__(self, name, getattr(checked, name))
        for text in self.lora:
            parse_lora(text)  # or it is no LoRA file

    @property
    def loras(self) -> tuple[Lora, ...]:
        """The files of --lora with their scales, in order."""
        return tuple(map(parse_lora, self.lora))

    @property
    def inputs(self) -> list[Path]:
        """Existing files and folders that the export reads; hub ids are not among them."""
        models = (self.model, self.base, self.transformer, self.vae)
        named = [Path(one).expanduser() for one in models if one not in (None, DEMO)]
        loras = [lora.path for lora in self.loras]
        given = [self.prompts, *self.prompt_embeds, self.calibration, self.calibration_images, *loras]
        return [path for path in (*named, *given) if path is not None and path.exists()]

    @property
    def opened(self) -> dict[str, Any]:
        """The arguments that `open_checkpoint` takes."""
        return {
            "model": self.model,
            "revision": self.revision,
            "variant": self.variant,
            "unneeded": self.unneeded,
            "base": self.base,
            "transformer": self.transformer,
        }

    @property
    def model_name(self) -> str:
        """The model's name in that of a bundle: of the transformer's file or folder, or of the model."""
        path = Path((self.transformer or self.model).rstrip("/"))
        if path.suffix in (".safetensors", ".sft", ".gguf"):
            return path.stem
        return path.parent.name if path.name == "transformer" and path.parent.name else path.name

    @property
    def float16_features(self) -> bool:
        """Whether the features are float16."""
        if self.features_dtype is not None:
            return self.features_dtype == "float16"
        return self.adaln and self.precision != "float32"

    @property
    def measures_features(self) -> bool:
        """Whether the unmodified model may have to run over the images once more, to see its features.

        It learns --pca from them, or it measures the range of float16 features. A graph that is not float32
        has all its ranges measured anyway, the features' among them; a given calibration has the range of
        one feature, which may be another.
        """
        measured = self.precision != "float32" and self.calibration is None
        return self.pca is not None or (self.float16_features and not measured)

    @property
    def unneeded(self) -> tuple[str, ...]:
        """Starts of the names of components that the checkpoint may lack."""
        return ("text_encoder", "tokenizer") if self.prompt_embeds else ()


def _check_utf8(flag: str, values: tuple[Any, ...], fix: str) -> None:
    """Reject bytes of a command line that are not UTF-8: libraries refuse them late, without saying so."""
    for text in map(str, values):
        if valid_unicode(text) != text:
            raise InputError(f"{flag} {text!r} is not UTF-8", fix)


def flags_of(options: type) -> dict[str, Flag]:
    """Flags of a class's fields, by the fields' names and in their order."""
    hints = get_type_hints(options, include_extras=True)
    return {
        name: flag
        for name, hint in hints.items()
        for flag in getattr(hint, "__metadata__", ())
        if isinstance(flag, Flag)
    }


@cache
def _checks() -> Any:
    """A pydantic model with the types and limits of `ExportOptions`."""
    from pydantic import Field, create_model

    flags = flags_of(ExportOptions)
    fields: dict[str, Any] = {
        name: (kind, Field(**flags[name].limits if name in flags else {}))
        for name, kind in get_type_hints(ExportOptions).items()
    }
    return create_model("Checked", **fields)


def check_opset(opset: Optional[int]) -> None:
    """Reject opsets for which torch writes wrong graphs.

    Raises:
        InputError: the opset is given and not in `OPSETS`.
    """
    if opset is not None and opset not in OPSETS:
        raise InputError(
            f"opset {opset} is not supported", f"choose {OPSETS[0]}..{OPSETS[-1]}, or leave --opset out"
        )
