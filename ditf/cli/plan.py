"""`ditf plan`: estimate the cost of an export on a device from the configs alone."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ditf.cli.support.exporter import needs_exporter
from ditf.cli.support.options import JsonOption, verb
from ditf.cli.support.output import bytes_text, show, table, write_json
from ditf.cli.support.paths import check_writable
from ditf.export.estimate.devices import DEVICES, Device, find_device
from ditf.export.planning.export_options import ExportOptions
from ditf.runtime.errors import GateFailed, InputError

if TYPE_CHECKING:
    from ditf.export.estimate.estimate import Estimate
    from ditf.export.planning.plan import Plan


@verb(
    takes="model vae layer size precision ensemble text_tokens text_padding",
    helps={
        "model": "'demo', a directory with its configs, or a published model's hub id.",
        "text_tokens": "Keep only this many T5 tokens; all, or those of a short prompt, by default.",
    },
)
def plan(
    *,
    options: ExportOptions,
    batch: Annotated[int, typer.Option(help="Number of images in one call.")] = 1,
    device: Annotated[
        Optional[str],
        typer.Option(metavar="|".join(DEVICES), help="Show one device in detail; all devices by default."),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Estimate an export from the configs alone; exit 1 if it does not fit the memory of --device."""
    check_writable(json_file)
    chosen = DEVICES if device is None else {device: find_device(device)}
    options = replace(options, batch=batch)
    model, vae = options.model, options.vae
    with needs_exporter():
        from ditf.export.estimate.estimate import Estimate
        from ditf.export.estimate.published_configs import open_configs, open_vae_configs
        from ditf.export.estimate.suggestions import suggest
        from ditf.export.planning.plan import plan_from_configs
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_configs(model))
        encoder = None if vae is None else stack.enter_context(open_vae_configs(vae))
        decided = plan_from_configs(options, checkpoint, encoder)
        cost = Estimate(decided)
        if device is not None:
            cost.seconds(chosen[device])  # or say that its rate is not published, before anything is shown
        ok = device is None or cost.memory_bytes <= chosen[device].memory_bytes
        advice = [] if device is None or ok else suggest(decided, chosen[device].memory_bytes)
    show(_described(decided, cost))
    if device is None:
        show(
            "\n"
            + table([("device", "roofline", "memory needed"), *(_row(chosen[n], n, cost) for n in chosen)])
        )
    else:
        show("\n" + _detailed(chosen[device], cost))
    document = _document(decided, cost, chosen)
    if device is not None:
        limit = chosen[device].memory_bytes
        gate = {"name": "memory", "value": cost.memory_bytes, "limit": limit, "ok": ok}
        document |= {"gates": [gate], "remedies": advice}
    write_json(json_file, document, ok)
    if device is not None and not ok:
        raise GateFailed(
            f"{model} needs {bytes_text(cost.memory_bytes)}, the {chosen[device].title} has"
            f" {bytes_text(chosen[device].memory_bytes)}",
            f"what fits: {', or '.join(advice)}"
            if advice
            else "no smaller size or earlier layer fits either",
        )


def _described(plan: Plan, cost: Estimate) -> str:
    from ditf.export.estimate.work import MATCH_IMAGE, MATCH_POINTS, MATCHING, PARTS

    (height, width), (h, w) = plan.size, plan.grid
    rows: list[tuple[str, ...]] = [("part", "GFLOP", "bytes moved", "operands")]
    for part in (*PARTS, MATCHING):
        done = [work for work in cost.work if work.part == part]
        if done:
            kinds = ", ".join(sorted({work.kind for work in done if work.operations}))
            moved = bytes_text(sum(work.moved for work in done))
            rows.append((part, f"{cost.operations(part) / 1e9:,.1f}", moved, kinds))
    return "\n".join(
        [
            f"{plan.options.model}: {plan.family.blocks.describe(plan.layer)}, {plan.options.precision},"
            f" {height}x{width} px -> {plan.family.channels}x{h}x{w}",
            *([] if plan.options.vae is None else [f"encoder: {plan.options.vae} ({plan.latents.name})"]),
            f"parameters: {_count(cost.whole)} the whole transformer, {_count(cost.parameters)} in"
            f" the graph, VAE included: {bytes_text(cost.weight_bytes)}",
            f"activations: at most {bytes_text(cost.activation_bytes)}",
            f"export: about {bytes_text(cost.bundle_bytes)} on disk; the unmodified model in float32 is"
            f" {bytes_text(cost.reference_bytes)}, its largest block {bytes_text(cost.block_bytes)}",
            "",
            table(rows),
            "",
            f"matching: {MATCH_POINTS} points in an image of {MATCH_IMAGE[0]}x{MATCH_IMAGE[1]}",
        ]
    )


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 10**8 else f"{parameters / 1e6:.2f} M"


def _row(device: Device, name: str, cost: Estimate) -> tuple[str, ...]:
    return name, _time(device, cost), _memory(device, cost)


def _detailed(device: Device, cost: Estimate) -> str:
    from ditf.export.estimate.work import MATCHING, PARTS

    parts = [part for part in (*PARTS, MATCHING) if any(work.part == part for work in cost.work)]
    rows = [("features", _time(device, cost)), *((f"  {p}", _time(device, cost, p)) for p in parts)]
    rows[-1] = (MATCHING, rows[-1][1])
    return "\n".join(
        [
            f"{device.title} ({device.source})",
            table([("no faster than", ""), *rows, ("memory", _memory(device, cost))]),
        ]
    )


def _time(device: Device, cost: Estimate, *parts: str) -> str:
    try:
        milliseconds = 1e3 * cost.seconds(device, *parts)
    except InputError:
        return "no rate published"
    return f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.3g} s"


def _memory(device: Device, cost: Estimate) -> str:
    share = cost.memory_bytes / device.memory_bytes
    verdict = "" if share <= 1 else ": does not fit"
    return f"{bytes_text(cost.memory_bytes)} of {device.memory:g} GB, {share:.0%}{verdict}"


def _document(plan: Plan, cost: Estimate, devices: dict[str, Device]) -> dict[str, Any]:
    from ditf.export.estimate.work import MATCHING, PARTS

    def seconds(device: Device) -> Optional[dict[str, float]]:
        try:
            return {
                "features": cost.seconds(device),
                **{p: cost.seconds(device, p) for p in (*PARTS, MATCHING)},
            }
        except InputError:
            return None

    return {
        "model": plan.options.model,
        "family": plan.family.name,
        "vae": None if plan.options.vae is None else plan.latents.identity(),
        "layer": plan.layer,
        "layer_name": plan.family.blocks.describe(plan.layer),
        "size": list(plan.size),
        "grid": list(plan.grid),
        "channels": plan.family.channels,
        "precision": plan.options.precision,
        "ensemble": plan.options.ensemble,
        "batch": plan.options.batch,
        "parameters": {"whole": cost.whole, "graph": cost.parameters},
        "bytes": {
            "weights": cost.weight_bytes,
            "activations": cost.activation_bytes,
            "memory": cost.memory_bytes,
            "bundle": cost.bundle_bytes,
            "unmodified_float32": cost.reference_bytes,
            "largest_block_float32": cost.block_bytes,
        },
        "work": [
            {"part": work.part, "operands": work.kind, "flops": work.operations, "bytes_moved": work.moved}
            for work in cost.work
        ],
        "devices": {
            name: {
                "seconds": seconds(device),
                "memory_bytes": device.memory_bytes,
                "fits": cost.memory_bytes <= device.memory_bytes,
                "source": device.source,
            }
            for name, device in devices.items()
        },
    }
