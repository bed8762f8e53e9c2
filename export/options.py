"""What the user asks of an export, checked before anything heavy starts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Optional, Union

from pydantic import BaseModel, ConfigDict, Field

from ditf.export.checkpoint import DEMO
from ditf.export.onnx_file import DEFAULT_OPSET


class ExportOptions(BaseModel):
    """Options of one export; None means the family's default.

    Attributes:
        model: "demo", a checkpoint directory or a hub id.
        layer: "9" or "double.9".
        discard: "auto", "none", or channels.
        size: (H, W) in pixels.
        batch: images in one call of the graph, or "dynamic".
        calibration_images: folder of images instead of the built-in ones.
        output: bundle directory, bundles/<model>-l<k>-<precision> by default.
        command: recorded in the manifest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = DEMO
    layer: Optional[str] = None
    fp16: bool = False
    timestep: Optional[int] = Field(None, ge=0)
    prompt: Optional[str] = None
    class_label: Optional[int] = Field(None, ge=0)
    size: Optional[tuple[int, int]] = None
    seed: int = Field(0, ge=0, lt=2**63)
    ensemble: int = Field(1, ge=1, le=64)
    noise: Literal["baked", "input"] = "baked"
    adaln: bool = True
    discard: Union[Literal["auto", "none"], tuple[int, ...]] = "auto"
    discard_stage: Literal["before", "after"] = "before"
    batch: Union[int, Literal["dynamic"]] = 1
    opset: int = DEFAULT_OPSET
    calibration_images: Optional[Path] = None
    output: Optional[Path] = None
    command: str = ""

    @property
    def precision(self) -> Literal["float16", "float32"]:
        return "float16" if self.fp16 else "float32"
