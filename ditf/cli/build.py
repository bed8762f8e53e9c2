"""`ditf build` and `ditf engines`: build TensorRT engines here or ahead of time, list and remove them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ditf.cli.support.bundles import open_bundle
from ditf.cli.support.options import SIGNATURE, BundleArgument, JsonOption, verb
from ditf.cli.support.output import bytes_text, say, show, table, write_json
from ditf.cli.support.paths import check_writable
from ditf.cli.support.progress import steps
from ditf.engines.build import Built
from ditf.engines.build import build as build_bundle
from ditf.engines.compile import BuildOptions
from ditf.engines.pruning import prune
from ditf.engines.report.features import check_reportable, report_features
from ditf.engines.trtexec import unread_opset
from ditf.export.estimate.devices import DEVICES
from ditf.runtime.backends.cuda import open_cuda
from ditf.runtime.backends.device import find_device
from ditf.runtime.backends.engine_records import engine_folders, read_record, verify_plans
from ditf.runtime.backends.flavour import PORTABLE, TARGETS, choose_flavour
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.errors import BundleError, InputError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}

TargetOption = Annotated[
    Optional[str],
    typer.Option(
        metavar="sm_89,...|portable",
        help="GPUs to build for ahead of time, with tensorrt-rtx; portable by default.",
    ),
]


@verb(SIGNATURE)
def build(
    bundle: BundleArgument,
    backend: Annotated[
        str,
        typer.Option(metavar="auto|tensorrt|tensorrt-rtx", help="Builder; auto chooses one and prints it."),
    ] = "auto",
    target: TargetOption = None,
    batch: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="N|N,N|MIN,USUAL,MAX",
            help="Batch for a bundle of --batch dynamic; 1 by default. Two sizes get a profile each; repeat"
            " for more.",
        ),
    ] = None,
    level: Annotated[
        Optional[int], typer.Option(min=0, max=5, help="Builder optimisation level; TensorRT's default.")
    ] = None,
    workspace: Annotated[
        Optional[str],
        typer.Option(
            metavar="BYTES",
            help="Limit of the scratch memory of features.plan, such as 2GB; none by default.",
        ),
    ] = None,
    hardware_compatible: Annotated[
        bool,
        typer.Option(
            "--hardware-compatible", help="Build for Ampere and newer GPUs, not for this GPU alone."
        ),
    ] = False,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible",
            help="Build for newer versions of TensorRT too; such engines open only with --allow-host-code.",
        ),
    ] = False,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="Build plans without weights.")
    ] = False,
    device: Annotated[
        Optional[str],
        typer.Option(
            metavar="cuda|cuda:N", help="GPU that tensorrt builds on and for; the first by default."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build again what exists.")] = False,
    report: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FILE",
            help="Write what the compiler made of features.onnx: kernels, bytes, the least time. JSON.",
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Build TensorRT engines of a bundle; engines that exist and fit are kept."""
    check_writable(json_file, report, inputs=(bundle,))
    if report is not None:
        check_reportable(choose_flavour(backend)[0])
    opened = open_bundle(bundle)
    sizes = [_parse_batch(text) for text in batch or ()]
    options = {
        "level": level,
        "workspace": None if workspace is None else parse_bytes(workspace),
        "hardware_compatible": hardware_compatible,
        "version_compatible": version_compatible,
        "strip_weights": strip_weights,
    }
    built = build_targets(opened, backend, target, sizes, options, force, device)
    if report is not None:
        _report(report, opened, backend, built, options)
    write_json(json_file, {"bundle": str(bundle), "engines": [_document(one) for one in built]})


def _report(
    path: Path, bundle: Bundle, backend: str, built: Sequence[Built], options: dict[str, Any]
) -> None:
    """Report on engines: a table for each on stdout, and everything in a file."""
    _, trt = choose_flavour(backend)
    documents = []
    for one in built:
        with steps() as step:
            settings = BuildOptions(target=one.record.target, **options)
            report = report_features(bundle, trt, one.record, settings, step)
        show(f"{report.plan} for {report.target}: {report.kernel_count} kernels")
        show(table([("  " + kind, str(count)) for kind, count in report.kernels.items()]))
        for stage, row in report.stages.items():
            show(f"  {stage}: {row['kernels']} kernels, {bytes_text(row['bytes'])} moved")
        show(
            f"  {bytes_text(report.bytes_moved)} moved, {bytes_text(report.engine.activation_bytes)} of"
            f" activations, {bytes_text(report.engine.weight_bytes)} of weights"
        )
        least = report.least_ms(DEVICES)
        show("  at least " + ", ".join(f"{ms:.3g} ms on {name}" for name, ms in least.items()))
        documents.append({"key": one.record.key, **report.to_json(DEVICES)})
    write_json(path, {"bundle": str(bundle.path), "plans": documents})


