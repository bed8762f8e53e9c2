"""The latent space of a checkpoint: its VAE, or pixels where it has none."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import AutoencoderKL

from ditf.export.checkpoint import Checkpoint
from ditf.export.pretrained import full_config, load_model
from ditf.runtime.errors import InputError

_SUPPORTED = "AutoencoderKL"


@dataclass(frozen=True)
class LatentSpace:
    """Shape and scaling of x_0.

    Attributes:
        stride: image pixels along the side of a latent pixel; 1 without a VAE.
        channels: of x_0.
        shift, scale: x_0 = (posterior mean - shift) * scale.
        vae: False when the model works in pixels.
    """

    stride: int
    channels: int
    shift: float
    scale: float
    vae: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint, channels: int) -> LatentSpace:
        """Read it from the checkpoint's configs.

        Args:
            channels: of the latents that the transformer takes.

        Raises:
            InputError: a VAE of an unsupported class, or one that does not fit the transformer.
        """
        if not checkpoint.has("vae"):
            if channels != 3:
                raise InputError(
                    f"{checkpoint.id} has no vae/ but its transformer takes {channels} channels",
                    "save the whole pipeline",
                )
            return cls(stride=1, channels=3, shift=0.0, scale=1.0, vae=False)
        config = checkpoint.config("vae")
        if config.get("_class_name") != _SUPPORTED:
            raise InputError(
                f"VAE class {config.get('_class_name')} is not supported", f"supported: {_SUPPORTED}"
            )
        config = full_config(_SUPPORTED, config)
        if int(config["latent_channels"]) != channels:
            raise InputError(
                f"the VAE of {checkpoint.id} has {config['latent_channels']} channels, its transformer takes"
                f" {channels}",
                "this is not a text-to-image checkpoint, or its parts do not belong together",
            )
        stages, scale = config["block_out_channels"], config["scaling_factor"]
        if not stages or not scale:
            raise InputError(
                f"the VAE of {checkpoint.id} has block_out_channels={stages}, scaling_factor={scale}",
                "download the checkpoint again",
            )
        return cls(
            stride=2 ** (len(stages) - 1),
            channels=int(config["latent_channels"]),
            shift=float(config.get("shift_factor") or 0.0),
            scale=float(scale),
            vae=True,
        )

    def load_vae(self, checkpoint: Checkpoint) -> AutoencoderKL:
        """The unmodified VAE in float32."""
        vae: AutoencoderKL = load_model(AutoencoderKL, checkpoint, "vae")
        return vae
