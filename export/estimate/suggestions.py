"""Suggests how to change a plan that does not fit a device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

from ditf.export.estimate.estimate import Estimate
from ditf.export.graph.precision import PRECISIONS
from ditf.export.planning.plan import Plan
from ditf.export.planning.size import Size

_SHRUNK = tuple(Fraction(eighths, 8) for eighths in (7, 6, 5, 4, 3, 2))


def suggest(plan: Plan, memory: int) -> list[str]:
    """Changes that each make a plan fit alone; if none does, the smallest set of them that was found.

    It tries an ensemble of one, a batch of one, float16, sizes that are smaller by eighths of their sides,
    and the last layer that fits.

    Args:
        memory: bytes of the device.

    Returns:
        Flags for the command line, such as ["--layer 13", "--size 480x480"]; [] if nothing helps.
    """
    single = [flags for flags, changed in _cheap(plan) if _fits(changed, memory)]
    single += _shape_changes(plan, memory)
    if single:
        return single
    smaller, flags = plan, ""
    for flag, _ in _cheap(plan):
        smaller = next(changed for name, changed in _cheap(smaller) if name == flag)
        flags += f"{flag} "
    if smaller is not plan:
        if _fits(smaller, memory):
            return [flags.strip()]
        return [flags + change for change in _shape_changes(smaller, memory)]
    return []


def _cheap(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Changes that have one step only."""
    if plan.options.ensemble > 1:
        yield "--ensemble 1", _with(plan, ensemble=1)
    if plan.options.batch not in (1, "dynamic"):
        yield "--batch 1", _with(plan, batch=1)
    if plan.options.precision == "float32":
        yield "--precision fp16", replace(_with(plan, precision="float16"), precision=PRECISIONS["float16"])


def _shape_changes(plan: Plan, memory: int) -> list[str]:
    """The largest size and the last layer that fit, each alone."""
    found = []
    for size in _smaller_sizes(plan):
        if _fits(replace(plan, size=size), memory):
            found.append(f"--size {size}")
            break
    low, high = -1, plan.layer  # low fits, or is no layer; high does not fit
    while high - low > 1:
        middle = (low + high) // 2
        if _fits(replace(plan, layer=middle), memory):
            low = middle
        else:
            high = middle
    return [*([f"--layer {low}"] if low >= 0 else []), *found]


def _smaller_sizes(plan: Plan) -> Iterator[Size]:
    cell = plan.latents.stride * plan.family.patch_size
    for factor in _SHRUNK:
        size = Size(*(int(length * factor) // cell * cell for length in plan.size))
        if min(size) > 0:
            yield size


def _with(plan: Plan, **options: Any) -> Plan:
    return replace(plan, options=replace(plan.options, **options))


def _fits(plan: Plan, memory: int) -> bool:
    return Estimate(plan).memory_bytes <= memory
