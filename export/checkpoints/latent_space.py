"""The latent space of a checkpoint, and the encoders into it: its VAE, another one, or pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch.nn import functional

from ditf.export.checkpoints.components import check_depth
from ditf.export.checkpoints.layout import Checkpoint, Part
from ditf.export.checkpoints.loading import check_structure, full_config, load_model
from ditf.runtime.errors import InputError

PLAIN, PACKED, TINY = "AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderTiny"
"""VAE classes: the usual one, FLUX.2's, and TAESD's."""

_DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
_AGAIN = "correct its config.json, or take the published one"


@dataclass(frozen=True)
class LatentSpace:
    """The space of x_0, and the encoder into it.

    Attributes:
        stride: how many image pixels one pixel of x_0 covers along a side; 1 without a VAE.
        channels: number of channels of x_0.
        shift, scale: x_0 = (posterior mean - shift) * scale. AutoencoderTiny's latents are already scaled, so
            its config has 0 and 1.
        source: the VAE, or None when the model works in pixels.
        name: diffusers class of the VAE.
        patch: side of the squares of VAE latents that are packed into one pixel of x_0. Where it is not 1,
            a batch norm of the VAE shifts and scales each channel (`Flux2Pipeline._encode_vae_image`).
    """

    stride: int
    channels: int
    shift: float = 0.0
    scale: float = 1.0
    source: Part | None = None
    name: str = ""
    patch: int = 1

    @property
    def vae(self) -> bool:
        """False when the model works in pixels."""
        return self.source is not None

    @classmethod
    def of(cls, checkpoint: Checkpoint, channels: int, shifts: bool = True) -> LatentSpace:
        """The latent space of a checkpoint, read from its configs.

        Args:
            channels: how many channels the transformer takes.
            shifts: whether the checkpoint's pipeline subtracts the VAE's `shift_factor`.

        Raises:
            InputError: the VAE's class or config is not supported, or the VAE does not fit the transformer.
        """
        if not checkpoint.has("vae"):
            if channels != 3:
                raise InputError(
                    f"{checkpoint.id} has no vae/ but its transformer takes {channels} channels",
                    "save the whole pipeline",
                )
            return cls(stride=1, channels=3)
        found = cls._read(Part(checkpoint, "vae"), f"the VAE of {checkpoint.id}")
        if found.channels != channels:
            raise InputError(
                f"the VAE of {checkpoint.id} has {found.channels // found.patch**2} channels, its transformer"
                f" takes {channels}",
                "this is not a text-to-image checkpoint, or its parts do not belong together",
            )
        if found.shift and not shifts:
            raise InputError(
                f"the VAE of {checkpoint.id} has shift_factor={found.shift:g}, which the pipelines of this"
                " model do not subtract",
                "set shift_factor to null in vae/config.json if the transformer was trained without it",
            )
        return found

    def encoded_by(self, vae: Part) -> LatentSpace:
        """This latent space with the encoder of another VAE (--vae).

        Only the shapes are compared here; `ditf.export.measure.vae_compatibility` compares the latents.

        Args:
            vae: the replacement; its config is read, its weights are not.

        Raises:
            InputError: this space has no VAE or a packed one, or the latents of `vae` have another shape.
        """
        if not self.vae:
            raise InputError("--vae: this model works in pixels and has no VAE", "leave --vae out")
        if self.patch != 1:
            raise InputError(
                f"--vae: the latents of {self.name} are packed and normed by its own batch norm, which no"
                " other VAE has",
                "leave --vae out",
            )
        other = self._read(vae, f"--vae {vae.checkpoint.id}")
        if other.patch != 1:
            raise InputError(f"--vae {vae.checkpoint.id} is an {other.name}", f"choose an {PLAIN} or {TINY}")
        if (other.channels, other.stride) != (self.channels, self.stride):
            raise InputError(
                f"--vae {vae.checkpoint.id} has {other.channels} channels at a stride of {other.stride}, the"
                f" model's own VAE {self.channels} at {self.stride}",
                "choose a VAE of the same latent space",
            )
        return other

    @classmethod
    def _read(cls, part: Part, what: str) -> LatentSpace:
        config = part.config()
        name = str(config.get("_class_name"))
        if name not in (PLAIN, PACKED, TINY):
            raise InputError(
                f"{what} is of class {name}, which is not supported", f"supported: {PLAIN}, {PACKED}, {TINY}"
            )
        check_depth(what, config)
        config = full_config(name, config)
        stages = config["encoder_block_out_channels" if name == TINY else "block_out_channels"]
        scale = config.get("scaling_factor", 1.0)
        if not stages or not scale:
            raise InputError(f"{what} has block_out_channels={stages}, scaling_factor={scale}", _AGAIN)
        if config["in_channels"] != 3:
            raise InputError(f"{what} encodes {config['in_channels']} channels, not RGB", "choose another")
        _CHECKS[name](config, what)
        patch = int(config["patch_size"][0]) if name == PACKED else 1
        return cls(
            stride=2 ** (len(stages) - 1) * patch,
            channels=int(config["latent_channels"]) * patch**2,
            shift=float(config.get("shift_factor") or 0.0),
            scale=float(scale),
            source=part,
            name=name,
            patch=patch,
        )

    def identity(self) -> dict[str, str | None]:
        """Id, revision and class of the VAE, as the manifest records them."""
        assert self.source is not None
        checkpoint = self.source.checkpoint
        return {"id": checkpoint.id, "revision": checkpoint.revision, "class": self.name}

    def config(self) -> dict[str, Any]:
        """The VAE's config, with defaults for what it leaves out."""
        assert self.source is not None
        return full_config(self.name, self.source.config())

    def load_vae(self) -> Any:
        """The unmodified VAE in float32.

        Raises:
            InputError: its weights are missing, damaged or those of another model.
        """
        assert self.source is not None
        return load_model(getattr(diffusers, self.name), self.source.checkpoint, self.source.name)

    def check_weights(self) -> None:
        """Compare the VAE's tensors with its config; no value is read.

        Raises:
            InputError: as for `check_structure`; the message names the VAE.
        """
        if self.source is not None:
            what = f"the VAE of {self.source.checkpoint.id} ({self.name})"
            check_structure(self.name, self.config(), self.source.weights(), what=what)

    def shift_and_scale(self, vae: Any) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """Shift and scale of x_0: numbers, or float32 [c, 1, 1] from the batch norm of a packed VAE."""
        if self.patch == 1:
            return self.shift, self.scale
        variance = vae.bn.running_var + vae.config.batch_norm_eps
        return vae.bn.running_mean[:, None, None], variance.rsqrt()[:, None, None]

    @torch.no_grad()
    def encode(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Encode as the unmodified VAE and its diffusers pipeline do; returns x_0, float32 [n, c, h', w'].

        Args:
            vae: from `load_vae`; None for a model that works in pixels.
            pixels: in [-1, 1], float32 [n, 3, H, W].
        """
        if vae is None:
            return pixels
        encoded = vae.encode(pixels.to(vae.dtype))
        if self.name == TINY:
            latents: torch.Tensor = encoded.latents.float()
            return (latents - self.shift) * self.scale
        mean: torch.Tensor = encoded.latent_dist.mean.float()
        if self.patch == 1:
            return (mean - self.shift) * self.scale
        packed: torch.Tensor = diffusers.Flux2KleinPipeline._patchify_latents(mean)
        norm = vae.bn
        normed: torch.Tensor = functional.batch_norm(
            packed, norm.running_mean, norm.running_var, eps=norm.eps
        )
        return normed


def _check_plain(config: dict[str, Any], what: str) -> None:
    """Check what the pipelines rely on: they read neither latents_mean nor latents_std."""
    for key in ("latents_mean", "latents_std"):
        if config[key] is not None:
            raise InputError(
                f"{what} has {key}, with which no pipeline of a supported model normalises its latents",
                f"set {key} to null in the VAE's config.json if the transformer was trained without it",
            )
    _check_blocks(config, what)


def _check_packed(config: dict[str, Any], what: str) -> None:
    if list(config["patch_size"]) != [2, 2]:
        raise InputError(f"{what} has patch_size={config['patch_size']}", "supported: [2, 2]")
    _check_blocks(config, what)


def _check_blocks(config: dict[str, Any], what: str) -> None:
    """Check that every stage of the encoder but the last halves the image, on which the stride relies."""
    for block in config["down_block_types"]:
        if block not in _DOWN_BLOCKS:
            raise InputError(
                f"{what} has down_block_types of {block}", f"supported: {', '.join(_DOWN_BLOCKS)}"
            )


def _check_tiny(config: dict[str, Any], what: str) -> None:
    """Check what the graph relies on and every published AutoencoderTiny has."""
    if config["act_fn"] != "relu":
        raise InputError(f"{what} has act_fn={config['act_fn']!r}", "supported: relu")
    widths = config["encoder_block_out_channels"]
    if len(set(widths)) > 1:  # its downsampling convolutions keep the number of channels
        raise InputError(f"{what} has encoder_block_out_channels={list(widths)}", "they have to be equal")


_CHECKS = {PLAIN: _check_plain, PACKED: _check_packed, TINY: _check_tiny}
"""What a VAE's config must have, by class."""
