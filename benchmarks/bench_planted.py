"""What massive values do to float16: planted in one place of a model, exported in several ways.

A Stable Diffusion 3.5 of the real diffusers class with random weights, one bias set to a massive value in
two channels. For every value and place: whether the calibration finds it, what the recipe does about it,
and how close the graph, run in its own arithmetic in PyTorch, comes to the unmodified model in float32:

    all float16     the same graph with its residual in float16 and no recipe: a naive half export
    float16         --precision fp16: float32 residual, and the recipe of `ditf.calib.recipe`
    bfloat16        --precision bf16
    int8            --precision int8

Accuracy is 1 - the 1st percentile of the tokens' cosines, and the share of 64 matches within a pixel of the
model's own. Writes benchmarks/results/planted.json and the table in docs/precision.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from harness import (
    Bench,
    Rows,
    say,
    workplace,
)
from torch import nn

from ditf.calib.images import golden_pair
from ditf.calib.parity import feature_parity, match_parity
from ditf.calib.recipe import Recipe, choose_recipe
from ditf.export.assemble.features_graph import assemble
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.loading import quieten_libraries
from ditf.export.graph.features import FeatureSettings
from ditf.export.graph.precision import BFLOAT16, FLOAT16, INT8, Precision
from ditf.export.measure.calibrate import measure_calibration, observe_blocks
from ditf.export.measure.calibration import Calibration
from ditf.export.measure.golden import POINTS, reference_match
from ditf.export.measure.images import CalibrationImages
from ditf.export.measure.reference_model import Reference
from ditf.export.onnx_writing.emulation import Float32Accumulation
from ditf.export.planning.conditions import Entry
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import Plan, plan_from_configs
from ditf.runtime.errors import DitfError

VALUES = (1e2, 1e4, 6e4, 1e5, 1e6)
CHANNELS = (7, 29)  # the second is planted with the other sign
LAYER, SIZE, TEXT = 4, (256, 256), 24
NAIVE = Precision("all float16", torch.float16, torch.float16, residual=torch.float16)
SIDES = {"all float16": NAIVE, "float16": FLOAT16, "bfloat16": BFLOAT16, "int8": INT8}
_BY_RECIPE = ("float16", "int8")


@dataclass(frozen=True)
class Place:
    """Where a value is planted.

    Attributes:
        part: "transformer" or "vae"; module: whose bias takes it.
        residual: whose residual shows it as massive channels, "image" or "text"; "" where a branch does.
    """

    label: str
    part: str
    module: str
    residual: str = ""

    def found(self, document: Mapping[str, Any], value: float) -> bool:
        """Whether a calibration names the planted channels, or the planted layer with its value."""
        if self.residual:
            layers = [layer[self.residual] for layer in document["layers"]]
            seen = [{entry["channel"] for entry in layer["massive_channels"]} for layer in layers]
            return all(channels >= set(CHANNELS) for channels in seen)
        return any(
            self.module.rpartition(".")[2] in entry["name"]
            and _block(entry["name"]) == _block(self.module)
            and entry["max_abs"] >= 0.5 * value
            for entry in document["ranges"]
        )


PLACES = (
    Place("image residual", "transformer", "pos_embed.proj", "image"),
    Place("text residual", "transformer", "context_embedder", "text"),
    Place("attention output", "transformer", "transformer_blocks.1.attn.to_out.0"),
    Place("feed-forward output", "transformer", "transformer_blocks.1.ff.net.2"),
    Place("text feed-forward output", "transformer", "transformer_blocks.1.ff_context.net.2"),
    Place("value projection", "transformer", "transformer_blocks.1.attn.to_v"),
    Place("VAE residual", "vae", "encoder.conv_in"),
)


def main() -> None:
    """Plant, calibrate, run, and write the result."""
    bench = Bench(__doc__, threads=1)
    bench.parser.add_argument("--values", type=float, nargs="+", default=VALUES)
    arguments = bench.parse(values=VALUES[-1:])
    size = (64, 64) if bench.smoke else SIZE
    quieten_libraries()
    bench.start()
    torch.set_num_threads(1)
    cases = []
    with workplace() as folder:
        for place in (None, *PLACES)[: 2 if bench.smoke else None]:
            for value in arguments.values if place else (0.0,):
                say(f"{place.label if place else 'nothing planted'} {value:g}")
                cases.append(run(folder, place, value, size))
    result = {"layer": LAYER, "size": size, "cases": cases}
    bench.write("planted", result, rows(cases), {("precision.md", "planted"): rows(cases)})


def run(folder: Path, place: Place | None, value: float, size: tuple[int, int]) -> dict[str, Any]:
    """Measure one model: what was found, which recipe was chosen, and the accuracy of every side."""
    write_checkpoint(folder, place, value)
    options = ExportOptions(
        model=str(folder), layer=str(LAYER), size=size, prompt=("a cat",), precision="float16"
    )
    plan = plan_from_configs(options, Checkpoint(folder, str(folder)))
    entry = replace(plan.entries[0], condition=random_condition())
    known = calibrated(plan, entry)
    calibration, settings = known.calibration, known.settings
    result: dict[str, Any] = {
        "place": place.label if place else "",
        "value": value,
        "found": None if place is None else place.found(calibration.to_json(), value),
        "discarded": list(settings.channels),
        "sides": {},
    }
    for label, precision in SIDES.items():
        try:
            recipe, maxima = Recipe(), None
            if label in _BY_RECIPE:
                recipe = choose_recipe(calibration.extents or ())
                result["recipe"] = recipe.exceptions()
            if label == "int8":
                maxima = calibration.maxima
            side = replace(precision, recipe=recipe, maxima=maxima)
            graph = assemble(replace(plan, precision=side), (entry,), plan.noise(), settings).graph
            result["sides"][label] = accuracy(graph, known)
        except DitfError as error:
            result["sides"][label] = {"refused": str(error)}
    return result


@dataclass(frozen=True)
class Calibrated:
    """What the unmodified model gives.

    Attributes:
        calibration: its massive channels and the ranges of its values.
        settings: those channels are discarded.
        images: the golden pair; expected: their features, each [C, h, w].
    """

    calibration: Calibration
    settings: FeatureSettings
    images: np.ndarray
    expected: list[np.ndarray]


def calibrated(plan: Plan, entry: Entry) -> Calibrated:
    """Run the unmodified model under a condition."""
    noise = plan.noise()
    reference = Reference(plan.checkpoint, plan.family, plan.layer, plan.size, noise)
    reference.under(entry.condition, entry.timestep)
    calibration_images = CalibrationImages(None, plan.size)
    observed = observe_blocks(plan, reference, calibration_images)
    settings = FeatureSettings(channels=observed.calibration.massive_channels)
    images = golden_pair(plan.size)
    expected = [reference.features(reference.hidden_states(image), settings) for image in images]
    del reference
    calibration = measure_calibration(plan, observed, (entry,), noise, calibration_images)
    return Calibrated(calibration, settings, images, expected)


@torch.no_grad()
def accuracy(graph: nn.Module, known: Calibrated) -> dict[str, float]:
    """Features and matches of a graph, in its own arithmetic in PyTorch, against the model's."""
    expected, size = known.expected, known.images.shape[1:3]
    with Float32Accumulation():
        actual = [
            graph(torch.from_numpy(image.copy())[None])[0].to(torch.float32).numpy() for image in known.images
        ]
    tokens = [np.stack(maps).reshape(2, len(maps[0]), -1).transpose(0, 2, 1) for maps in (actual, expected)]
    metrics = feature_parity(*tokens)
    if not np.isfinite(tokens[0]).all():
        return {"cosine_p01": math.nan, "matches_within_1px": math.nan}
    rng = np.random.default_rng(0)
    points = np.stack([rng.integers(0, size[1], POINTS), rng.integers(0, size[0], POINTS)], axis=1)
    found, wanted = (reference_match(maps[0], maps[1], points, size)[0] for maps in (actual, expected))
    cell = (size[0] / actual[0].shape[1], size[1] / actual[0].shape[2])
    return metrics | match_parity(found, wanted, cell)


