"""`ditf build`: compile a bundle's graphs into an engine, unless it is already there."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ditf.engines.compile import BuildOptions, Say, Step, compile_plan
from ditf.engines.network import LayerType, Profile, audit
from ditf.engines.report.layer_log import read_layers
from ditf.engines.report.summary import Report
from ditf.engines.timing_cache import TimingCache
from ditf.runtime.backends.engine_records import (
    ENGINES_FOLDER,
    FEATURES_PLAN,
    IMAGE_SIDES,
    MATCH_PLAN,
    MATCH_PLAN_POINTS,
    RECORD,
    SCHEMA,
    EngineRecord,
    read_record,
    sources,
    verify_plans,
)
from ditf.runtime.backends.flavour import PORTABLE, TARGETS, Flavour
from ditf.runtime.backends.gpu import find_gpu
from ditf.runtime.bundles.bundle import FEATURES, MATCH, Bundle
from ditf.runtime.bundles.staging import ENGINE_FILES, staged
from ditf.runtime.errors import BundleError, InputError, MissingComponent, NewerSchema
from ditf.runtime.files.hashed import sha256
from ditf.runtime.files.stage_folder import clear
from ditf.runtime.files.user_cache import cache_file

Profiles = tuple[tuple[int, int, int], ...]
"""(smallest, usual, largest) batch of each optimisation profile."""

_NO_FLOAT32_PRODUCTS = "sm_75"  # TensorRT-RTX has no float32 GEMM for it
_KEY = re.compile(r"tensorrt(-rtx)?-\d[\w.]*-.+-b[\d-]+-[0-9a-f]{8}")  # as `engine_key` names engines
_NOT_AHEAD = ("hardware_compatible", "version_compatible", "strip_weights")  # not for builds without a GPU


@dataclass(frozen=True)
class Built:
    """An engine on disk; `reused` says that it was there before."""

    folder: Path
    record: EngineRecord
    reused: bool


def build(
    bundle: Bundle,
    flavour: Flavour,
    trt: Any,
    options: BuildOptions,
    batch: Sequence[Sequence[int]] = (),
    force: bool = False,
    report: Say = lambda line: None,
    step: Step = lambda phase, done, total: None,
    device: int = 0,
) -> Built:
    """Build features.plan and match.plan of a bundle, or reuse an engine that fits.

    Args:
        bundle: the bundle, whose files are verified first.
        trt: the module of the flavour, `tensorrt` or `tensorrt_rtx`.
        batch: for a bundle with a dynamic batch, one entry per profile: one size, or smallest, usual
            and largest.
        force: build even if the engine is there.
        report: called with a line when a new piece of work starts.
        step: called with the progress of the compiler.
        device: the number of the GPU that a flavour without ahead-of-time targets builds for. It must be the
            thread's current device.

    Raises:
        DitfError: the options do not fit the bundle, the flavour needs a GPU and there is none, TensorRT
            refuses the graph, the network's types differ from the bundle's recipe, or the disk is full.
    """
    _check_own(bundle)
    sizes = _batch(bundle, batch)
    target = _target(flavour, options)
    gpu = find_gpu(device) if target == "" else None
    key = engine_key(bundle, flavour, trt.__version__, target, str(gpu or ""), sizes, options)
    folder = bundle.path / ENGINES_FOLDER / key
    if not force and folder.is_dir():
        try:
            record = read_record(folder, bundle.trust)
            verify_plans(folder, record)
            return Built(folder, record, reused=True)
        except NewerSchema:
            raise
        except BundleError as error:
            report(f"{error.problem}: building it again")
    bundle.verify(bundle.manifest.files)
    cache = None
    if not flavour.ahead and gpu is not None:
        path = cache_file("timing", flavour.name, trt.__version__, str(gpu))
        cache = None if path is None else TimingCache(path)
    with staged(folder, RECORD) as temporary:
        plans, left_out, seconds = {}, {}, {}
        for plan, onnx, profiles, given in (
            (FEATURES_PLAN, FEATURES, features_profiles(bundle, sizes), _features_options(bundle, options)),
            (MATCH_PLAN, MATCH, [match_profile(bundle)], replace(options, workspace=None)),
        ):
            if plan == MATCH_PLAN and target == _NO_FLOAT32_PRODUCTS:
                left_out[plan] = f"{flavour.name} has no float32 products for {target}: numpy matches"
                continue
            report(f"{plan} for {target or gpu}")
            start = time.perf_counter()

            def check(layers: tuple[LayerType, ...], onnx: str = onnx) -> None:
                if onnx == FEATURES:
                    recipe = bundle.manifest.recipe
                    audit(layers, bundle.manifest.precision, recipe.get("float32_products", []))

            try:
                graph = bundle.read_graph(onnx)
                compiled = compile_plan(trt, graph, given, profiles, check, cache, step)
            except BundleError as error:
                raise _explained(error, bundle, target) from error
            (temporary / plan).write_bytes(compiled.plan)
            seconds[plan] = round(time.perf_counter() - start, 3)
            plans[plan] = {"bytes": len(compiled.plan), "sha256": sha256(temporary / plan)}
        record = EngineRecord(
            schema=SCHEMA,
            key=key,
            flavour=flavour.name,
            version=trt.__version__,
            target=target,
            gpu=None if gpu is None else str(gpu),
            driver=None if gpu is None else gpu.driver,
            onnx=sources(bundle),
            batch=[list(size) for size in sizes],
            options=options.to_json(),
            plans=plans,
            left_out=left_out,
            seconds=seconds,
            peak_bytes=_peak_bytes(),
        )
        (temporary / RECORD).write_text(record.to_json(), "utf-8")
    if cache is not None and cache.warning:
        report(f"warning: {cache.warning}")
    return Built(folder, record, reused=False)


def report_features(
    bundle: Bundle,
    flavour: Flavour,
    trt: Any,
    record: EngineRecord,
    options: BuildOptions,
    step: Step = lambda phase, done, total: None,
) -> Report:
    """Compile features.plan once more, with a detailed log, and report what became of the graph.

    A dynamic batch is counted as the first profile's usual one.

    Args:
        record: of the engine.
        options: with which it was built.
        step: called with the progress of the compiler.

    Raises:
        InputError: the flavour's log is not one that can be read.
        DitfError: see `build` and `read_layers`.
    """
    check_reportable(flavour)
    batch = tuple((low, usual, high) for low, usual, high in record.batch)
    graph, profiles = bundle.read_graph(FEATURES), features_profiles(bundle, batch)
    given = _features_options(bundle, options)
    compiled = compile_plan(trt, graph, given, profiles, step=step, details=True)
    return Report(FEATURES_PLAN, record.target, read_layers(compiled.log, batch[0][1]))


def check_reportable(flavour: Flavour) -> None:
    """Raise an InputError for a flavour whose builder does not log the compiled layers in a known form."""
    if not flavour.ahead:
        raise InputError(
            f"--report reads the log of tensorrt-rtx, not of {flavour.name}",
            "use --backend tensorrt-rtx, which needs no GPU",
        )


def engine_key(
    bundle: Bundle,
    flavour: Flavour,
    version: str,
    target: str,
    gpu: str,
    batch: Profiles,
    options: BuildOptions,
) -> str:
    """The engine's name: readable, and different when anything that affects the plans differs."""
    matters = [sources(bundle), flavour.name, version, target, gpu, batch, options.to_json()]
    digest = hashlib.sha256(json.dumps(matters, sort_keys=True).encode()).hexdigest()[:8]
    where = target or "".join(c if c.isalnum() else "-" for c in gpu.lower())
    sizes = "-".join(str(size) for profile in batch for size in dict.fromkeys(profile))
    return f"{flavour.name}-{version}-{where}-b{sizes}-{digest}"


