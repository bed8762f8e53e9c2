"""What the user asks of an export, checked before anything heavy starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Optional, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from ditf.export.checkpoints.opening import DEMO
from ditf.runtime.errors import InputError

DEFAULT_OPSET = 20
OPSETS = range(18, 26)  # torch's exporter writes an invalid Split at 17 and silently stamps 18 at 26

SHORT_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}
"""Precisions by their names on the command line and in a bundle's."""


class ExportOptions(BaseModel):
    """Options of one export; None or () means the family's default.

    Attributes:
        model: "demo", a checkpoint directory or a hub id.
        revision: of a hub model; variant: of the weights, such as "fp16".
        vae: another encoder of the same latent space, a directory or a hub id; vae_revision: of a hub id.
        layer: "9" or "double.9".
        precision: of weights, GEMMs and attention.
        conditioning: "bake", "bank" or "live".
        timestep, prompt, class_label: one or, with a bank, several; class labels by number or name.
        prompts: a file of lines `name: prompt`.
        prompt_embeds: files of embeddings (`ditf.export.planning.prompt_embeds`) in place of prompts.
        guidance: for guidance-distilled models.
        text_tokens: T5 tokens to keep, an approximation.
        discard: "auto" measures, "published" takes the family's, "none", or channels.
        size: (H, W) in pixels.
        pca: channels that a projection learned at export leaves; None for all.
        features_dtype: of the output; None for float16, or float32 where the precision is or with adaln off.
        batch: images in one call of the graph, or "dynamic".
        calibration: what `ditf calibrate` wrote; "auto" takes its channels.
        calibration_images: folder of images instead of the built-in ones.
        golden: "none" leaves the unmodified model out: nothing is measured, and nothing recorded for a check.
        output: bundle directory, bundles/<model>-l<k>-<precision> by default.
        command: recorded in the manifest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = DEMO
    revision: Optional[str] = None
    variant: Optional[str] = None
    vae: Optional[str] = None
    vae_revision: Optional[str] = None
    layer: Optional[str] = None
    precision: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    conditioning: Literal["bake", "bank", "live"] = "bake"
    timestep: tuple[int, ...] = ()
    prompt: tuple[str, ...] = ()
    prompts: Optional[Path] = None
    prompt_embeds: tuple[Path, ...] = ()
    class_label: tuple[str, ...] = ()
    guidance: Optional[float] = Field(None, ge=0, le=100, allow_inf_nan=False)
    text_tokens: Optional[int] = Field(None, ge=1)
    size: Optional[tuple[int, int]] = None
    seed: int = Field(0, ge=0, lt=2**63)
    ensemble: int = Field(1, ge=1, le=64)
    noise: Literal["baked", "input"] = "baked"
    adaln: bool = True
    discard: Union[Literal["auto", "published", "none"], tuple[int, ...]] = "auto"
    discard_stage: Literal["before", "after"] = "before"
    pca: Optional[int] = Field(default=None, ge=1)
    features_dtype: Optional[Literal["float16", "float32"]] = None
    batch: Union[int, Literal["dynamic"]] = 1
    opset: int = DEFAULT_OPSET
    calibration: Optional[Path] = None
    calibration_images: Optional[Path] = None
    golden: Literal["reference", "none"] = "reference"
    output: Optional[Path] = None
    command: str = ""

    @property
    def inputs(self) -> list[Path]:
        """Files and folders that the export reads; a hub id is none."""
        named = [Path(one).expanduser() for one in (self.model, self.vae) if one not in (None, DEMO)]
        given = [self.prompts, *self.prompt_embeds, self.calibration, self.calibration_images]
        return [path for path in (*named, *given) if path is not None and path.exists()]

    @property
    def surveys(self) -> bool:
        """Whether the unmodified model has to run over the images once more, to see its features.

        It learns --pca from them, or it measures the range of float16 features. A graph that is not float32
        has all its ranges measured anyway, the features' among them; a given calibration has that of the
        default feature only.
        """
        default = self.adaln and self.discard_stage == "before"
        measured = self.precision != "float32" and (self.calibration is None or default)
        normed = self.features_dtype is None and self.adaln and self.precision != "float32"
        float16 = self.features_dtype == "float16" or normed
        return self.pca is not None or (float16 and not measured)

    @property
    def unneeded(self) -> tuple[str, ...]:
        """Components of the checkpoint, by the start of their names, that need not be there."""
        return ("text_encoder", "tokenizer") if self.prompt_embeds else ()

    @field_validator("timestep", "prompt", "class_label", "prompt_embeds", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None:
            return ()
        values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        return tuple(map(str, values)) if info.field_name == "class_label" else values


def check_opset(opset: int) -> None:
    """Reject opsets known to come out wrong.

    Raises:
        InputError: outside `OPSETS`.
    """
    if opset not in OPSETS:
        raise InputError(
            f"opset {opset} is not supported", f"choose {OPSETS[0]}..{OPSETS[-1]}, default {DEFAULT_OPSET}"
        )