def build_targets(
    bundle: Bundle,
    backend: str,
    target: Optional[str],
    batch: Sequence[Sequence[int]] = (),
    options: Optional[dict[str, Any]] = None,
    force: bool = False,
    device: Optional[str] = None,
) -> list[Built]:
    """Build for every target of a comma-separated list, and print what was built."""
    targets = parse_targets(target)
    index = None if device is None else find_device(device).index
    if device is not None and index is None:
        raise InputError("engines are not for the CPU", "leave --device out; ONNX Runtime runs there")
    flavour, trt = choose_flavour(backend)
    if index is not None:
        if flavour.ahead:
            raise InputError(
                f"{flavour.name} builds without a GPU, so --device means nothing", "give --target"
            )
        open_cuda(index).use()  # TensorRT builds on the thread's current device
    say(f"{flavour.name} {trt.__version__}" + (" (auto)" if backend == "auto" else ""))
    newer = unread_opset(bundle.manifest.opset, trt.__version__) if not flavour.ahead else ""
    if newer:
        say(f"warning: {newer}")
    built = []
    for one in targets:
        with steps() as step:
            settings = BuildOptions(target=one, **(options or {}))
            made = build_bundle(bundle, flavour, trt, settings, batch, force, say, step, index or 0)
        record = made.record
        plans = ", ".join(f"{name} {bytes_text(plan['bytes'])}" for name, plan in record.plans.items())
        took = "was there" if made.reused else f"built in {sum(record.seconds.values()):.1f} s"
        left = "".join(f"; no {name}: {why}" for name, why in record.left_out.items())
        show(f"{made.folder}: {plans}, {took}{left}")
        built.append(made)
    return built


engines = typer.Typer(help="List a bundle's engines, or remove those that do not fit.", add_completion=False)


@engines.command("list")
@verb(SIGNATURE)
def list_engines(
    bundle: BundleArgument,
    json_file: JsonOption = None,
) -> None:
    """List a bundle's engines: GPU, version, and whether they were built from its graphs."""
    check_writable(json_file, inputs=(bundle,))
    opened = open_bundle(bundle)
    rows: list[tuple[str, ...]] = [("engine", "built with", "for", "batch", "bytes", "state")]
    document = []
    for folder in engine_folders(opened.path):
        try:
            record = read_record(folder, opened.trust)
        except BundleError as error:
            rows.append((folder.name, "", "", "", "", error.problem))
            document.append({"key": folder.name, "state": error.problem})
            continue
        state = record.stale(opened) or "fits the bundle"
        try:
            verify_plans(folder, record, contents=False)
        except BundleError as error:
            state = error.problem
        size = sum(plan["bytes"] for plan in record.plans.values())
        where = record.target or record.gpu or ""
        built_with = f"{record.flavour} {record.version}"
        rows.append((folder.name, built_with, where, record.batch_text, bytes_text(size), state))
        document.append({"key": record.key, "state": state, "target": where, "bytes": size})
    show(table(rows) if len(rows) > 1 else f"{bundle} has no engines; build one: ditf build {bundle}")
    write_json(json_file, {"bundle": str(bundle), "engines": document})


@engines.command("prune")
@verb(SIGNATURE)
def prune_engines(
    bundle: BundleArgument,
    json_file: JsonOption = None,
) -> None:
    """Remove engines that are damaged or were built from other graphs."""
    check_writable(json_file, inputs=(bundle,))
    opened = open_bundle(bundle)
    removed = prune(opened, engine_folders(opened.path))
    for folder, why in removed:
        show(f"removed {folder}: {why}")
    if not removed:
        show("nothing to remove")
    write_json(
        json_file, {"bundle": str(bundle), "removed": [{"key": f.name, "why": why} for f, why in removed]}
    )


def parse_bytes(text: str) -> int:
    """Parse a size such as "2GB" or "500M", in powers of ten.

    Raises:
        InputError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", text.lower())
    if not match or float(match[1]) == 0:
        raise InputError(f"size {text!r} is not a number of bytes", "for example 2GB")
    count = int(float(match[1]) * _UNITS[match[2]])
    if count >= 2**63:
        raise InputError(f"size {text!r} is more than any GPU has", "for example 2GB")
    return count


def parse_targets(text: Optional[str]) -> list[Optional[str]]:
    """Parse a comma-separated list of targets; each is kept once.

    Raises:
        InputError: one of them is unknown.
    """
    if text is None:
        return [None]
    targets = list(dict.fromkeys(part.strip().lower() for part in text.split(",")))
    for target in targets:
        if target not in (*TARGETS, PORTABLE):
            raise InputError(
                f"unknown target {target!r}",
                f"choose {', '.join((*TARGETS, PORTABLE))}, or build on another GPU with --backend tensorrt",
            )
    return list(targets)


def _parse_batch(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--batch {text!r} is not numbers", "for example --batch 1,4,8") from None


def _document(built: Built) -> dict[str, Any]:
    return {
        "folder": str(built.folder),
        "reused": built.reused,
        "plans": built.record.plans,
        "seconds": built.record.seconds,
        "peak_bytes": built.record.peak_bytes,
    }
