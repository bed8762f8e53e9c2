"""The latent space of a checkpoint: its VAE, or pixels where it has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2

from ditf.export.checkpoint import Checkpoint
from ditf.export.pretrained import full_config, load_model
from ditf.runtime.errors import InputError

_PLAIN, _PACKED = "AutoencoderKL", "AutoencoderKLFlux2"


@dataclass(frozen=True)
class LatentSpace:
    """Shape and scaling of x_0.

    Attributes:
        stride: image pixels along the side of a pixel of x_0; 1 without a VAE.
        channels: of x_0.
        shift, scale: x_0 = (posterior mean - shift) * scale.
        vae: False when the model works in pixels.
        patch: side of the squares of the VAE's latents that are a pixel of x_0; where it is not 1, a batch
            norm of the VAE shifts and scales each channel instead (`Flux2Pipeline._encode_vae_image`).
    """

    stride: int
    channels: int
    shift: float
    scale: float
    vae: bool
    patch: int = 1

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
        name = str(config.get("_class_name"))
        if name not in (_PLAIN, _PACKED):
            raise InputError(f"VAE class {name} is not supported", f"supported: {_PLAIN}, {_PACKED}")
        config = full_config(name, config)
        patch = int(config["patch_size"][0]) if name == _PACKED else 1
        if int(config["latent_channels"]) * patch**2 != channels:
            raise InputError(
                f"the VAE of {checkpoint.id} has {config['latent_channels']} channels, its transformer takes"
                f" {channels}",
                "this is not a text-to-image checkpoint, or its parts do not belong together",
            )
        stages, scale = config["block_out_channels"], config.get("scaling_factor", 1.0)
        if not stages or not scale:
            raise InputError(
                f"the VAE of {checkpoint.id} has block_out_channels={stages}, scaling_factor={scale}",
                "download the checkpoint again",
            )
        return cls(
            stride=2 ** (len(stages) - 1) * patch,
            channels=channels,
            shift=float(config.get("shift_factor") or 0.0),
            scale=float(scale),
            vae=True,
            patch=patch,
        )

    def load_vae(self, checkpoint: Checkpoint) -> Any:
        """The unmodified VAE in float32."""
        vae: Any = load_model(AutoencoderKL if self.patch == 1 else AutoencoderKLFlux2, checkpoint, "vae")
        return vae

    def shift_and_scale(self, vae: Any) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """Shift and scale of x_0; where they are the VAE's, each [c, 1, 1] float32."""
        if self.patch == 1:
            return self.shift, self.scale
        variance = vae.bn.running_var + vae.config.batch_norm_eps
        return vae.bn.running_mean[:, None, None], variance.rsqrt()[:, None, None]
