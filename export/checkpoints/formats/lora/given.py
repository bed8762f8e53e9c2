"""A LoRA that the user names: its file and how strongly it counts. Nothing heavy is imported here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ditf.runtime.errors import InputError
from ditf.runtime.files.hashed import sha256


@dataclass(frozen=True)
class Lora:
    """One LoRA file.

    Attributes:
        path: the safetensors file.
        scale: the factor of its changes, as `lora_scale` of diffusers' `fuse_lora`.
    """

    path: Path
    scale: float = 1.0

    @property
    def name(self) -> str:
        """The name of the file, with the scale if it is not 1."""
        return self.path.stem if self.scale == 1 else f"{self.path.stem}-{self.scale:g}"

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the file in hexadecimal digits; the file is read once."""
        return sha256(self.path)


def parse_lora(text: str) -> Lora:
    """Parse "FILE" or "FILE=SCALE". What follows the last "=" is a scale if it is a number.

    A file whose own name ends in such a number is meant if it exists; "FILE=1" scales it.

    Raises:
        InputError: there is no such safetensors file, or the scale is 0 or not finite.
    """
    path, scale = Path(text).expanduser(), 1.0
    name, sign, number = text.rpartition("=")
    if sign and not path.exists():
        try:
            scale = float(number)
        except ValueError:  # the "=" belongs to the name
            pass
        else:
            path = Path(name).expanduser()
    if not math.isfinite(scale) or scale == 0:
        raise InputError(f"--lora {text}: a scale of {scale} is of no use", "for example --lora FILE=0.8")
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        fix = f"pass the file in it: --lora {found[0]}" if found else "pass a safetensors file"
        raise InputError(f"--lora {path} is a directory", fix)
    if not path.exists():
        raise InputError(f"--lora {path}: no such file", "pass a safetensors file, or FILE=SCALE")
    if path.suffix != ".safetensors":
        raise InputError(
            f"--lora {path} is not a safetensors file",
            "save it as safetensors; pickles (.bin, .pt, .ckpt) can run code when loaded, and are not read",
        )
    return Lora(path, scale)
