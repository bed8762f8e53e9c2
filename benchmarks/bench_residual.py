"""What the float32 residual of a float16 graph costs, against the same graph with a float16 residual.

PixArt-XL/2 at its published size with random weights, layer 9, 512 px, condition baked in: latents in,
features out. Counted: nodes, casts and bytes of the ONNX file, layers and bytes of the TensorRT-RTX plan.
Timed: ONNX Runtime on one CPU thread, whose kernels compute both in float32, so that the casts are what is
timed. Accuracy: the module in its own arithmetic in PyTorch against float32.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from bench_conditioning import (
    GEOMETRIES,
    Case,
    RandomWeights,
    Transformer,
    graph_bytes,
    make_feeds,
    make_latents,
)
from provenance import (
    interleave,
    open_session,
    paired_ratio,
    pin_threads,
    provenance,
    say,
    summary,
    write_result,
    write_table,
)

from ditf.calib.parity import feature_parity
from ditf.cli.support.console import bytes_text
from ditf.engines.compile import BuildOptions, compile_plan
from ditf.export.checkpoints.loading import model_shapes, quieten_libraries
from ditf.export.families.base import TrunkSpec
from ditf.export.graph.precision import FLOAT16, FLOAT32, Precision
from ditf.export.onnx_writing.emulation import Float32Accumulation
from ditf.export.onnx_writing.onnx_file import write_onnx
from ditf.export.planning.options import DEFAULT_OPSET
from ditf.runtime.backends.flavour import load
from ditf.runtime.bundles.onnx_graph import Graph

THREADS = 1
SIDES = {"float32 residual": FLOAT16, "float16 residual": replace(FLOAT16, residual=torch.float16)}


def main() -> None:
    """Write both graphs, count, time and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, default="full")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    case = GEOMETRIES[arguments.geometry][0]
    quieten_libraries()
    pin_threads(THREADS)
    torch.set_num_threads(THREADS)
    origin = provenance(THREADS)
    latents = make_latents(case, case.make_family())
    with torch.no_grad():
        expected = make_module(case, FLOAT32)(latents[0]).numpy()
    with tempfile.TemporaryDirectory(prefix="ditf-bench-") as folder:
        results: dict[str, dict[str, Any]] = {}
        sessions = {}
        for side, precision in SIDES.items():
            say(side)
            path = Path(folder) / f"{side.replace(' ', '-')}.onnx"
            module = make_module(case, precision)
            with torch.no_grad(), Float32Accumulation():
                actual = module(latents[0]).to(torch.float32).numpy()
            write_onnx(module, {"latents": latents[0]}, ["features"], path, DEFAULT_OPSET)
            del module
            engine = compile_plan(load("tensorrt-rtx"), Graph.read(path), BuildOptions("sm_89"))
            kinds = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
            results[side] = {
                "nodes": len(kinds),
                "casts": kinds.count("Cast"),
                "bytes": graph_bytes(path),
                "rtx_layers": len(engine.layers),
                "rtx_bytes": len(engine.plan),
                "parity": feature_parity(actual, expected),
            }
            sessions[side] = open_session(path, THREADS)

        def run(side: str, number: int) -> None:
            sessions[side].run(None, {"latents": latents[number % len(latents)].numpy()})

        seconds, disturbance = interleave(
            {side: (lambda number, side=side: run(side, number)) for side in SIDES}, arguments.repeats
        )
    for side, values in seconds.items():
        results[side]["seconds"] = summary(values)
    first, second = (seconds[side] for side in SIDES)
    ratio = paired_ratio(first, second)
    result = {"case": case.to_json(), "timing": disturbance, "sides": results, "seconds_ratio": ratio}
    name = "residual" if arguments.geometry == "full" else f"residual-{arguments.geometry}"
    write_result(name, origin, result, rows(results))
    if arguments.geometry == "full":
        write_table("precision.md", "residual", rows(results))


@torch.no_grad()
def make_module(case: Case, precision: Precision) -> Transformer:
    """The baked transformer in a precision."""
    family = case.make_family()
    weights = RandomWeights(model_shapes(family.transformer_class, family.config))
    size = (case.side, case.side)
    feeds = make_feeds(case, family)
    trimmed = family.trim_text(feeds, family.text_tokens(feeds))
    side = case.side // 8 // family.patch_size
    spec = TrunkSpec(case.layer, size, (side, side), family.text_length(trimmed), precision)
    conditioner = family.conditioner(weights, replace(spec, precision=FLOAT32))
    given = conditioner(trimmed["timestep"], trimmed)
    trunk = family.trunk(weights, spec, given)
    return Transformer(trunk, None).eval()


def rows(results: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """The table."""
    lines: list[tuple[str, ...]] = [
        ("", "nodes", "casts", "bytes", "RTX layers", "RTX plan", "ONNX Runtime", "1 - cosine p01", "error")
    ]
    for side, found in results.items():
        lines.append(
            (
                side,
                str(found["nodes"]),
                str(found["casts"]),
                bytes_text(found["bytes"]),
                str(found["rtx_layers"]),
                bytes_text(found["rtx_bytes"]),
                f"{found['seconds']['median']:.2f} s",
                f"{1 - found['parity']['cosine_p01']:.1e}",
                f"{found['parity']['relative_error']:.1e}",
            )
        )
    return lines


if __name__ == "__main__":
    main()
