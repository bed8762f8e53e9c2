"""The full VAE encoder and a tiny one: end to end and by part, ONNX Runtime against PyTorch eager.

PixArt-XL/2's width with random weights, 512 px, cut at layer 9; AutoencoderKL of Stable Diffusion's width
and AutoencoderTiny of TAESD's. One image at a time on one thread, in processor time, the sides in turns:

    eager     the unmodified diffusers classes with that encoder, stopped at block k
    fp32      ditf's features.onnx on ONNX Runtime
    fp16      the same in float16, which ONNX Runtime's CPU kernels compute in float32: the cost of its
              casts, not the speed of float16

Parts are the encoder (image to x_t), the transformer (to what enters block k) and the tail (to the
features), timed within each run; end to end is their sum. features.onnx is cut in three for it, its own
nodes and weights, and the pieces run one after the other. The graphs are the exporter's, without the rest
of a bundle.

Two parities on the golden pair, from the same runs: of the graph, against PyTorch with the same encoder,
and of the choice, against PyTorch with the full one. Published weights are not at hand: the full encoder
is random, made smooth enough to be imitated, and the tiny one of TAESD's size was fitted to it by least
squares (tests/vaes.py). The choice's figures are this pair's, not TAESD's.

Apart from that: the attention of the full encoder as diffusers writes it, and in chunks of queries.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_features import PROMPT, SEED, TIMESTEP, Geometry, cut, write_checkpoint
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.attention_processor import AttnProcessor2_0
from harness import (
    ROOT,
    Bench,
    Rows,
    in_child,
    interleave,
    open_session,
    paired_ratio,
    say,
    summary,
    wait_until_idle,
    workplace,
)

from ditf.calib.images import golden_pair
from ditf.calib.latents import x_0_agreement
from ditf.calib.machine import peak_bytes
from ditf.calib.parity import feature_parity, match_parity
from ditf.cli.support.output import bytes_text
from ditf.export.assemble.features_graph import assemble
from ditf.export.assemble.parameter_counts import parameter_parts
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.loading import quieten_libraries
from ditf.export.checkpoints.opening import open_vae
from ditf.export.graph.features import FeatureSettings
from ditf.export.graph.vae_encoders import QueryChunks, attentions
from ditf.export.measure.golden import POINTS
from ditf.export.measure.reference_model import Reference
from ditf.export.onnx_writing.onnx_file import write_onnx
from ditf.export.planning.conditions import Entry, encode, trim
from ditf.export.planning.export_options import DEFAULT_OPSET, SHORT_NAMES, ExportOptions
from ditf.export.planning.plan import Plan, plan_from_configs
from ditf.runtime import FeatureMap
from ditf.runtime.bundles.bundle import FEATURES
from ditf.runtime.bundles.manifest import hidden_states_name
from ditf.runtime.matching.points import match_points

sys.path.insert(0, str(ROOT))
from tests.vaes import fit_tiny, make_learnable, pixels

THREADS = 1
GEOMETRIES = {
    "xl": Geometry(9, 10, 16, 72, 64, 4096, (128, 256, 512, 512)),  # blocks after k are not run by any side
    "small": Geometry(2, 3, 4, 16, 16, 64, (32, 32, 64, 64)),  # to try the script
}
TINY_WIDTH, TINY_BLOCKS = 64, (1, 3, 3, 3)
ENCODERS = ("full", "tiny")
PRECISIONS = ("fp32", "fp16")
PARTS = ("encoder", "transformer", "tail")
TRAINING_SIDE, TRAINING_IMAGES = 128, 32
ATTENTION_SIDES = {512: 64, 960: 120}
"""Sides of the full encoder's middle block by the image's side."""


def main() -> None:
    """Make the checkpoints and graphs, time, compare, and write the result."""
    bench = Bench(__doc__, THREADS, repeats=3, keeps=True)
    arguments = bench.parse()
    name = "small" if bench.smoke else "xl"
    geometry = GEOMETRIES[name]
    with workplace(arguments.folder) as folder:
        in_child(prepare, folder, geometry)
        in_child(write_graphs, folder, geometry)
        wait_until_idle(arguments.wait)
        bench.start()
        say("timing the attention")
        attention = attention_results(folder, {64: 8} if bench.smoke else ATTENTION_SIDES)
        say(f"timing, {arguments.repeats} rounds after a warm-up")
        timed = in_child(measure, folder, geometry, arguments.repeats)
    result = {
        "geometry": {"name": name, "pixels": geometry.pixels, "layer": geometry.layer},
        **timed,
        "attention": attention,
    }
    tables = {("vae.md", "encoders"): rows(result), ("vae.md", "attention"): attention_rows(attention)}
    bench.write(f"vae-{name}", result, rows(result), tables)


def prepare(folder: Path, geometry: Geometry) -> None:
    """Write the checkpoint and the tiny encoder, unless they exist."""
    if (folder / "tiny").exists():
        return
    say("writing the checkpoint")
    quieten_libraries()
    write_checkpoint(folder / "checkpoint", geometry)
    vae = AutoencoderKL.from_pretrained(folder / "checkpoint" / "vae").eval().requires_grad_(False)
    images = pixels(TRAINING_IMAGES, TRAINING_SIDE)
    make_learnable(vae, images)
    vae.save_pretrained(folder / "checkpoint" / "vae")
    say("fitting the tiny encoder")
    stages = len(geometry.vae_channels)
    widths = (TINY_WIDTH,) * stages
    tiny = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=TINY_BLOCKS[:stages],
        num_decoder_blocks=TINY_BLOCKS[:stages][::-1],
    )
    fit_tiny(tiny.eval(), vae, images)
    tiny.save_pretrained(folder / "tiny")


def planned(folder: Path, encoder: str, precision: str, layer: int) -> tuple[Plan, Entry]:
    """The plan of an export, and its condition."""
    options = ExportOptions(
        model=str(folder / "checkpoint"),
        vae=str(folder / "tiny") if encoder == "tiny" else None,
        layer=str(layer),
        precision=SHORT_NAMES[precision],
        timestep=(TIMESTEP,),
        prompt=(PROMPT,),
        seed=SEED,
        discard="none",
    )
    checkpoint = Checkpoint(folder / "checkpoint", options.model)
    plan = plan_from_configs(options, checkpoint, None if options.vae is None else open_vae(options.vae))
    with torch.no_grad():
        encoded = encode(plan.entries, plan.family, checkpoint, plan.guidance)
    return plan, trim(encoded, plan.family)[0]


def write_graphs(folder: Path, geometry: Geometry) -> None:
    """Write <encoder>-<precision>/features.onnx and its `PARTS`, unless they exist."""
    quieten_libraries()
    for encoder in ENCODERS:
        for precision in PRECISIONS:
            target = folder / f"{encoder}-{precision}"
            if (target / "tail.onnx").exists():
                continue
            say(f"writing {target.name}")
            target.mkdir(exist_ok=True)
            plan, entry = planned(folder, encoder, precision, geometry.layer)
            graph = assemble(plan, (entry,), plan.noise(), FeatureSettings()).graph
            counts = parameter_parts(graph)["VAE encoder"].values()
            (target / "bytes").write_text(str(sum(count["bytes"] for count in counts)))
            image = torch.zeros((1, *plan.size, 3), dtype=torch.uint8)
            write_onnx(graph, {"image": image}, ["features"], target / FEATURES, DEFAULT_OPSET)
            cut(target / FEATURES, PARTS, target, hidden_states_name(geometry.layer))


class Eager:
    """The unmodified diffusers classes with one of the encoders.

    Attributes:
        seconds: of each part, in every run.
        x_0, answers: of every image that was run, by its number.
    """

    def __init__(self, folder: Path, encoder: str, layer: int) -> None:
        plan, entry = planned(folder, encoder, "fp32", layer)
        self._latents = plan.latents
        self._vae = plan.latents.load_vae()
        # The reference is given x_0: it needs no second copy of the encoder.
        bare = replace(plan.latents, source=None)
        self._reference = Reference(plan.checkpoint, plan.family, layer, plan.size, plan.noise(), bare)
        self._reference.under(entry.condition, entry.timestep)
        self.seconds: list[tuple[float, ...]] = []
        self.x_0: dict[int, np.ndarray] = {}
        self.answers: dict[int, np.ndarray] = {}

    def whole(self, index: int, image: np.ndarray) -> None:
        """Run end to end."""
        clock = [time.process_time()]
        numbers = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        x_0 = self._latents.encode(self._vae, numbers)
        clock.append(time.process_time())
        hidden_states = self._reference.hidden_states_of(x_0)
        clock.append(time.process_time())
        self.answers[index] = self._reference.features(hidden_states, FeatureSettings())
        clock.append(time.process_time())
        self.seconds.append(tuple(np.diff(clock)))
        self.x_0[index] = x_0.numpy()


class Graph:
    """A graph on ONNX Runtime, piece after piece; attributes as of `Eager`."""

    def __init__(self, target: Path) -> None:
        self._parts = [open_session(target / f"{part}.onnx", THREADS) for part in PARTS]
        self.seconds: list[tuple[float, ...]] = []
        self.answers: dict[int, np.ndarray] = {}

    def whole(self, index: int, image: np.ndarray) -> None:
        """Run end to end."""
        clock, given = [time.process_time()], image[None]
        for session in self._parts:
            given = session.run(None, {session.get_inputs()[0].name: given})[0]
            clock.append(time.process_time())
        self.seconds.append(tuple(np.diff(clock)))
        self.answers[index] = given[0]


def measure(folder: Path, geometry: Geometry, repeats: int) -> dict[str, Any]:
    """Time every side in turns, on one thread, in one process, and compare their features."""
    quieten_libraries()
    torch.set_num_threads(THREADS)
    images = golden_pair((geometry.pixels,) * 2)
    eager = {encoder: Eager(folder, encoder, geometry.layer) for encoder in ENCODERS}
    names = [f"{encoder}-{precision}" for encoder in ENCODERS for precision in PRECISIONS]
    graphs = {name: Graph(folder / name) for name in names}
    sides: dict[str, Eager | Graph] = {f"{encoder}-eager": peer for encoder, peer in eager.items()} | graphs
    seconds, disturbance = interleave(
        sides, lambda name, number: sides[name].whole(number % 2, images[number % 2]), repeats
    )
    for name, side in sides.items():
        for index, part in enumerate(PARTS):  # without the untimed round
            seconds[f"{name} {part}"] = [values[index] for values in side.seconds[1:]]
    ratios = {}
    for name in names:
        for part in ("", *(f" {part}" for part in PARTS)):
            peer_seconds = seconds[f"{name.split('-')[0]}-eager{part}"]
            ratios[name + part] = paired_ratio(peer_seconds, seconds[name + part])
    own, other = (np.concatenate([peer.x_0[i] for i in (0, 1)]) for peer in eager.values())
    parities = {}
    for name, graph in graphs.items():
        peer = eager[name.split("-")[0]]
        parities[name] = {"graph": _parity(graph.answers, peer.answers, geometry)}
        if peer is not eager["full"]:
            parities[name]["choice"] = _parity(graph.answers, eager["full"].answers, geometry)
    return {
        "timing": disturbance,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "eager_over_this": ratios,
        "full_over_tiny": paired_ratio(seconds["full-fp32"], seconds["tiny-fp32"]),
        "x_0": x_0_agreement(other, own),
        "parity": parities,
        "encoder_bytes": {name: int((folder / name / "bytes").read_text()) for name in names},
    }


def _parity(
    actual: dict[int, np.ndarray], expected: dict[int, np.ndarray], geometry: Geometry
) -> dict[str, float]:
    """The parity of the pair's features and matches, as `ditf check` measures it."""
    size = (geometry.pixels, geometry.pixels)
    points = np.random.default_rng(0).integers(0, geometry.pixels, (POINTS, 2)).astype(np.float32)

    def matched(maps: dict[int, np.ndarray]) -> np.ndarray:
        return match_points(FeatureMap(maps[0], size), FeatureMap(maps[1], size), points).points

    rows = (np.stack([maps[i].reshape(len(maps[i]), -1).T for i in (0, 1)]) for maps in (actual, expected))
    cell = geometry.pixels / expected[0].shape[1]
    return feature_parity(*rows) | match_parity(matched(actual), matched(expected), (cell, cell))


