"""Time and size of a graph with its condition baked in against the same graph with the condition live.

Two transformers at their published sizes, latents x_t in, features out, float32, on ONNX Runtime, one
image at a time on one thread, in processor time:

    live            --conditioning live: text embeddings and timestep are inputs; AdaLN, the text's
                    projection and (PixArt) the masked tokens of the text are in the graph
    bake            --conditioning bake: they are constants; gates and shifts are folded into weights,
                    masked tokens are gone
    bake, no fold   PixArt only: baked, but cross-attention's query and output are not folded into its
                    keys and values

The graphs hold the modules that ditf-export writes. Weights are random, each tensor seeded by its name,
and made when it is read: time and size do not depend on them, and no checkpoint is needed. Features of
the sides must agree.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import torch
from harness import (
    Bench,
    Rows,
    graph_bytes,
    in_child,
    interleave,
    open_session,
    paired_ratio,
    say,
    summary,
    wait_until_idle,
    workplace,
)
from torch import nn

from ditf.calib.machine import peak_bytes
from ditf.calib.parity import feature_parity
from ditf.cli.support.output import bytes_text
from ditf.export.checkpoints.loading import full_config, model_shapes, quieten_libraries
from ditf.export.checkpoints.weights import Weights
from ditf.export.families.base import Family, TrunkSpec
from ditf.export.families.pixart import PixArt
from ditf.export.families.sd3 import SD3
from ditf.export.graph.blocks.dit import FoldedCrossAttention
from ditf.export.graph.blocks.trunk import Trunk
from ditf.export.graph.condition import Conditioner, hold_projections
from ditf.export.graph.precision import FLOAT32, Precision
from ditf.export.onnx_writing.onnx_file import write_onnx
from ditf.export.planning.export_options import DEFAULT_OPSET
from ditf.runtime.bundles.conditions import TIMESTEP

THREADS = 1
IMAGES = 4  # inputs are rotated
LIVE, BAKE, NO_FOLD = "live", "bake", "bake, no fold"
STRIDE = 8  # image pixels along the side of a latent pixel
AGREEMENT = 1e-4  # largest relative error between sides, as `ditf check` allows float32


@dataclass(frozen=True)
class Case:
    """A transformer, and where it is cut.

    Attributes:
        config: of the transformer, where it differs from its class's defaults.
        side: of the image, px.
        text: tokens of the text, padding among them.
        unmasked: those of them that matter; the others are masked.
    """

    label: str
    family: type[Family]
    config: Mapping[str, Any]
    layer: int
    side: int
    text: int
    unmasked: int

    def make_family(self) -> Family:
        """Make the family with the whole config."""
        defaults = full_config(self.family.transformer_class, {})
        return self.family({**defaults, **self.config})

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides that are measured."""
        return (LIVE, BAKE, NO_FOLD) if self.family is PixArt else (LIVE, BAKE)

    @property
    def file(self) -> str:
        """The prefix of its files' names."""
        return self.label.replace("/", "-").replace(" ", "-").lower()

    def to_json(self) -> dict[str, Any]:
        """Describe the case for the result."""
        return {
            "label": self.label,
            "family": self.family.name,
            "config": dict(self.config),
            "layer": self.layer,
            "pixels": self.side,
            "text_tokens": self.text,
            "text_tokens_unmasked": self.unmasked,
        }


def pixart(label: str, layer: int, side: int, text: tuple[int, int], **config: Any) -> Case:
    """Make a PixArt of the published proportions; `text` is the number of tokens and of unmasked tokens."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    config |= {"cross_attention_dim": width, "in_channels": 4, "out_channels": 8}
    return Case(label, PixArt, config, layer, side, *text)


def sd35(label: str, layer: int, side: int, text: int, **config: Any) -> Case:
    """Make a Stable Diffusion 3.5 medium, which has QK-norm and a second attention in its first blocks."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    config |= {"caption_projection_dim": width, "in_channels": 16, "out_channels": 16}
    config |= {"patch_size": 2, "qk_norm": "rms_norm"}
    return Case(label, SD3, config, layer, side, text, text)


GEOMETRIES = {
    "full": (
        pixart(
            "PixArt-XL/2",
            layer=9,
            side=512,
            text=(120, 8),
            num_layers=28,
            num_attention_heads=16,
            attention_head_dim=72,
            sample_size=64,
            caption_channels=4096,
        ),
        sd35(
            "SD3.5 medium",
            layer=9,
            side=512,
            text=77 + 256,
            num_layers=24,
            num_attention_heads=24,
            attention_head_dim=64,
            sample_size=128,
            joint_attention_dim=4096,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
        ),
    ),
    "small": (  # to try the script
        pixart(
            "tiny PixArt",
            layer=1,
            side=128,
            text=(12, 3),
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=16,
            sample_size=16,
            caption_channels=32,
        ),
        sd35(
            "tiny SD3.5",
            layer=1,
            side=128,
            text=12,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=16,
            sample_size=16,
            joint_attention_dim=32,
            pooled_projection_dim=24,
            pos_embed_max_size=24,
            dual_attention_layers=(0,),
        ),
    ),
}


