"""The latent space of a checkpoint: its VAE, or pixels where it has none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKL

from ditf.export.checkpoint import Checkpoint
from ditf.export.pretrained import load_model
from ditf.runtime.errors import InputError

_SUPPORTED = "AutoencoderKL"


@dataclass(frozen=True)
class LatentSpace:
    """Shape and scaling of x_0.

    Attributes:
        stride: image pixels along the side of a latent pixel; 1 without a VAE.
        channels: of x_0.
        shift, scale: x_0 = (posterior mean - shift) * scale.
        vae: folder of the VAE, None when the model works in pixels.
    """

    stride: int
    channels: int
    shift: float
    scale: float
    vae: Path | None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> LatentSpace:
        """Read it from the checkpoint's configs.

        Raises:
            InputError: a VAE of an unsupported class.
        """
        if not checkpoint.has("vae"):
            channels = int(checkpoint.config("transformer")["in_channels"])
            if channels != 3:
                raise InputError(
                    f"{checkpoint.id} has no vae/ but its transformer takes {channels} channels",
                    "save the whole pipeline",
                )
            return cls(stride=1, channels=3, shift=0.0, scale=1.0, vae=None)
        config = checkpoint.config("vae")
        if config.get("_class_name") != _SUPPORTED:
            raise InputError(
                f"VAE class {config.get('_class_name')} is not supported", f"supported: {_SUPPORTED}"
            )
        return cls(
            stride=2 ** (len(config["block_out_channels"]) - 1),
            channels=int(config["latent_channels"]),
            shift=float(config.get("shift_factor") or 0.0),
            scale=float(config.get("scaling_factor") or 1.0),
            vae=checkpoint.path / "vae",
        )

    def load_vae(self) -> AutoencoderKL:
        """The unmodified VAE in float32."""
        assert self.vae is not None
        vae: AutoencoderKL = load_model(AutoencoderKL, self.vae)
        return vae
