"""What an export will do: everything that is decided, and refused, before a weight is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ditf.calib.images import COUNT
from ditf.export.checkpoints import DEMO
from ditf.export.checkpoints.components import check_components
from ditf.export.checkpoints.latent_space import LatentSpace
from ditf.export.checkpoints.layout import Checkpoint, Part
from ditf.export.checkpoints.loading import check_structure
from ditf.export.checkpoints.noise_schedule import draw_noise, noise_level, noise_levels
from ditf.export.checkpoints.opening import open_vae
from ditf.export.families import family_of
from ditf.export.families.base import Defaults, Family
from ditf.export.families.demo import DEMO_DEFAULTS
from ditf.export.graph.precision import PRECISIONS, Precision
from ditf.export.planning.conditions import Entry, check_prompts, plan_entries
from ditf.export.planning.export_options import DEFAULT_OPSET, OPSETS, SHORT_NAMES, ExportOptions
from ditf.export.planning.size import Size
from ditf.runtime.errors import InputError
from ditf.runtime.images import list_images

_MOST_BLOCKS = 1000  # no published model has a tenth of it; a damaged config is not built


@dataclass(frozen=True)
class Plan:
    """What an export will do.

    Attributes:
        entries: the conditions, not encoded yet.
        latents: the latent space with the encoder of --vae, if that is given; own_latents: with the
            checkpoint's own encoder.
        layer: k, the block whose input is the feature.
        levels: signal and noise of every timestep, float64 [T, 2].
        discard: the discarded channels, or None where they are measured.
    """

    options: ExportOptions
    checkpoint: Checkpoint
    family: Family
    latents: LatentSpace
    own_latents: LatentSpace
    layer: int
    entries: tuple[Entry, ...]
    guidance: float | None
    size: Size
    levels: torch.Tensor
    discard: tuple[int, ...] | None
    precision: Precision

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) in tokens."""
        return self.size.cells(_cell(self.family, self.latents))

    @property
    def output(self) -> Path:
        """The bundle's directory."""
        if self.options.output is not None:
            return self.options.output
        name = self.options.model_name
        short = next(k for k, v in SHORT_NAMES.items() if v == self.options.precision)
        # Beside the bundle with the checkpoint's own VAE or without the LoRAs, to compare them.
        encoder = "" if self.options.vae is None else f"-{Path(self.options.vae.rstrip('/')).name}"
        loras = "".join(f"-{lora.name}" for lora in self.options.loras)
        return Path("bundles") / f"{name}-l{self.layer}-{short}{encoder}{loras}"

    @property
    def output_dtype(self) -> torch.dtype:
        """Type of the features.

        Without the norm the hidden states keep their massive values, which float16 may not hold.
        """
        if self.options.features_dtype is not None:
            return {"float16": torch.float16, "float32": torch.float32}[self.options.features_dtype]
        return self.precision.output if self.options.adaln else torch.float32

    @property
    def features_in_ranges(self) -> bool:
        """Whether the measured ranges have to show that the features fit into float16.

        The range of projected features is not among them.
        """
        return self.options.float16_features and self.options.pca is None

    @property
    def channels(self) -> int:
        """Number of channels of the features that the graph gives."""
        return self.family.channels if self.options.pca is None else self.options.pca

    @property
    def opset(self) -> int:
        """The ONNX opset of the graphs: the given one, or one that has the operators of `least_opset`."""
        return max(DEFAULT_OPSET, self.least_opset[0]) if self.options.opset is None else self.options.opset

    @property
    def least_opset(self) -> tuple[int, str]:
        """The lowest opset that can express the graph, and what of the graph needs it."""
        if self.options.precision == "int8":
            return 19, "float16 inputs of QuantizeLinear"
        if self.precision.compute == torch.bfloat16 and self.latents.vae:
            return 22, "the VAE's bfloat16 convolutions"
        return OPSETS[0], "torch's exporter"

    @property
    def noise_shape(self) -> tuple[int, int, int, int]:
        """Shape (E, c, h', w') of eps."""
        return (self.options.ensemble, self.latents.channels, *self.size.cells(self.latents.stride))

    def noise(self) -> torch.Tensor:
        """eps, float32 [E, c, h', w']."""
        ensemble, channels, height, width = self.noise_shape
        return draw_noise(ensemble, (channels, height, width), self.options.seed)


def make_plan(options: ExportOptions, checkpoint: Checkpoint) -> Plan:
    """Plan an export of a checkpoint whose weights are there.

    Raises:
        DitfError: as `plan_from_configs`; or the config and the weights of a part that will be loaded
            contradict each other.
    """
    if options.vae is None and options.vae_revision is not None:
        raise InputError("--vae-revision requires --vae", "add --vae, or leave --vae-revision out")
    vae = None if options.vae is None else open_vae(options.vae, options.vae_revision)
    plan = plan_from_configs(options, checkpoint, vae)
    family, checkpoint = plan.family, plan.checkpoint
    checkpoint.check_loras(options.unneeded)
    weights = checkpoint.weights("transformer")
    check_structure(family.transformer_class, family.config, weights, fix=checkpoint.mismatch_fix)
    plan.own_latents.check_weights()
    if vae is not None:
        plan.latents.check_weights()
    return replace(plan, entries=check_prompts(plan.entries, family, checkpoint))


