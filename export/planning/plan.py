"""What an export will do: everything that is decided, and refused, before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ditf.calib.images import COUNT
from ditf.export.checkpoints import DEMO
from ditf.export.checkpoints.components import check_components
from ditf.export.checkpoints.layout import Checkpoint, Part
from ditf.export.checkpoints.loading import check_structure
from ditf.export.checkpoints.noise_schedule import draw_noise, noise_level, noise_levels
from ditf.export.checkpoints.opening import open_vae
from ditf.export.checkpoints.vae import LatentSpace
from ditf.export.families import family_of
from ditf.export.families.base import Defaults, Family
from ditf.export.families.demo import DEMO_DEFAULTS
from ditf.export.graph.precision import PRECISIONS, Precision
from ditf.export.planning.conditions import Entry, plan_entries
from ditf.export.planning.options import SHORT_NAMES, ExportOptions
from ditf.runtime.errors import InputError
from ditf.runtime.images import list_images

_MOST_BLOCKS = 1000  # no published model has a tenth; a damaged config should not be built


@dataclass(frozen=True)
class Plan:
    """An export, decided.

    Attributes:
        entries: the conditions, not encoded yet.
        latents: with the encoder of --vae, if there is one; own_latents: the checkpoint's own.
        levels: signal and noise of every timestep, float64 [T, 2].
        discard: channels, or None to measure them.
    """

    options: ExportOptions
    checkpoint: Checkpoint
    family: Family
    latents: LatentSpace
    own_latents: LatentSpace
    layer: int
    entries: tuple[Entry, ...]
    guidance: float | None
    size: tuple[int, int]
    levels: torch.Tensor
    discard: tuple[int, ...] | None
    precision: Precision

    @property
    def grid(self) -> tuple[int, int]:
        cell = self.latents.stride * self.family.patch_size
        return (self.size[0] // cell, self.size[1] // cell)

    @property
    def output(self) -> Path:
        if self.options.output is not None:
            return self.options.output
        name = Path(self.options.model.rstrip("/")).name
        short = next(k for k, v in SHORT_NAMES.items() if v == self.options.precision)
        # Beside the bundle with the checkpoint's own VAE, to compare them.
        encoder = "" if self.options.vae is None else f"-{Path(self.options.vae.rstrip('/')).name}"
        return Path("bundles") / f"{name}-l{self.layer}-{short}{encoder}"

    @property
    def output_dtype(self) -> torch.dtype:
        """Without the norm the hidden states keep their massive values, which float16 may not hold."""
        if self.options.features_dtype is not None:
            return {"float16": torch.float16, "float32": torch.float32}[self.options.features_dtype]
        return self.precision.output if self.options.adaln else torch.float32

    @property
    def features_in_ranges(self) -> bool:
        """Whether the measured ranges have to show that the features fit into float16."""
        return self.output_dtype == torch.float16 and not self.options.surveys

    @property
    def channels(self) -> int:
        """Of the features that the graph gives."""
        return self.family.channels if self.options.pca is None else self.options.pca

    def noise(self) -> torch.Tensor:
        """eps, float32 [E, c, h', w']."""
        height, width = (length // self.latents.stride for length in self.size)
        shape = (self.latents.channels, height, width)
        return draw_noise(self.options.ensemble, shape, self.options.seed)


def make_plan(options: ExportOptions, checkpoint: Checkpoint) -> Plan:
    """Decide an export, and see that it can be carried out.

    Raises:
        DitfError: as `decide`, or a checkpoint whose config and weights contradict each other.
    """
    if options.vae is None and options.vae_revision is not None:
        raise InputError("--vae-revision is of --vae", "add --vae, or leave it out")
    vae = None if options.vae is None else open_vae(options.vae, options.vae_revision)
    plan = decide(options, checkpoint, vae)
    family = plan.family
    check_structure(family.transformer_class, family.config, checkpoint.weights("transformer"))
    checkpoint.check_weights(options.unneeded)
    return plan


def decide(options: ExportOptions, checkpoint: Checkpoint, vae: Part | None = None) -> Plan:
    """Decide an export from a checkpoint's configs; its weights need not be there.

    Args:
        vae: of --vae.

    Raises:
        DitfError: options that contradict each other or the checkpoint.
    """
    family = family_of(checkpoint)
    check_components(checkpoint, family.text_classes, options.unneeded)
    if options.batch != "dynamic" and options.batch < 1:
        raise InputError(f"batch {options.batch} is out of range", "choose 1 or more, or dynamic")
    defaults = DEMO_DEFAULTS if options.model == DEMO else family.defaults
    if not 0 < family.blocks.count <= _MOST_BLOCKS:
        raise InputError(f"{checkpoint.id} has {family.blocks.count} blocks", "download the checkpoint again")
    default_layer = family.blocks.count // 2 if defaults.layer is None else defaults.layer
    layer = family.blocks.resolve(str(default_layer) if options.layer is None else options.layer)
    discard = _discard(options, family)
    if options.calibration_images is not None:
        list_images(options.calibration_images)
    entries = plan_entries(options, checkpoint, family, defaults)
    scheduler = checkpoint.config("scheduler")
    for entry in entries:
        noise_level(scheduler, entry.timestep)
    if options.precision == "int8" and options.opset < 19:
        raise InputError(f"int8 needs opset 19, not {options.opset}", "leave --opset out")
    own_latents = LatentSpace.of(checkpoint, family.latent_channels)
    latents = own_latents if vae is None else own_latents.encoded_by(vae)
    size = _size(options.size or defaults.size, family, latents)
    guidance = _guidance(options, family, defaults)
    _check_text_tokens(options, family)
    _check_golden(options)
    cell = latents.stride * family.patch_size
    _check_pca(options, family, (size[0] // cell) * (size[1] // cell))
    return Plan(
        options=options,
        checkpoint=checkpoint,
        family=family,
        latents=latents,
        own_latents=own_latents,
        layer=layer,
        entries=entries,
        guidance=guidance,
        size=size,
        levels=noise_levels(scheduler),
        discard=discard,
        precision=PRECISIONS[options.precision],
    )


def _discard(options: ExportOptions, family: Family) -> tuple[int, ...] | None:
    if options.discard == "auto":
        return None
    if options.discard == "none":
        return ()
    if options.discard == "published":
        published = family.defaults.channels
        if published is None:
            raise InputError(
                f"no massive channels are published for this {family.name}",
                "use --discard auto, which measures",
            )
        return published
    for channel in options.discard:
        if not 0 <= channel < family.channels:
            raise InputError(f"--discard {channel} is out of range", f"channels are 0..{family.channels - 1}")
    return tuple(sorted(set(options.discard)))


def _guidance(options: ExportOptions, family: Family, defaults: Defaults) -> float | None:
    if family.takes_guidance:
        return defaults.guidance if options.guidance is None else options.guidance
    if options.guidance is not None:
        raise InputError(f"this {family.name} takes no guidance", "leave --guidance out")
    return None


def _check_text_tokens(options: ExportOptions, family: Family) -> None:
    if options.text_tokens is not None and not family.takes_prompt:
        raise InputError(f"{family.name} reads no text", "leave --text-tokens out")
    if options.text_tokens is not None and options.text_tokens % family.text_multiple:
        longer = -(-options.text_tokens // family.text_multiple) * family.text_multiple
        raise InputError(
            f"--text-tokens {options.text_tokens}: {family.name} pads its text to multiples of"
            f" {family.text_multiple}",
            f"the next is {longer}",
        )


def _check_golden(options: ExportOptions) -> None:
    """What would be measured on the unmodified model has to be given where it does not run."""
    if options.golden != "none":
        return
    if options.pca is not None:
        raise InputError(
            "--pca is learned from the model, and --golden none leaves it out", "give one of them"
        )
    if options.surveys:
        raise InputError(
            "float16 features need their range, and --golden none measures nothing",
            "leave it out, or add --features-dtype float32",
        )
    if options.calibration is None and options.discard == "auto":
        raise InputError(
            "--discard auto measures, and --golden none measures nothing",
            "add --calibration FILE (ditf calibrate), or --discard none, published or channels",
        )
    if options.calibration is None and options.precision != "float32":
        raise InputError(
            f"a {options.precision} graph needs measured ranges, and --golden none measures nothing",
            "add --calibration FILE (ditf calibrate), or --precision fp32",
        )


def _check_pca(options: ExportOptions, family: Family, tokens: int) -> None:
    """A projection is learned from at least as many tokens as it has channels."""
    if options.pca is None:
        return
    if options.pca > family.channels:
        raise InputError(
            f"--pca {options.pca} is more than the {family.channels} channels of {family.name}",
            f"choose 1..{family.channels}, or leave it out",
        )
    folder = options.calibration_images
    tokens *= COUNT if folder is None else len(list_images(folder))
    if options.pca > tokens:
        raise InputError(
            f"--pca {options.pca} needs as many tokens, the calibration images have {tokens}",
            "give more --calibration-images, or a larger --size",
        )


def _size(size: tuple[int, int] | None, family: Family, latents: LatentSpace) -> tuple[int, int]:
    cell = latents.stride * family.patch_size
    if size is None:
        size = (family.sample_size * latents.stride,) * 2
    if not all(length >= cell and length % cell == 0 for length in size):
        below = [max(cell, length // cell * cell) for length in size]
        above = [-(-max(length, 1) // cell) * cell for length in size]
        raise InputError(
            f"size {size[0]}x{size[1]} is not a multiple of {cell} (patch {family.patch_size} x VAE stride"
            f" {latents.stride})",
            f"the nearest are {below[0]}x{below[1]} and {above[0]}x{above[1]}",
        )
    largest = family.largest_grid
    if largest is not None and max(size) > largest * cell:
        raise InputError(
            f"size {size[0]}x{size[1]} is beyond this model's position embedding",
            f"choose at most {largest * cell}x{largest * cell}",
        )
    return size
