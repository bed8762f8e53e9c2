"""`ditf export-triton`: write a bundle as models of a Triton Inference Server."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Optional

import typer

from ditf.cli.support.bundles import open_bundle
from ditf.cli.support.options import SIGNATURE, BatchDelayOption, BundleArgument, JsonOption, verb
from ditf.cli.support.output import bytes_text, say, show, table, write_json
from ditf.cli.support.paths import check_outside, check_writable
from ditf.engines.triton import RepositoryModel, bundle_models, check_name, write_models
from ditf.engines.triton_config import Placement
from ditf.engines.triton_plans import FLAVOUR, NoEngine, Plans, choose_plans
from ditf.runtime.backends.device import parse_device
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.errors import InputError

_MAX_BATCH = 8


@verb(SIGNATURE)
def export_triton(
    bundle: BundleArgument,
    repository: Annotated[
        Path, typer.Option(metavar="DIR", help="Triton's model repository; other models in it are kept.")
    ],
    name: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME", help="Models are called NAME.features, ...; the bundle's name by default."
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            metavar="auto|tensorrt|onnxruntime",
            help="Backend that runs the graphs; auto uses engines that ditf build made, if there are any.",
        ),
    ] = "auto",
    target: Annotated[
        Optional[str],
        typer.Option(metavar="sm_87,...", help="GPUs of the servers; by default all that have engines."),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="gpu|cuda:N|cpu",
            help="Where the graphs run: on every GPU of the server, on one of them, or on the CPU.",
        ),
    ] = "gpu",
    instances: Annotated[
        int, typer.Option(metavar="N", min=1, max=64, help="Instances of each graph on each GPU.")
    ] = 1,
    batch_delay: BatchDelayOption = 5.0,
    max_batch: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            min=1,
            max=1024,
            help="Images in one call, for a bundle with --batch dynamic; by default 8, or the engine's.",
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Write a bundle's models into a Triton model repository: features, match and correspond.

    Clients send what they send to `ditf serve`. Exporting again replaces this bundle's models, and no others.
    """
    check_outside(repository, inputs=(bundle,))
    check_writable(json_file, inputs=(bundle, repository))
    place = None if device == "gpu" else parse_device(device)
    on_cpu = place is not None and place.index is None
    opened = open_bundle(bundle)
    called = check_name(name or bundle.resolve().name)
    plans, reason = _plans(opened, backend, target, on_cpu)
    usual, largest = _batch(opened, plans, max_batch)
    index = None if place is None else place.index
    placement = Placement(not on_cpu, instances, largest, usual, round(batch_delay * 1000), index)
    models = bundle_models(opened, called, placement, plans)
    what = f"TensorRT {plans.version} plans" if plans else "ONNX Runtime"
    say(f"{bundle} for {what} ({reason})")
    gone = write_models(repository, opened, called, models)
    _report(bundle, repository, models, [path.name for path in gone], plans, json_file)


def _plans(opened: Bundle, backend: str, target: Optional[str], on_cpu: bool) -> tuple[Optional[Plans], str]:
    """The engines to serve, or None for ONNX Runtime, and the reason."""
    if backend not in ("auto", FLAVOUR, "onnxruntime"):
        raise InputError(
            f"--backend {backend!r} is not one that Triton runs here",
            f"choose auto, {FLAVOUR} or onnxruntime",
        )
    targets = _parse_gpus(target)
    if backend == "onnxruntime" or on_cpu:
        if targets or backend == FLAVOUR:
            raise InputError(
                "engines need TensorRT and a GPU", "leave out --target, or --backend and --device"
            )
        return None, "named" if backend == "onnxruntime" else "auto; engines need GPUs"
    try:
        return choose_plans(opened, targets), "auto" if backend == "auto" else "named"
    except NoEngine as error:
        if backend == FLAVOUR:
            raise
        return None, f"auto; {error.problem}"


def _parse_gpus(text: Optional[str]) -> list[str]:
    """Compute capabilities of a comma-separated list, each once.

    Raises:
        InputError: one of them is not a compute capability.
    """
    if text is None:
        return []
    targets = list(dict.fromkeys(part.strip().lower() for part in text.split(",")))
    for target in targets:
        if not re.fullmatch(r"sm_[1-9]\d{1,2}", target):
            raise InputError(f"--target {target!r} is no compute capability", "for example --target sm_87")
    return targets


def _batch(opened: Bundle, plans: Optional[Plans], max_batch: Optional[int]) -> tuple[int, int]:
    """The usual and the largest batch."""
    own = opened.manifest.batch
    if own != "dynamic":
        if max_batch not in (None, own):
            raise InputError(
                f"--max-batch does not fit: this bundle's batch is {own}", "export it with --batch dynamic"
            )
        return own, own
    if plans is None:
        return max_batch or _MAX_BATCH, max_batch or _MAX_BATCH
    usual, largest = plans.batch
    if max_batch is not None and max_batch > largest:
        raise InputError(
            f"--max-batch {max_batch} is more than the {largest} that its engines take",
            "build them with --batch",
        )
    return min(usual, max_batch or largest), max_batch or largest


def _report(
    bundle: Path,
    repository: Path,
    models: Sequence[RepositoryModel],
    gone: Sequence[str],
    plans: Optional[Plans],
    json_file: Optional[Path],
) -> None:
    rows: list[tuple[str, ...]] = [("model", "runs on", "batch", "bytes")]
    listed = []
    for model in models:
        size = model.copied_bytes
        runs = str(model.config.get("platform", "python"))
        batch = str(model.config["max_batch_size"] or "")
        rows.append((model.name, runs, batch, bytes_text(size)))
        listed.append({"name": model.name, "platform": runs, "bytes": size})
    show(table(rows))
    for folder, record in plans.engines.values() if plans else ():
        show(f"engine {folder.name}: TensorRT {record.version}, built on {record.gpu}")
    if plans:
        show(f"needs a Triton with TensorRT {plans.version}; its release notes say which it has")
    for name in gone:
        show(f"removed {name}, which this bundle no longer has")
    write_json(
        json_file,
        {
            "bundle": str(bundle),
            "repository": str(repository),
            "models": listed,
            "removed": list(gone),
            "tensorrt": plans.version if plans else None,
            "engines": list(plans.engines) if plans else [],
        },
    )
