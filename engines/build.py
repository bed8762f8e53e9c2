"""`ditf build`: compile a bundle's graphs into an engine, unless it is already there."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ditf.engines.compile import BuildOptions, Say, Step, compile_plan
from ditf.engines.network import LayerType, audit
from ditf.engines.profiles import (
    Profiles,
    advice,
    batch_profiles,
    features_options,
    features_profiles,
    limit_workspace,
    match_profile,
)
from ditf.engines.pruning import check_own
from ditf.engines.timing_cache import TimingCache
from ditf.runtime.backends.engine_records import (
    ENGINES_FOLDER,
    FEATURES_PLAN,
    MATCH_PLAN,
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
from ditf.runtime.bundles.staging import staged
from ditf.runtime.errors import BundleError, InputError, MissingComponent, NewerSchema
from ditf.runtime.files.hashed import sha256
from ditf.runtime.files.user_cache import cache_file

_NO_FLOAT32_PRODUCTS = "sm_75"  # TensorRT-RTX has no float32 GEMM for it
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
        batch: for a bundle with a dynamic batch, what `batch_profiles` takes.
        force: build even if the engine is there.
        report: called with a line when a new piece of work starts.
        step: called with the progress of the compiler.
        device: the number of the GPU that a flavour without ahead-of-time targets builds for. It must be the
            thread's current device.

    Raises:
        DitfError: the options do not fit the bundle, the flavour needs a GPU and there is none, TensorRT
            refuses the graph, the network's types differ from the bundle's recipe, or the disk is full.
    """
    check_own(bundle)
    sizes = batch_profiles(bundle, batch)
    target = check_target(flavour, options)
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
    for line in advice(bundle, sizes, trt):
        report(line)
    limited = limit_workspace(options, gpu)
    if limited.workspace != options.workspace:
        report(f"plans get at most {limited.workspace} bytes of the memory that GPU and CPU share")
    cache = None
    if not flavour.ahead and gpu is not None:
        path = cache_file("timing", flavour.name, trt.__version__, str(gpu))
        cache = None if path is None else TimingCache(path)
    own = replace(options, workspace=None)  # --workspace is of features.plan
    with staged(folder, RECORD) as temporary:
        plans, left_out, seconds = {}, {}, {}
        for plan, onnx, profiles, given in (
            (FEATURES_PLAN, FEATURES, features_profiles(bundle, sizes), features_options(bundle, limited)),
            (MATCH_PLAN, MATCH, [match_profile(bundle)], limit_workspace(own, gpu)),
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
            options=limited.to_json(),
            plans=plans,
            left_out=left_out,
            seconds=seconds,
            peak_bytes=_peak_bytes(),
        )
        (temporary / RECORD).write_text(record.to_json(), "utf-8")
    if cache is not None and cache.warning:
        report(f"warning: {cache.warning}")
    return Built(folder, record, reused=False)


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


def check_target(flavour: Flavour, options: BuildOptions) -> str:
    """The target of a build; "" means the GPU of this machine.

    Raises:
        InputError: the flavour has no such target, or an option does not go with it.
        MissingComponent: the flavour needs a GPU, and there is none.
    """
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
