"""Compiling a parsed network into a plan."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from ditf.engines.network import LayerType, Network, Profile
from ditf.engines.timing_cache import TimingCache
from ditf.runtime.backends.flavour import PORTABLE, TARGETS, has
from ditf.runtime.bundles.onnx_graph import Graph
from ditf.runtime.errors import BundleError, InputError, MissingComponent

Say = Callable[[str], None]
Step = Callable[[str, int, int], None]
"""Called with the compiler's phase, the steps done, and the number of steps."""


@dataclass(frozen=True)
class BuildOptions:
    """How plans are compiled.

    Attributes:
        target: compute capability such as "sm_89", or "portable"; None means the GPU of this machine.
        level: TensorRT's builder optimisation level, 0..5; None is its default.
        workspace: bytes of scratch memory that features.plan may use on the GPU; None means all of it.
        hardware_compatible: the plan runs on Ampere and newer GPUs.
        version_compatible: the plan runs on newer versions of TensorRT.
        strip_weights: the plan holds no weights and is refitted from the bundle when it is opened.
        tf32: float32 products may round their factors to 10 mantissa bits, as the products of a 16-bit bundle
            do anyway. TensorRT does so unless told otherwise.
    """

    target: str | None = None
    level: int | None = None
    workspace: int | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False
    strip_weights: bool = False
    tf32: bool = False

    def to_json(self) -> dict[str, Any]:
        """The options that were given, without the target and what follows from the bundle."""
        given = asdict(self)
        del given["target"], given["tf32"]
        return {name: value for name, value in given.items() if value is not None and value is not False}


@dataclass(frozen=True)
class Compiled:
    """A plan's bytes, the network it was compiled from, and, of a detailed build, the builder's log."""

    plan: bytes
    layers: tuple[LayerType, ...]
    log: Sequence[str] = ()


def compile_plan(
    trt: Any,
    graph: Graph,
    options: BuildOptions,
    profiles: Sequence[Profile] = (),
    check: Callable[[tuple[LayerType, ...]], None] = lambda layers: None,
    cache: TimingCache | None = None,
    step: Step = lambda phase, done, total: None,
    details: bool = False,
) -> Compiled:
    """Parse a graph as a strongly typed network and compile it.

    Args:
        profiles: ranges of dynamic inputs.
        check: called with the parsed network's layers before the long work starts.
        step: called with the progress of the compiler's outermost phase.
        details: let the builder log what it compiled (`ditf.engines.report`).

    Raises:
        InputError: unknown target.
        MissingComponent: this version of TensorRT lacks an option that was asked for.
        BundleError: the parser or the compiler refuses the graph; the error holds their first message.
    """
    with _signals_kept() as arrived:
        return _compile(trt, graph, options, profiles, check, cache, step, lambda: arrived, details)


def _compile(
    trt: Any,
    graph: Graph,
    options: BuildOptions,
    profiles: Sequence[Profile],
    check: Callable[[tuple[LayerType, ...]], None],
    cache: TimingCache | None,
    step: Step,
    stop: Callable[[], object],
    details: bool,
) -> Compiled:
    """See `compile_plan`.

    Args:
        stop: polled during the build; a true value cancels it.
    """
    network = Network(trt, graph, details)
    layers = network.layers
    check(layers)
    config = network.builder.create_builder_config()
    _set_target(trt, config, options.target)
    _set_options(trt, config, options)
    if details:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for profile in profiles:
        optimization_profile = network.builder.create_optimization_profile()
        for name, (smallest, usual, largest) in profile.items():
            optimization_profile.set_shape(name, smallest, usual, largest)
        config.add_optimization_profile(optimization_profile)
    if has(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, step, stop)
    if cache is not None:
        cache.attach(config)
    plan = network.builder.build_serialized_network(network.network, config)
    if plan is None:  # there is no exception
        raise BundleError(
            f"{trt.__name__} cannot compile {graph.path.name} for {options.target or 'this GPU'}"
            f" ({network.log.last})",
            "give it a larger --workspace"
            if options.workspace is not None and "OutOfMemory" in network.log.last
            else "try other options, or export the bundle again with this version",
        )
    if cache is not None:
        cache.keep(config)
    return Compiled(bytes(plan), layers, network.log.messages)


def _set_target(trt: Any, config: Any, target: str | None) -> None:
    if target is None or target == PORTABLE:
        return
    if target not in TARGETS:
        raise InputError(f"unknown target {target!r}", f"choose {', '.join((*TARGETS, PORTABLE))}")
    capability = target.replace("_", "").upper()
    ahead = has(trt, "IBuilderConfig.num_compute_capabilities")
    ahead = ahead and has(trt, "IBuilderConfig.set_compute_capability")
    if not (ahead and has(trt, f"ComputeCapability.{capability}")):
        raise MissingComponent(
            f"{trt.__name__} {trt.__version__} builds for the GPU that is there, not for {target}",
            "leave --target out, or use --backend tensorrt-rtx",
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)


def _set_options(trt: Any, config: Any, options: BuildOptions) -> None:
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if has(trt, "BuilderFlag.REQUIRE_USER_ALLOCATION"):  # TensorRT-RTX, which else may refuse stream capture
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if options.level is not None:
        config.builder_optimization_level = options.level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.hardware_compatible:
        _require(trt, "HardwareCompatibilityLevel.AMPERE_PLUS", "--hardware-compatible")
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.version_compatible:
        _require(trt, "BuilderFlag.VERSION_COMPATIBLE", "--version-compatible")
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.strip_weights:
        _require(trt, "BuilderFlag.STRIP_PLAN", "--strip-weights")
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)


def _require(trt: Any, name: str, flag: str) -> None:
    if not has(trt, name):
        raise MissingComponent(f"{trt.__name__} {trt.__version__} has no {flag}", f"leave {flag} out")


def _monitor(trt: Any, step: Step, stop: Callable[[], object]) -> Any:
    """A progress monitor that follows the outermost phase (there are hundreds) and can cancel the build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.totals[phase_name] = num_steps
                step(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, done: int) -> bool:
            if phase_name in self.totals:
                step(phase_name, done + 1, self.totals[phase_name])
            return not stop()

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()


@contextmanager
def _signals_kept() -> Iterator[list[int]]:
    """Hold back signals during a build and deliver them at its end.

    TensorRT calls back into Python to log and to report progress, and drops exceptions raised there. An
    exception from a signal handler would therefore be lost.
    """
    arrived: list[int] = []
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for one in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(one)
            if callable(handler):  # neither ignored nor the system's own
                handlers[one] = handler
                signal.signal(one, lambda number, frame: arrived.append(number))
    try:
        yield arrived
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if arrived:
            handlers[arrived[0]](arrived[0], None)  # raises