def main() -> None:
    """Write the graphs, time them in turns, compare them, and write the result."""
    bench = Bench(__doc__, THREADS, repeats=5, keeps=True)
    arguments = bench.parse()
    cases = GEOMETRIES["small" if bench.smoke else "full"]
    with workplace(arguments.folder) as folder:
        exports = {case.label: {side: prepare(folder, case, side) for side in case.sides} for case in cases}
        wait_until_idle(arguments.wait)
        bench.start()
        results = []
        for case in cases:
            say(f"{case.label}: timing, {arguments.repeats} rounds after a warm-up")
            timed = in_child(measure, folder, case, arguments.repeats)
            results.append({**case.to_json(), **timed, "export": exports[case.label]})
    bench.write("conditioning", {"dtype": "float32", "cases": results}, rows(results))


def prepare(folder: Path, case: Case, side: str) -> dict[str, Any]:
    """Write a graph unless it exists; returns the seconds and peak memory of the process that wrote it."""
    record = graph_file(folder, case, side).with_suffix(".json")
    if not record.exists():
        say(f"{case.label}: writing {side}")
        record.write_text(json.dumps(in_child(write_graph, folder, case, side)))
    found: dict[str, Any] = json.loads(record.read_text())
    return found


def graph_file(folder: Path, case: Case, side: str) -> Path:
    """The path of a side's graph; its weights are in <name>.data beside it."""
    return folder / f"{case.file}-{side.replace(', ', '-').replace(' ', '-')}.onnx"


class RandomWeights(Weights):
    """The tensors of a model with random values, the same whenever and wherever they are read."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        bytes_of = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
        super().__init__(shapes, bytes_of, dict.fromkeys(shapes, "F32"))

    def _load(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if name.endswith("pos_embed"):
            return values  # a table of sines and cosines, of order 1 like them
        if len(shape) > 1:
            return values.div_(math.sqrt(math.prod(shape[1:])))
        return values.mul_(0.1).add_(1.0) if name.endswith(".weight") else values.mul_(0.02)


class Transformer(nn.Module):
    """Latents (and for a live graph what `inputs` names) -> features: the modules of a features graph.

    Args:
        conditioner: of a live graph; None where the trunk has its condition as constants.
    """

    def __init__(self, trunk: Trunk, conditioner: Conditioner | None) -> None:
        super().__init__()
        self.trunk = trunk
        self.conditioner = conditioner
        self.inputs = () if conditioner is None else (*conditioner.inputs, TIMESTEP)

    def forward(self, latents: torch.Tensor, *feeds: torch.Tensor) -> torch.Tensor:
        """[1, c, h, w] -> [1, N, C]."""
        given = {}
        if self.conditioner is not None:
            named = dict(zip(self.inputs, feeds, strict=True))
            given = self.conditioner(named[TIMESTEP], named)
        return self.trunk.modulate(self.trunk(latents, given), given)


def make_feeds(case: Case, family: Family) -> dict[str, torch.Tensor]:
    """A random condition, as the family's text encoders would make it, and the timestep."""
    generator = torch.Generator().manual_seed(0)
    if case.family is PixArt:
        condition = {
            "prompt_embeds": torch.randn(
                (1, case.text, family.config["caption_channels"]), generator=generator
            ),
            "prompt_attention_mask": (torch.arange(case.text) < case.unmasked).to(torch.int64)[None],
        }
    else:
        condition = {
            "prompt_embeds": torch.randn(
                (1, case.text, family.config["joint_attention_dim"]), generator=generator
            ),
            "pooled_prompt_embeds": torch.randn(
                (1, family.config["pooled_projection_dim"]), generator=generator
            ),
        }
    return {**condition, TIMESTEP: torch.tensor([family.defaults.timestep])}


