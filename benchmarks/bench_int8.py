"""INT8 beside massive activations: naive, smoothed, and what float16 and float32 give on the same model.

A DiT of the real diffusers class with random weights, in pixels, cut at layer 4. Planted: in every block two
channels of the first norm's scale, and two of the values, are massive, as AdaLN and attention make them
in trained models. Accuracy is of the module in its own arithmetic in PyTorch against the unmodified model in
float32; time is of the ONNX file on ONNX Runtime, one thread, processor time, sides in turns.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_planted import accuracy, calibrated
from diffusers import DDPMScheduler, DiTTransformer2DModel
from harness import (
    Bench,
    Rows,
    graph_bytes,
    interleave,
    open_session,
    paired_ratio,
    say,
    summary,
    workplace,
)

from ditf.calib.recipe import choose_recipe
from ditf.cli.support.output import bytes_text
from ditf.engines.compile import BuildOptions, compile_plan
from ditf.export.assemble.features_graph import assemble
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.loading import quieten_libraries
from ditf.export.graph.precision import FLOAT16, FLOAT32, INT8
from ditf.export.onnx_writing.onnx_file import write_onnx
from ditf.export.planning.export_options import DEFAULT_OPSET, ExportOptions
from ditf.export.planning.plan import make_plan
from ditf.runtime.backends.flavour import load_flavour
from ditf.runtime.bundles.onnx_graph import Graph

THREADS = 1
SIDE, PATCH = 256, 8
LAYER = 4
CHANNELS = (7, 29)
SCALE, VALUE = 20.0, 60.0  # planted: 1 + scale of the norm, bias of the values
FLOAT16_SIDE, NAIVE, SMOOTHED = "float16", "int8, naive", "int8, smoothed"


def main() -> None:
    """Measure all sides of both checkpoints, and write the result."""
    bench = Bench(__doc__, THREADS, repeats=5)
    bench.parser.add_argument("--heads", type=int, default=16, help="of 72 channels: 16 is PixArt-XL's width")
    arguments = bench.parse(heads=1)
    layer = 1 if bench.smoke else LAYER
    quieten_libraries()
    bench.start()
    torch.set_num_threads(THREADS)
    cases = []
    for planted in (True,) if bench.smoke else (False, True):
        say("planted" if planted else "nothing planted")
        with workplace() as folder:
            cases.append(run(folder, arguments.heads, planted, arguments.repeats, layer))
    result = {"layer": layer, "side": SIDE, "patch": PATCH, "width": 72 * arguments.heads, "cases": cases}
    bench.write("int8", result, rows(cases), {("precision.md", "int8"): rows(cases)})


def run(folder: Path, heads: int, planted: bool, repeats: int, layer: int) -> dict[str, Any]:
    """Measure accuracy, bytes and time of every side of one checkpoint."""
    write_checkpoint(folder, heads, planted, layer)
    options = ExportOptions(model=str(folder), layer=str(layer), precision="int8", timestep=(10,))
    plan = make_plan(options, Checkpoint(folder, str(folder)))
    entry = replace(plan.entries[0], condition={"class_labels": torch.tensor([1])})
    known = calibrated(plan, entry)
    recipe = choose_recipe(known.calibration.extents or ())
    maxima = known.calibration.maxima
    sides = {
        "float32": FLOAT32,
        FLOAT16_SIDE: replace(FLOAT16, recipe=recipe),
        NAIVE: replace(INT8, recipe=recipe, maxima=maxima, smooth=False),
        SMOOTHED: replace(INT8, recipe=recipe, maxima=maxima),
    }
    found: dict[str, Any] = {}
    sessions = {}
    for side, precision in sides.items():
        say(side)
        path = folder / f"{side.replace(', ', '-')}.onnx"
        shown = replace(plan, precision=precision)
        graph = assemble(shown, (entry,), plan.noise(), known.settings).graph
        inputs = {"image": torch.zeros((1, *plan.size, 3), dtype=torch.uint8)}
        write_onnx(graph, inputs, ["features"], path, DEFAULT_OPSET)
        found[side] = {"metrics": accuracy(graph, known), "bytes": graph_bytes(path)}
        if precision.maxima is not None:
            found[side]["rtx_bytes"] = len(
                compile_plan(load_flavour("tensorrt-rtx"), Graph.read(path), BuildOptions("sm_89")).plan
            )
        disabled = () if precision.maxima is None else ("MatMulAddFusion",)  # as the runtime opens int8
        sessions[side] = open_session(path, THREADS, disabled)
    feeds = [{"image": image[None]} for image in known.images]
    seconds, disturbance = interleave(
        sessions, lambda side, number: sessions[side].run(None, feeds[number % 2]), repeats
    )
    for side, values in seconds.items():
        found[side]["seconds"] = summary(values)
        found[side]["float16_over_this"] = paired_ratio(seconds[FLOAT16_SIDE], values)
    return {"planted": planted, "recipe": recipe.exceptions(), "timing": disturbance, "sides": found}


def write_checkpoint(folder: Path, heads: int, planted: bool, layer: int = LAYER) -> None:
    """Save a DiT in pixels, with or without massive channels in norms and values."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=72,
        in_channels=3,
        out_channels=3,
        num_layers=layer + 1,
        sample_size=SIDE,
        patch_size=PATCH,
        num_embeds_ada_norm=1,
    )
    with torch.no_grad():
        model.pos_embed.proj.weight *= 6.0
        for parameter in model.transformer_blocks.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.5)  # so that every branch counts
        if planted:
            width = 72 * heads
            for block in model.transformer_blocks:
                for channel, sign in zip(CHANNELS, (1, -1), strict=True):
                    block.norm1.linear.bias[width + channel] = SCALE * sign
                    block.attn1.to_v.bias[channel] = VALUE * sign
    model.save_pretrained(folder / "transformer")
    DDPMScheduler(beta_schedule="linear").save_pretrained(folder / "scheduler")


def rows(cases: list[dict[str, Any]]) -> Rows:
    """Make the table."""
    lines: Rows = [
        (
            "model",
            "",
            "1 - cosine p01",
            "error",
            "within 1 px",
            "within a patch",
            "bytes",
            "time",
            "x float16",
        )
    ]
    for case in cases:
        for side, found in case["sides"].items():
            metrics = found["metrics"]
            lines.append(
                (
                    "planted" if case["planted"] else "unplanted",
                    side,
                    f"{1 - metrics['cosine_p01']:.1e}",
                    f"{metrics['relative_error']:.1e}",
                    f"{metrics['matches_within_1px']:.0%}",
                    f"{metrics['matches_within_patch']:.0%}",
                    bytes_text(found["bytes"]),
                    f"{found['seconds']['median']:.2f} s",
                    f"{found['float16_over_this']['median']:.2f}",
                )
            )
    return lines


if __name__ == "__main__":
    main()
