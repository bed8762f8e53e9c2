"""What the float32 residual of a float16 graph costs, against the same graph with a float16 residual.

PixArt-XL/2 at its published size with random weights, layer 9, 512 px, condition baked in: latents in,
features out. Counted: nodes, casts and bytes of the ONNX file, layers and bytes of the TensorRT-RTX plan.
Timed: ONNX Runtime on one CPU thread, whose kernels compute both in float32, so that the casts are what is
timed. Accuracy: the module in its own arithmetic in PyTorch against float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx
import torch
from bench_conditioning import BAKE, GEOMETRIES, Case, Transformer, make_latents, make_module
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

from ditf.calib.parity import feature_parity
from ditf.cli.support.output import bytes_text
from ditf.engines.compile import BuildOptions, compile_plan
from ditf.export.checkpoints.loading import quieten_libraries
from ditf.export.graph.precision import FLOAT16, FLOAT32, Precision
from ditf.export.onnx_writing.emulation import Float32Accumulation
from ditf.export.onnx_writing.onnx_file import write_onnx
from ditf.export.planning.export_options import DEFAULT_OPSET
from ditf.runtime.backends.flavour import load_flavour
from ditf.runtime.bundles.onnx_graph import Graph

THREADS = 1
SIDES = {"float32 residual": FLOAT16, "float16 residual": replace(FLOAT16, residual=torch.float16)}


def main() -> None:
    """Write both graphs, count, time and compare."""
    bench = Bench(__doc__, THREADS, repeats=5)
    arguments = bench.parse()
    case = GEOMETRIES["small" if bench.smoke else "full"][0]
    quieten_libraries()
    bench.start()
    torch.set_num_threads(THREADS)
    latents = make_latents(case, case.make_family())
    with torch.no_grad():
        expected = baked(case, FLOAT32)(latents[0]).numpy()
    with workplace() as folder:
        results: dict[str, dict[str, Any]] = {}
        sessions = {}
        for side, precision in SIDES.items():
            say(side)
            path = folder / f"{side.replace(' ', '-')}.onnx"
            module = baked(case, precision)
            with torch.no_grad(), Float32Accumulation():
                actual = module(latents[0]).to(torch.float32).numpy()
            write_onnx(module, {"latents": latents[0]}, ["features"], path, DEFAULT_OPSET)
            del module
            engine = compile_plan(load_flavour("tensorrt-rtx"), Graph.read(path), BuildOptions("sm_89"))
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

        seconds, disturbance = interleave(SIDES, run, arguments.repeats)
    for side, values in seconds.items():
        results[side]["seconds"] = summary(values)
    first, second = (seconds[side] for side in SIDES)
    ratio = paired_ratio(first, second)
    result = {"case": case.to_json(), "timing": disturbance, "sides": results, "seconds_ratio": ratio}
    bench.write("residual", result, rows(results), {("precision.md", "residual"): rows(results)})


def baked(case: Case, precision: Precision) -> Transformer:
    """Make the transformer in a precision, with its condition baked in."""
    return make_module(case, case.make_family(), BAKE, precision)


def rows(results: dict[str, dict[str, Any]]) -> Rows:
    """Make the table."""
    lines: Rows = [
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
