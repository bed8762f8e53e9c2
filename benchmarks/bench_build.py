"""TensorRT-RTX engines built with no GPU: every family, both graphs, both precisions, every target.

Families are the tests' tiny checkpoints of the real diffusers classes, cut at block 2; what a build of a real
width costs is shown by PixArt-XL/2's geometry with random weights (--xl, minutes more).
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any, Literal

from bench_features import GEOMETRIES, export, write_checkpoint
from harness import ROOT, Bench, Rows, in_child, say, workplace

from ditf.cli.support.output import bytes_text
from ditf.engines.build import build
from ditf.engines.compile import BuildOptions
from ditf.export.checkpoints.loading import quieten_libraries
from ditf.export.exporter import export_bundle
from ditf.export.planning.export_options import ExportOptions
from ditf.runtime.backends.engine_records import FEATURES_PLAN, MATCH_PLAN
from ditf.runtime.backends.flavour import FLAVOURS, PORTABLE, TARGETS, load_flavour
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.errors import BundleError

sys.path.insert(0, str(ROOT))
from tests.checkpoints import SAVE

THREADS = 2
RTX = FLAVOURS["tensorrt-rtx"]
TARGET = "sm_89"
PRECISIONS: tuple[Literal["float16", "float32"], ...] = ("float16", "float32")
PROFILE = [(1, 4, 8)]


def main() -> None:
    """Export, build, and write the result."""
    bench = Bench(__doc__, THREADS)
    bench.parser.add_argument("--xl", action="store_true", help="PixArt-XL/2's geometry too")
    arguments = bench.parse()
    quieten_libraries()
    bench.start(**{"tensorrt-rtx": load_flavour(RTX.name).__version__})
    rows: list[dict[str, Any]] = []
    with workplace() as folder:
        for family, save in list(SAVE.items())[: 1 if bench.smoke else None]:
            with contextlib.redirect_stdout(sys.stderr):
                save(folder / family)
            for precision in PRECISIONS[: 1 if bench.smoke else None]:
                for batch in (1, "dynamic")[: 1 if bench.smoke else None]:
                    options = ExportOptions(
                        model=str(folder / family), layer="2", precision=precision, size=(48, 80),
                        prompt=() if family == "dit" else ("a cat",), batch=batch, discard="none",
                        output=folder / "bundle",
                    )  # fmt: skip
                    rows.append(one(family, export_bundle(options), TARGET))
        for precision in () if bench.smoke else PRECISIONS:
            bundle = export_bundle(ExportOptions(layer="9", precision=precision, output=folder / "demo"))
            rows += [one("demo, layer 9", bundle, target) for target in (*TARGETS, PORTABLE)]
        if arguments.xl:
            geometry = GEOMETRIES["xl"]
            in_child(write_checkpoint, folder / "xl", geometry)
            for short in ("fp16", "fp32"):
                in_child(export, folder / short, folder / "xl", geometry.layer)
                rows.append(one("PixArt-XL/2, layer 9, 512 px", folder / short, TARGET))
    table: Rows = [("graphs", "precision", "batch", "target", FEATURES_PLAN, MATCH_PLAN)]
    table += [cells(row) for row in rows]
    bench.write("build", {"rows": rows}, table, {("engines.md", "builds"): document(rows)})


def one(name: str, path: Path, target: str) -> dict[str, Any]:
    """Build a bundle in a process of its own."""
    manifest = Bundle.open(path).manifest
    say(f"{name}, {manifest.precision}, batch {manifest.batch}, {target}")
    found = in_child(measure, path, target)
    return {"name": name, "precision": manifest.precision, "batch": manifest.batch, "target": target, **found}


def measure(path: Path, target: str) -> dict[str, Any]:
    """Build; returns the seconds and bytes of each plan, or why there is none."""
    bundle = Bundle.open(path)
    batch = PROFILE if bundle.manifest.batch == "dynamic" else []
    try:
        record = build(bundle, RTX, load_flavour(RTX.name), BuildOptions(target), batch, force=True).record
    except BundleError as error:
        return {"refused": error.problem}
    sizes = {plan: listed["bytes"] for plan, listed in record.plans.items()}
    return {
        "seconds": record.seconds,
        "bytes": sizes,
        "left_out": record.left_out,
        "peak_bytes": record.peak_bytes,
        "onnx_bytes": sum(
            file["bytes"] for name, file in bundle.manifest.files.items() if "features" in name
        ),
    }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Format one row of the table."""
    head = (row["name"], row["precision"], batch_text(row), row["target"])
    if "refused" in row:
        return (*head, "refused", "")
    return (*head, *(plan_text(row, plan) for plan in (FEATURES_PLAN, MATCH_PLAN)))


def batch_text(row: dict[str, Any]) -> str:
    """Format the batch."""
    return "1-8" if row["batch"] == "dynamic" else str(row["batch"])


def plan_text(row: dict[str, Any], plan: str) -> str:
    """Format the seconds and the bytes of a plan."""
    if "refused" in row:
        return "refused"
    if plan not in row["bytes"]:
        return "left out"
    return f"{row['seconds'][plan]:.1f} s, {bytes_text(row['bytes'][plan])}"


def document(rows: list[dict[str, Any]]) -> Rows:
    """Make the table of docs/engines.md, with a row for each graph and target."""
    kinds = [(precision, batch) for precision in ("float16", "float32") for batch in (1, "dynamic")]
    found: dict[tuple[str, str], dict[Any, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["name"], row["target"]), {})[(row["precision"], row["batch"])] = row
    head = [f"{precision}, batch {'1-8' if batch == 'dynamic' else batch}" for precision, batch in kinds]
    lines: Rows = [("graphs", "target", *head, "match.plan, float16")]
    for (name, target), by_kind in found.items():
        cell = [plan_text(by_kind[kind], FEATURES_PLAN) if kind in by_kind else "" for kind in kinds]
        lines.append((name, target, *cell, plan_text(by_kind[kinds[0]], MATCH_PLAN)))
    return lines


if __name__ == "__main__":
    main()