def make_latents(case: Case, family: Family) -> list[torch.Tensor]:
    """x_t of several images, each [1, c, h', w']."""
    side = case.side // STRIDE
    shape = (IMAGES, 1, family.latent_channels, side, side)
    return list(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


@torch.no_grad()
def make_module(case: Case, family: Family, side: str, precision: Precision = FLOAT32) -> Transformer:
    """The module of a side, made in the order of `ditf.export.assemble.features_graph`."""
    weights = RandomWeights(model_shapes(family.transformer_class, family.config))
    size = (case.side, case.side)
    tokens = case.side // STRIDE // family.patch_size
    feeds = make_feeds(case, family)  # the timestep is beside the condition's tensors, which nothing minds
    trimmed = family.trim_text(feeds, family.text_tokens(feeds))
    text = case.text if side == LIVE else family.text_length(trimmed)
    spec = TrunkSpec(case.layer, size, (tokens, tokens), text, precision)
    conditioner = family.conditioner(weights, replace(spec, precision=FLOAT32)).eval()
    if side == LIVE:
        hold_projections(conditioner)
        return Transformer(family.trunk(weights, spec, None), conditioner).eval()
    given = conditioner(trimmed[TIMESTEP], trimmed)
    del conditioner
    with contextlib.ExitStack() as stack:
        if side == NO_FOLD:
            stack.enter_context(patch.object(FoldedCrossAttention, "pays", return_value=False))
        trunk = family.trunk(weights, spec, given)
    folded = sum(isinstance(module, FoldedCrossAttention) for module in trunk.modules())
    if folded != (case.layer if case.family is PixArt and side == BAKE else 0):
        raise RuntimeError(f"{side} of {case.label} has {folded} folded cross-attentions")
    return Transformer(trunk, None).eval()


def write_graph(folder: Path, case: Case, side: str) -> dict[str, Any]:
    """Write one graph; returns its wall-clock seconds and the peak memory of the process."""
    quieten_libraries()
    start = time.perf_counter()
    family = case.make_family()
    module = make_module(case, family, side)
    feeds = make_feeds(case, family)
    inputs = {"latents": make_latents(case, family)[0], **{name: feeds[name] for name in module.inputs}}
    write_onnx(module, inputs, ["features"], graph_file(folder, case, side), DEFAULT_OPSET)
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak_bytes()}


def measure(folder: Path, case: Case, repeats: int) -> dict[str, Any]:
    """Time the sides of a case in turns in one process, and compare their features."""
    quieten_libraries()
    family = case.make_family()
    feeds = {name: tensor.numpy() for name, tensor in make_feeds(case, family).items()}
    latents = [x_t.numpy() for x_t in make_latents(case, family)]
    sessions = {side: open_session(graph_file(folder, case, side), THREADS) for side in case.sides}

    def features(side: str, number: int) -> np.ndarray:
        session = sessions[side]
        given = {entry.name: feeds[entry.name] for entry in session.get_inputs() if entry.name in feeds}
        answer: np.ndarray = session.run(None, {"latents": latents[number % IMAGES], **given})[0]
        return answer

    seconds, disturbance = interleave(case.sides, features, repeats)
    answers = {side: np.concatenate([features(side, i) for i in range(IMAGES)]) for side in case.sides}
    agreement = {side: feature_parity(answers[side], answers[LIVE]) for side in case.sides if side != LIVE}
    for side, metrics in agreement.items():
        if not metrics["relative_error"] <= AGREEMENT:
            raise RuntimeError(f"{case.label}: {side} differs from live: {metrics}")
    sizes = {side: graph_bytes(graph_file(folder, case, side)) for side in case.sides}
    others = [side for side in case.sides if side != BAKE]
    return {
        "timing": disturbance,
        "seconds": {side: summary(values) for side, values in seconds.items()},
        "seconds_ratios": {f"{side} / {BAKE}": paired_ratio(seconds[side], seconds[BAKE]) for side in others},
        "bytes": sizes,
        "bytes_ratios": {f"{side} / {BAKE}": sizes[side] / sizes[BAKE] for side in others},
        "nodes": {side: nodes(graph_file(folder, case, side)) for side in case.sides},
        "same_features_as_live": agreement,
        "feature_rms": float(np.sqrt(np.mean(np.square(answers[LIVE], dtype=np.float64)))),
        "measuring_peak_bytes": peak_bytes(),
    }


def nodes(path: Path) -> int:
    """Count the nodes of a graph as written, before the runtime fuses any."""
    return len(onnx.load(path, load_external_data=False).graph.node)


def rows(cases: list[dict[str, Any]]) -> Rows:
    """Make the table, with a row for each side of each case."""
    lines: Rows = [
        ("", "", "transformer", "x of bake", "graph", "x of bake", "nodes", "cosine min, relative error")
    ]
    for case in cases:
        for side in case["seconds"]:
            ratio = case["seconds_ratios"].get(f"{side} / {BAKE}", {"median": 1.0})["median"]
            agreement = case["same_features_as_live"].get(side)
            lines.append(
                (
                    case["label"],
                    side,
                    f"{case['seconds'][side]['median']:.3f} s",
                    f"{ratio:.3f}",
                    bytes_text(case["bytes"][side]),
                    f"{case['bytes_ratios'].get(f'{side} / {BAKE}', 1.0):.3f}",
                    str(case["nodes"][side]),
                    "the reference"
                    if agreement is None
                    else f"{agreement['cosine_min']:.8f}, {agreement['relative_error']:.1e}",
                )
            )
    return lines


if __name__ == "__main__":
    main()