def prune(bundle: Bundle, folders: Sequence[Path]) -> list[tuple[Path, str]]:
    """Remove stale engines, damaged engines, and the remains of builds that were killed.

    Returns:
        The removed folders, each with the reason. Links, folders that hold anything but an engine's files,
        and engines that a newer ditf made are left alone.
    """
    _check_own(bundle)
    left = [(path, "left by a build that was killed") for path in clear(bundle.path / ENGINES_FOLDER)]
    removed = []
    for folder in folders:
        if not _engine_alone(folder):
            continue
        try:
            record = read_record(folder, bundle.trust)
            verify_plans(folder, record)
            why = record.stale(bundle)
        except NewerSchema:
            continue
        except BundleError as error:
            why = error.problem
        if why:
            removed.append((folder, why))
    for folder, _ in removed:
        shutil.rmtree(folder)
    return [*left, *removed]


def _check_own(bundle: Bundle) -> None:
    """Refuse an engines/ that is a link: a received bundle could point it outside of itself."""
    if (bundle.path / ENGINES_FOLDER).is_symlink():
        raise InputError(f"{bundle.path / ENGINES_FOLDER} is a link", "put a folder in its place")


def _engine_alone(folder: Path) -> bool:
    """Whether a folder has an engine's name and holds only files that `build` writes."""
    if folder.is_symlink() or not _KEY.fullmatch(folder.name):
        return False
    inside = list(folder.iterdir())
    return all(path.name in ENGINE_FILES and path.is_file() and not path.is_symlink() for path in inside)


