"""The report of a bundle's features.plan, which is compiled once more for it."""

from __future__ import annotations

from typing import Any

from ditf.engines.compile import BuildOptions, Step, compile_plan
from ditf.engines.profiles import features_options, features_profiles
from ditf.engines.report.layer_log import read_layers
from ditf.engines.report.summary import Report
from ditf.runtime.backends.engine_records import FEATURES_PLAN, EngineRecord
from ditf.runtime.backends.flavour import Flavour
from ditf.runtime.bundles.bundle import FEATURES, Bundle
from ditf.runtime.errors import InputError


def report_features(
    bundle: Bundle,
    trt: Any,
    record: EngineRecord,
    options: BuildOptions,
    step: Step = lambda phase, done, total: None,
) -> Report:
    """Compile features.plan once more, with a detailed log, and report what became of the graph.

    For a dynamic batch it is compiled for the first profile's usual one alone, whose bytes are known.

    Args:
        record: of the engine.
        options: with which it was built.
        step: called with the progress of the compiler.

    Raises:
        DitfError: see `build` and `read_layers`.
    """
    usual = record.batch[0][1]
    graph, profiles = bundle.read_graph(FEATURES), features_profiles(bundle, ((usual, usual, usual),))
    given = features_options(bundle, options)
    compiled = compile_plan(trt, graph, given, profiles, step=step, details=True)
    return Report(FEATURES_PLAN, record.target, read_layers(compiled.log))


def check_reportable(flavour: Flavour) -> None:
    """Raise an InputError for a flavour whose builder does not log the compiled layers in a known form."""
    if not flavour.ahead:
        raise InputError(
            f"--report reads the log of tensorrt-rtx, not of {flavour.name}",
            "use --backend tensorrt-rtx, which needs no GPU",
        )