def plan_from_configs(options: ExportOptions, checkpoint: Checkpoint, vae: Part | None = None) -> Plan:
    """Plan an export from a checkpoint's configs; its weights need not be there.

    Args:
        vae: the replacement VAE given with --vae, or None.

    Raises:
        DitfError: the options contradict each other or the checkpoint.
    """
    checkpoint = replace(checkpoint, loras=options.loras)
    family = family_of(checkpoint, options.text_padding)
    check_components(checkpoint, family.text_classes, options.unneeded)
    defaults = DEMO_DEFAULTS if options.model == DEMO else family.defaults
    own_latents = LatentSpace.of(checkpoint, family.latent_channels, family.shifts_latents)
    latents = own_latents if vae is None else own_latents.encoded_by(vae)
    layer = _layer(options, checkpoint, family, defaults)
    discard = _discard(options, family)
    entries = plan_entries(options, checkpoint, family, defaults)
    plan = Plan(
        options=options,
        checkpoint=checkpoint,
        family=family,
        latents=latents,
        own_latents=own_latents,
        layer=layer,
        entries=entries,
        guidance=_guidance(options, family, defaults),
        size=_size(options.size or defaults.size, family, latents),
        levels=_levels(checkpoint, family, entries),
        discard=discard,
        precision=PRECISIONS[options.precision],
    )
    for check in _CHECKS:
        check(plan)
    return plan


def _layer(options: ExportOptions, checkpoint: Checkpoint, family: Family, defaults: Defaults) -> int:
    if not 0 < family.blocks.count <= _MOST_BLOCKS:
        raise InputError(
            f"{checkpoint.id} has {family.blocks.count} blocks, as its config.json says",
            "take the published one",
        )
    default = family.blocks.count // 2 if defaults.layer is None else defaults.layer
    return family.blocks.resolve(str(default) if options.layer is None else options.layer)


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


def _size(given: tuple[int, int] | None, family: Family, latents: LatentSpace) -> Size:
    cell = _cell(family, latents)
    size = Size(*(given or (family.sample_size * latents.stride,) * 2))
    if size.below(cell) != size:
        raise InputError(
            f"size {size} is not a multiple of {cell} (patch {family.patch_size} x VAE stride"
            f" {latents.stride})",
            f"the nearest are {size.below(cell)} and {size.above(cell)}",
        )
    largest = family.largest_grid
    if largest is not None and max(size) > largest * cell:
        raise InputError(
            f"size {size} is beyond this model's position embedding",
            f"choose at most {Size(largest * cell, largest * cell)}",
        )
    return size


def _cell(family: Family, latents: LatentSpace) -> int:
    """Pixels of the image along the side of a token."""
    return latents.stride * family.patch_size


def _levels(checkpoint: Checkpoint, family: Family, entries: tuple[Entry, ...]) -> torch.Tensor:
    levels = noise_levels(checkpoint.config("scheduler"), flow_matching=not family.ddpm)
    for entry in entries:
        noise_level(levels, entry.timestep)  # or it is out of range
    return levels


def _check_batch(plan: Plan) -> None:
    batch = plan.options.batch
    if batch != "dynamic" and batch < 1:
        raise InputError(f"batch {batch} is out of range", "choose 1 or more, or dynamic")


def _check_opset(plan: Plan) -> None:
    least, what = plan.least_opset
    if plan.opset < least:
        raise InputError(f"--opset {plan.opset}: {what} need opset {least}", "leave --opset out")


def _check_calibration_images(plan: Plan) -> None:
    if plan.options.calibration_images is not None:
        list_images(plan.options.calibration_images)


def _check_text_tokens(plan: Plan) -> None:
    options, family = plan.options, plan.family
    if options.text_tokens is not None and not family.takes_prompt:
        raise InputError(f"{family.name} reads no text", "leave --text-tokens out")
    if options.text_tokens is not None and options.text_tokens % family.text_multiple:
        longer = -(-options.text_tokens // family.text_multiple) * family.text_multiple
        raise InputError(
            f"--text-tokens {options.text_tokens}: {family.name} pads its text to multiples of"
            f" {family.text_multiple}",
            f"the next is {longer}",
        )


def _check_golden(plan: Plan) -> None:
    """With --golden none the unmodified model does not run: what it would show has to be given."""
    options = plan.options
    if options.golden != "none":
        return
    if options.pca is not None:
        raise InputError(
            "--pca is learned from the model, and --golden none leaves it out", "give one of them"
        )
    if options.measures_features and options.calibration is None:
        raise InputError(
            "float16 features need their range, and --golden none measures nothing",
            "add --calibration FILE (ditf calibrate), or --features-dtype float32",
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


def _check_pca(plan: Plan) -> None:
    """A projection is learned from at least as many tokens as it has channels."""
    options, family = plan.options, plan.family
    if options.pca is None:
        return
    if options.pca > family.channels:
        raise InputError(
            f"--pca {options.pca} is more than the {family.channels} channels of {family.name}",
            f"choose 1..{family.channels}, or leave it out",
        )
    folder = options.calibration_images
    images = COUNT if folder is None else len(list_images(folder))
    tokens = images * plan.grid[0] * plan.grid[1]
    if options.pca > tokens:
        raise InputError(
            f"--pca {options.pca} needs as many tokens, the calibration images have {tokens}",
            "give more --calibration-images, or a larger --size",
        )


_CHECKS: tuple[Callable[[Plan], None], ...] = (
    _check_batch,
    _check_opset,
    _check_calibration_images,
    _check_text_tokens,
    _check_golden,
    _check_pca,
)