def write_checkpoint(folder: Path, place: Place | None, value: float) -> None:
    """Save a transformer, VAE and scheduler that differ only in what is planted."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=LAYER + 2,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=64,
        caption_projection_dim=192,
        pooled_projection_dim=48,
        pos_embed_max_size=48,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
    )
    parts: dict[str, nn.Module] = {"transformer": transformer, "vae": vae}
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)  # so that every branch counts
        if place is not None:
            bias = parts[place.part].get_submodule(place.module).bias
            assert isinstance(bias, torch.Tensor)
            first, second = (channel % len(bias) for channel in CHANNELS)
            bias[first], bias[second] = value, -value
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder)


def random_condition() -> dict[str, torch.Tensor]:
    """Random text embeddings in place of a prompt's."""
    generator = torch.Generator().manual_seed(1)
    return {
        "prompt_embeds": torch.randn((1, TEXT, 64), generator=generator),
        "pooled_prompt_embeds": torch.randn((1, 48), generator=generator),
    }


def _block(name: str) -> str:
    return ".".join(part for part in name.removeprefix("vae.").split(".") if part != "encoder")[:20]


def rows(cases: Sequence[Mapping[str, Any]]) -> Rows:
    """Make the table, with a row for each model."""
    lines: Rows = [("planted in", "value", "found", "recipe", *SIDES)]
    for case in cases:
        exceptions = case.get("recipe", [])
        counted = [
            sum(entry["is"].startswith(kind) for entry in exceptions) for kind in ("scaled", "float32")
        ]
        recipe = ", ".join(
            f"{count} {word}" for count, word in zip(counted, ("scaled", "float32"), strict=True) if count
        )
        found = {None: "", True: "yes", False: "no"}[case["found"]]
        sides = [verdict(case["sides"][side]) for side in SIDES]
        lines.append(
            (
                case["place"] or "nothing",
                f"{case['value']:.0e}" if case["place"] else "",
                found,
                recipe or "none",
                *sides,
            )
        )
    return lines


def verdict(side: Mapping[str, Any]) -> str:
    """Format 1 - the 1st percentile of cosines and the matches within a pixel, or what went wrong."""
    if "refused" in side:
        return "refused"
    if not math.isfinite(side["cosine_p01"]):
        return "NaN"
    return f"{1 - side['cosine_p01']:.0e}, {side['matches_within_1px']:.0%}"


if __name__ == "__main__":
    main()