def attention_results(folder: Path, sides: Mapping[int, int]) -> list[dict[str, Any]]:
    """Measure the full encoder's attention at once and in chunks: seconds in turns, peak memory, difference.

    Args:
        sides: of the middle block, by the image's.
    """
    found = []
    for pixels_, side in sides.items():
        paths = in_child(write_attention, folder, side)
        seconds, difference = in_child(time_attention, paths, side)
        found.append(
            {
                "pixels": pixels_,
                "tokens": side**2,
                "seconds": {name: summary(values) for name, values in seconds.items()},
                "whole_over_chunks": paired_ratio(seconds["whole"], seconds["chunks"]),
                "peak_bytes": {name: in_child(attention_peak, path, side) for name, path in paths.items()},
                "largest_difference": difference,
            }
        )
    return found


def write_attention(folder: Path, side: int) -> dict[str, Path]:
    """Write the attention of the checkpoint's VAE as two graphs."""
    quieten_libraries()
    paths = {}
    for name, processor in (("whole", AttnProcessor2_0()), ("chunks", QueryChunks())):
        vae = AutoencoderKL.from_pretrained(folder / "checkpoint" / "vae").eval().requires_grad_(False)
        module = next(found for _, found in attentions(vae.encoder))
        module.set_processor(processor)
        paths[name] = folder / f"attention-{side}-{name}.onnx"
        x = torch.zeros(_shape(module.to_q.in_features, side))
        write_onnx(module, {"x": x}, ["y"], paths[name], DEFAULT_OPSET)
    return paths