def _batch(bundle: Bundle, batch: Sequence[Sequence[int]]) -> Profiles:
    own = bundle.manifest.batch
    if own != "dynamic":
        if any(set(sizes) != {own} for sizes in batch):
            raise InputError(
                f"--batch does not fit: this bundle's batch is {own}", "export it with --batch dynamic"
            )
        return ((own, own, own),)
    profiles = []
    for sizes in batch or ((1,),):
        if list(sizes) != sorted(sizes) or len(sizes) not in (1, 3) or sizes[0] < 1:
            raise InputError(
                f"--batch {','.join(map(str, sizes))} is neither one size nor smallest, usual and largest",
                "for example --batch 1,4,8, or --batch 1 --batch 8 for two profiles",
            )
        profiles.append((sizes[0], sizes[len(sizes) // 2], sizes[-1]))
    return tuple(profiles)


def _target(flavour: Flavour, options: BuildOptions) -> str:
    """The checked target; "" means the GPU of this machine."""
    if flavour.ahead:
        for name in _NOT_AHEAD:
            if getattr(options, name):
                flag = "--" + name.replace("_", "-")
                raise InputError(
                    f"{flavour.name} builds without a GPU and has no {flag}",
                    f"leave {flag} out; see --target portable",
                )
        target = options.target or PORTABLE
        if target not in (*TARGETS, PORTABLE):
            raise InputError(f"unknown target {target!r}", f"choose {', '.join((*TARGETS, PORTABLE))}")
        return target
    if options.target is not None:
        raise InputError(
            f"{flavour.name} builds for the GPU that is here",
            "leave --target out, or use --backend tensorrt-rtx",
        )
    if find_gpu() is None:
        raise MissingComponent(
            f"{flavour.name} builds on the GPU that will run the engine, and there is no driver here",
            "build on the device, or ahead of time with --backend tensorrt-rtx --target",
        )
    return ""


def _features_options(bundle: Bundle, options: BuildOptions) -> BuildOptions:
    return replace(options, tf32=bundle.may_round(FEATURES))


def features_profiles(bundle: Bundle, batch: Profiles) -> list[Profile]:
    """The optimisation profiles of features.plan; [] if the batch is static."""
    if bundle.manifest.batch != "dynamic":
        return []
    height, width = bundle.manifest.size
    return [
        {"image": ((low, height, width, 3), (usual, height, width, 3), (high, height, width, 3))}
        for low, usual, high in batch
    ]


def match_profile(bundle: Bundle) -> Profile:
    """The optimisation profile of match.plan."""
    h, w = bundle.manifest.grid

    def over(sizes: tuple[int, int, int], cells: int) -> tuple[tuple[int, int], ...]:
        return tuple((size, cells) for size in sizes)

    return {
        "point_rows": over(MATCH_PLAN_POINTS, h),  # type: ignore[dict-item]
        "point_columns": over(MATCH_PLAN_POINTS, w),  # type: ignore[dict-item]
        "rows": over(IMAGE_SIDES, h),  # type: ignore[dict-item]
        "columns": over(IMAGE_SIDES, w),  # type: ignore[dict-item]
    }


def _explained(error: BundleError, bundle: Bundle, target: str) -> BundleError:
    """The error with its cause, where the cause is known."""
    if target == _NO_FLOAT32_PRODUCTS:
        kept = bundle.manifest.recipe.get("float32_products", [])
        what = f"{kept[0]} is one" if kept else "this bundle is float32"
        return BundleError(
            f"TensorRT-RTX has no float32 products for {target}, and {what} ({error.problem})",
            "export with --precision fp16, or build on the device with TensorRT",
        )
    return error


def _peak_bytes() -> int:
    """Peak resident memory in bytes. ru_maxrss would not do: a child inherits it from its parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
