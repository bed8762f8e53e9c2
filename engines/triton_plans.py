"""Choosing the engines that a Triton server can load: full TensorRT, one version, one plan per GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ditf.runtime.backends.engine_records import EngineRecord, engine_folders, read_record, verify_plans
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.errors import BundleError, InputError

FLAVOUR = "tensorrt"
_OLDEST_COMPATIBLE = 80  # hardware-compatible plans run from sm_80 on
_BUILD = "build one on the GPU that will serve it: ditf build --backend tensorrt"


class NoEngine(InputError):
    """The bundle has no engine that Triton could load."""


@dataclass(frozen=True)
class Plans:
    """Engines that go into one model.

    Attributes:
        version: the version of TensorRT that built all of them.
        by_target: {"sm_87": (folder, record)}.
        default: the engine for any other GPU from sm_80 on, or None.
        profile: index of the optimisation profile that starts at one image.
        batch: usual and largest batch that all of them take.
    """

    version: str
    by_target: dict[str, tuple[Path, EngineRecord]]
    default: tuple[Path, EngineRecord] | None
    profile: int
    batch: tuple[int, int]

    @property
    def engines(self) -> dict[str, tuple[Path, EngineRecord]]:
        """All engines by the name of their folder."""
        both = [*self.by_target.values(), *([self.default] if self.default else [])]
        return {folder.name: (folder, record) for folder, record in both}


def choose_plans(bundle: Bundle, targets: Sequence[str]) -> Plans:
    """Choose the engines to serve.

    Args:
        targets: the servers' GPUs, such as "sm_87"; by default all that the bundle has engines for.

    Raises:
        NoEngine: the bundle has no usable engine.
        InputError: a target has no engine, or the engines are of several versions of TensorRT.
        BundleError: a plan is damaged.
    """
    usable, passed_over = _usable(bundle)
    compatible = [one for one in usable if one[1].options.get("hardware_compatible")]
    by_target: dict[str, tuple[Path, EngineRecord]] = {}
    for folder, record in usable:
        by_target.setdefault(record.capability, (folder, record))
    if targets:
        chosen = {}
        for target in targets:
            reached = compatible if int(target.removeprefix("sm_")) >= _OLDEST_COMPATIBLE else []
            fitting = [by_target[target]] if target in by_target else reached[:1]
            if not fitting:
                why = "; ".join(passed_over) or "it has none"
                there = f"it has them for {', '.join(by_target)}" if by_target else why
                raise InputError(f"{bundle.path} has no {FLAVOUR} engine for {target}: {there}", _BUILD)
            chosen[target] = fitting[0]
        by_target, compatible = chosen, []
    if not by_target:
        why = "; ".join(passed_over) or "it has none"
        raise NoEngine(f"{bundle.path} has no {FLAVOUR} engine: {why}", _BUILD)
    default = compatible[0] if compatible else None
    engines = [*by_target.values(), *([default] if default else [])]
    versions = sorted({record.version for _, record in engines})
    if len(versions) > 1:
        raise InputError(
            f"the engines are of TensorRT {' and '.join(versions)}, and a Triton has one",
            "name the GPUs of one with --target",
        )
    profiles = [_profile(folder, record) for folder, record in engines]
    if len({index for index, _ in profiles}) > 1:
        raise InputError("the engines have their batches in different profiles", "build them alike")
    for folder, record in engines:
        verify_plans(folder, record)
    smallest = min((batch for _, batch in profiles), key=lambda batch: batch[1])
    return Plans(versions[0], by_target, default, profiles[0][0], smallest)


def capability(target: str) -> str:
    """Triton's way to write a compute capability: "8.7" for "sm_87"."""
    digits = target.removeprefix("sm_")
    return f"{digits[:-1]}.{digits[-1]}"


def _usable(bundle: Bundle) -> tuple[list[tuple[Path, EngineRecord]], list[str]]:
    """Engines that Triton's backend can load, newest first, and why the others cannot be loaded."""
    usable, passed_over = [], []
    for folder in engine_folders(bundle.path):
        try:
            record = read_record(folder, bundle.trust)
        except BundleError as error:
            passed_over.append(error.problem)
            continue
        stale = record.stale(bundle)
        if record.flavour != FLAVOUR:
            passed_over.append(f"{folder.name} is of {record.flavour}, which Triton does not load")
        elif stale:
            passed_over.append(f"{folder.name} was {stale}")
        elif record.options.get("strip_weights"):
            passed_over.append(f"{folder.name} was built with --strip-weights")
        else:
            usable.append((folder, record))
    return sorted(usable, key=lambda one: _numbers(one[1].version), reverse=True), passed_over


def _profile(folder: Path, record: EngineRecord) -> tuple[int, tuple[int, int]]:
    """The profile that starts at one image and reaches furthest, with its usual and largest batch."""
    fixed = len(record.batch) == 1 and len(set(record.batch[0])) == 1
    found = [(high, index, usual) for index, (low, usual, high) in enumerate(record.batch) if low == 1]
    if fixed and not found:
        return 0, (record.batch[0][0], record.batch[0][0])
    if not found:
        raise InputError(
            f"{folder.name} takes batches of {record.batch_text}, none of 1", "build it with --batch 1,4,8"
        )
    high, index, usual = max(found)
    return index, (usual, high)


def _numbers(version: str) -> list[int]:
    return [int(part) if part.isdigit() else 0 for part in version.split(".")]