def _shape(channels: int, side: int) -> tuple[int, ...]:
    return (1, channels, side, side)


def _input(session: Any) -> np.ndarray:
    return np.random.default_rng(0).normal(size=session.get_inputs()[0].shape).astype(np.float32)


def time_attention(paths: dict[str, Path], side: int) -> tuple[dict[str, list[float]], float]:
    """Time both graphs in turns; returns their seconds and the largest |difference|."""
    sessions = {name: open_session(path, THREADS) for name, path in paths.items()}
    x = _input(sessions["whole"])
    answers: dict[str, np.ndarray] = {}

    def run(name: str, number: int) -> None:
        answers[name] = sessions[name].run(None, {"x": x})[0]

    seconds, _ = interleave(sessions, run, 3)
    return seconds, float(np.abs(answers["whole"] - answers["chunks"]).max())


def attention_peak(path: Path, side: int) -> int:
    """How much two runs add to the peak memory of a process."""
    session = open_session(path, THREADS)
    x = _input(session)
    before = peak_bytes()
    for _ in range(2):
        session.run(None, {"x": x})
    return peak_bytes() - before


def rows(result: dict[str, Any]) -> Rows:
    """Make the table, with a row for each side."""
    names = {"eager": "PyTorch eager", "fp32": "ditf, float32", "fp16": "ditf, float16"}
    heading = ("VAE", "", "end to end", *PARTS, "encoder's bytes", "graph: cosine min", "choice: cosine mean")
    lines: Rows = [(*heading, "choice: matches within a cell, 1 px")]
    for encoder in ENCODERS:
        for name, label in names.items():
            side = f"{encoder}-{name}"
            line = [encoder, label]
            for part in ("", *(f" {part}" for part in PARTS)):
                value = result["seconds"][side + part]["median"]
                ratio = result["eager_over_this"].get(side + part)
                shown = f"{value:.2f} s" if value >= 0.1 else f"{1e3 * value:.1f} ms"
                line.append(shown if ratio is None else f"{shown}, {ratio['median']:.2f}x")
            if name == "eager":
                line += ["", "the reference", "", ""]
            else:
                parity = result["parity"][side]
                line += [bytes_text(result["encoder_bytes"][side]), f"{parity['graph']['cosine_min']:.8f}"]
                if "choice" in parity:
                    shares = (parity["choice"][f"matches_within_{what}"] for what in ("patch", "1px"))
                    line += [
                        f"{parity['choice']['cosine_mean']:.4f}",
                        ", ".join(f"{share:.0%}" for share in shares),
                    ]
                else:
                    line += ["its own", ""]
            lines.append(tuple(line))
    return lines


def attention_rows(found: list[dict[str, Any]]) -> Rows:
    """Make the table of the full encoder's attention."""
    lines: Rows = [("image", "tokens", "at once", "in chunks", "faster", "memory", "largest difference")]
    for one in found:
        times = [f"{one['seconds'][name]['median']:.2f} s" for name in ("whole", "chunks")]
        peaks = " to ".join(bytes_text(one["peak_bytes"][name]) for name in ("whole", "chunks"))
        ratio = f"{one['whole_over_chunks']['median']:.2f}x"
        cells = (f"{one['pixels']} px", f"{one['tokens']:,}", *times, ratio, peaks)
        lines.append((*cells, f"{one['largest_difference']:g}"))
    return lines


if __name__ == "__main__":
    main()
