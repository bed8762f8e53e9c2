"""TensorRT-RTX engines built with no GPU: every family, both graphs, both precisions, every target.

Families are the tests' tiny checkpoints of the real diffusers classes, cut at block 2; what a build of a real
width costs is shown by PixArt-XL/2's geometry with random weights (--xl, minutes more).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_features import GEOMETRIES, export, write_checkpoint
from provenance import in_child, pin_threads, provenance, say, write_result, write_table

from ditf.cli.console import bytes_text
from ditf.engines.build import build
from ditf.engines.compile import BuildOptions
from ditf.export.exporter import export_bundle
from ditf.export.options import ExportOptions
from ditf.export.pretrained import quieten_libraries
from ditf.runtime.bundle import Bundle
from ditf.runtime.engines import FEATURES_PLAN, MATCH_PLAN
from ditf.runtime.errors import BundleError
from ditf.runtime.flavour import FLAVOURS, PORTABLE, TARGETS, load

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.checkpoints import SAVE

THREADS = 2
RTX = FLAVOURS["tensorrt-rtx"]
TARGET = "sm_89"
PROFILE = [(1, 4, 8)]


def main() -> None:
    """Export, build, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--xl", action="store_true", help="PixArt-XL/2's geometry too")
    arguments = parser.parse_args()
    pin_threads(THREADS)
    quieten_libraries()
    origin = provenance(THREADS)
    origin["versions"] |= {"tensorrt-rtx": load(RTX.name).__version__}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for family, save in SAVE.items():
            with contextlib.redirect_stdout(sys.stderr):
                save(folder / family)
            for precision in ("float16", "float32"):
                for batch in (1, "dynamic"):
                    options = ExportOptions(
                        model=str(folder / family), layer="2", precision=precision, size=(48, 80),
                        prompt=() if family == "dit" else ("a cat",), batch=batch, discard="none",
                        output=folder / "bundle",
                    )  # fmt: skip
                    rows.append(one(family, export_bundle(options), TARGET))
        for precision in ("float16", "float32"):
            bundle = export_bundle(ExportOptions(layer="9", precision=precision, output=folder / "demo"))
            rows += [one("demo, layer 9", bundle, target) for target in (*TARGETS, PORTABLE)]
        if arguments.xl:
            geometry = GEOMETRIES["xl"]
            in_child(write_checkpoint, folder / "xl", geometry)
            for short in ("fp16", "fp32"):
                in_child(export, folder / short, folder / "xl", geometry.layer)
                rows.append(one("PixArt-XL/2, layer 9, 512 px", folder / short, TARGET))
    table = [("graphs", "precision", "batch", "target", FEATURES_PLAN, MATCH_PLAN, "peak memory")]
    table += [cells(row) for row in rows]
    write_result("build", origin, {"rows": rows}, table)
    write_table("engines.md", "builds", table)


def one(name: str, path: Path, target: str) -> dict[str, Any]:
    """Build a bundle in a process of its own."""
    manifest = Bundle.open(path).manifest
    say(f"{name}, {manifest.precision}, batch {manifest.batch}, {target}")
    found = in_child(measure, path, target)
    return {"name": name, "precision": manifest.precision, "batch": manifest.batch, "target": target, **found}


def measure(path: Path, target: str) -> dict[str, Any]:
    """Seconds and bytes of each plan, or why there is none."""
    bundle = Bundle.open(path)
    batch = PROFILE if bundle.manifest.batch == "dynamic" else []
    try:
        record = build(bundle, RTX, load(RTX.name), BuildOptions(target), batch, force=True).record
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
    """A line of the table."""
    batch = "1-8" if row["batch"] == "dynamic" else str(row["batch"])
    head = (row["name"], row["precision"], batch, row["target"])
    if "refused" in row:
        return (*head, "refused: no float32 products", "", "")
    plans = (
        f"{row['seconds'][plan]:.1f} s, {bytes_text(row['bytes'][plan])}"
        if plan in row["bytes"]
        else "left out"
        for plan in (FEATURES_PLAN, MATCH_PLAN)
    )
    return (*head, *plans, bytes_text(row["peak_bytes"]))


if __name__ == "__main__":
    main()
