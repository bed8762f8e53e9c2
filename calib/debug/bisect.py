"""`ditf check --bisect`: find the first block, and in it the first value, that differs from the export.

The input of each block is compared with the unmodified model (`hidden_states` in golden.npz). Inside a block
the weights are folded, so the unmodified model has no counterpart of a value. Values are therefore compared
with those that the traced program gave in PyTorch at export (trace.npz), where it had parity with the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ditf.calib.debug.sketch import sketch, worst_error
from ditf.calib.debug.widened_graph import WidenedGraph
from ditf.runtime.bundles.bundle import GOLDEN, TRACE, Bundle
from ditf.runtime.bundles.golden_file import Golden, read_golden
from ditf.runtime.bundles.manifest import DYNAMIC_EXAMPLE, hidden_states_name
from ditf.runtime.errors import BundleError
from ditf.runtime.features_runner import FeaturesRunner

MARGIN = 8.0
"""Limit of a boundary's error over the error that PyTorch had at export in the same precision."""

LEAST = 1e-5  # a limit below float32's rounding would be crossed by another order of summation
VALUE_LIMITS = {"float32": 1e-2, "float16": 0.3, "bfloat16": 2.0, "int8": 0.5}
"""Largest `worst_error` of sketches that rounding explains: about ten times that of good bundles."""

_AT_ONCE = 64  # values fetched in one run: whole tensors are large


@dataclass(frozen=True)
class Departure:
    """The error of one block's input or of one value.

    Attributes:
        name: name of the value in the graph.
        error: its `worst_error`.
        limit: the largest error that rounding explains.
    """

    name: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "error": self.error, "limit": self.limit, "ok": self.ok}


@dataclass(frozen=True)
class Bisection:
    """Where a graph departs from the model.

    Attributes:
        boundaries: the input of each block in order, compared with the unmodified model.
        values: the values between the last good boundary and the first bad one, in order, up to the first
            that is beyond its limit.
        place: a text such as "block 3", "before block 0" or "after the last block"; "" if nothing departs.
    """

    boundaries: list[Departure]
    values: list[Departure]
    place: str

    @property
    def culprit(self) -> Departure | None:
        """The first value beyond its limit."""
        return next((value for value in self.values if not value.ok), None)


def bisect(bundle: Bundle, widened: WidenedGraph, golden: Golden, features_ok: bool) -> Bisection:
    """Find where a graph departs from the model on the first golden image under the first condition.

    Args:
        widened: features.onnx widened and rounded.
        features_ok: whether the features pass their gates; if they do, only the boundaries are searched.

    Raises:
        BundleError: the bundle was exported before bundles held trace.npz.
    """
    if "hidden_states" not in golden or TRACE not in bundle.manifest.files:
        raise BundleError(f"{bundle.path} has no {TRACE}", "export it again with this version")
    trace = bundle.read_arrays(TRACE)
    _check_arrays(bundle, golden, trace)
    names = [hidden_states_name(index) for index in range(len(golden["hidden_states"]))]
    outputs = _run(bundle, widened, names)
    rows = golden["hidden_rows"]
    boundaries = []
    for name, expected, measured in zip(names, golden["hidden_states"], trace["boundaries"], strict=True):
        tokens = image_tokens(outputs[name], bundle.manifest.grid, bundle.manifest.ensemble)[rows]
        limit = max(LEAST, MARGIN * float(measured)) if np.isfinite(measured) else LEAST
        boundaries.append(Departure(name, boundary_error(tokens, expected), limit))
    first = next((index for index, found in enumerate(boundaries) if not found.ok), len(names))
    if first == len(names) and features_ok:
        return Bisection(boundaries, [], "")
    if first == 0:
        place = "before block 0 (VAE encoder, noise or patch embedder)"
    elif first == len(names):
        place = f"after block {first - 2}: discard, norm, modulation or projection"
    else:
        place = f"block {first - 1}"
    segment = _segment(trace, widened, names, first)
    limit = VALUE_LIMITS[bundle.manifest.precision]
    return Bisection(boundaries, _values(bundle, widened, segment, limit), place)


def _check_arrays(bundle: Bundle, golden: Golden, trace: Mapping[str, np.ndarray]) -> None:
    """Refuse arrays whose shapes no export writes."""
    fits = {"names", "lengths", "values", "boundaries"} <= trace.keys() and "hidden_rows" in golden
    fits = fits and golden["hidden_states"].shape[1:2] == golden["hidden_rows"].shape
    fits = fits and len(trace["names"]) == len(trace["lengths"])
    fits = fits and len(trace["boundaries"]) == len(golden["hidden_states"])
    if not (fits and int(trace["lengths"].sum()) == len(trace["values"])):
        raise BundleError(
            f"{bundle.path}: {TRACE} and {GOLDEN} do not fit together", "export the bundle again"
        )


def _segment(
    trace: Mapping[str, np.ndarray], widened: WidenedGraph, names: Sequence[str], first: int
) -> dict[str, np.ndarray]:
    """Sketches of the values between two boundaries, in the order of the graph."""
    starts = np.cumsum(trace["lengths"]) - trace["lengths"]
    order = [name for node in widened.model.graph.node for name in node.output]
    start = order.index(names[first - 1]) + 1 if first else 0
    end = order.index(names[first]) + 1 if first < len(names) else len(order)
    wanted = set(order[start:end])
    return {
        str(name): trace["values"][begin : begin + length]
        for name, begin, length in zip(trace["names"], starts, trace["lengths"], strict=True)
        if str(name) in wanted
    }


def _values(
    bundle: Bundle, widened: WidenedGraph, segment: Mapping[str, np.ndarray], limit: float
) -> list[Departure]:
    """Departures of values in order, up to the first beyond its limit."""
    found: list[Departure] = []
    names = list(segment)
    for begin in range(0, len(names), _AT_ONCE):
        chunk = names[begin : begin + _AT_ONCE]
        outputs = _run(bundle, widened, chunk)
        for name in chunk:
            found.append(Departure(name, worst_error(sketch(outputs[name]), segment[name]), limit))
            if not found[-1].ok:
                return found
    return found


def _run(bundle: Bundle, widened: WidenedGraph, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Run the graph on the first golden image, at the batch that the graph was traced with."""
    session = widened.with_outputs(names).open()
    runner = FeaturesRunner(bundle, session)
    batch = bundle.manifest.batch
    image = read_golden(bundle)["images"][:1]
    repeated = image.repeat(DYNAMIC_EXAMPLE if batch == "dynamic" else int(batch), axis=0)
    return session.run({"image": repeated, **runner.feeds()})


def image_tokens(residual: np.ndarray, grid: tuple[int, int], ensemble: int) -> np.ndarray:
    """The first image's tokens [N, C], averaged over the ensemble.

    Args:
        residual: [B * E, N or L + N, C]; text tokens may precede the image tokens.
    """
    averaged: np.ndarray = residual[:ensemble, -grid[0] * grid[1] :].mean(axis=0)
    return averaged


def boundary_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """`worst_error` of the channels' rms over tokens, for [H, C]."""
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.sqrt(((actual.astype(np.float64) - expected) ** 2).mean(axis=0))
    size = np.sqrt((expected.astype(np.float64) ** 2).mean(axis=0))
    return worst_error(size + difference, size)
