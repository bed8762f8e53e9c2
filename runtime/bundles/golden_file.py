"""Reading golden.npz, and checking that its arrays are such as an export writes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ditf.runtime.bundles.bundle import GOLDEN, Bundle
from ditf.runtime.errors import BundleError

_Shape = tuple[int, ...]
Golden = Mapping[str, np.ndarray]
"""The arrays of golden.npz; `ditf.export.measure.golden` writes them."""


def read_golden(bundle: Bundle) -> Golden:
    """Read a bundle's golden data and check the shape, type and range of every array.

    Raises:
        BundleError: the file is altered or unreadable, or an array does not fit the bundle.
    """
    arrays = bundle.read_arrays(GOLDEN)
    wrong = _contradiction(arrays, bundle)
    if wrong:
        raise BundleError(f"{bundle.path / GOLDEN} does not fit the bundle: {wrong}", "export it again")
    return arrays


def _contradiction(arrays: Mapping[str, np.ndarray], bundle: Bundle) -> str:
    """What is wrong with the first array that does not fit; "" if all fit."""
    manifest = bundle.manifest
    cells = manifest.grid[0] * manifest.grid[1]
    (height, width), channels = manifest.size, manifest.channels
    rows, points = _length(arrays.get("rows"), 1), _length(arrays.get("points"), 0)
    wanted: dict[str, tuple[str, _Shape, tuple[int, int] | None]] = {
        "images": ("u1", (2, height, width, 3), None),
        "rows": ("i8", (2, rows), (0, cells - 1)),
        "features": ("f4", (2, rows, channels), None),
        "points": ("f4", (points, 2), (0, max(height, width) - 1)),
        "match_points": ("f4", (points, 2), (0, max(height, width) - 1)),
    }
    optional = {
        "match_scores": ("f4", (points,), None),
        "whole_features": ("f4", (2, rows, channels), None),
        "whole_match_points": ("f4", (points, 2), (0, max(height, width) - 1)),
    }
    wanted |= {name: spec for name, spec in optional.items() if name in arrays}
    if ("whole_features" in arrays) != ("whole_match_points" in arrays):
        return "it has one of whole_features and whole_match_points"
    if "hidden_states" in arrays:
        states = arrays["hidden_states"]
        sampled = _length(states, 1)
        wanted["hidden_states"] = ("f4", (manifest.layer + 1, sampled, _length(states, 2)), None)
        wanted["hidden_rows"] = ("i8", (sampled,), (0, cells - 1))
    for name in arrays:
        label, _, index = name.partition("_")
        if label in ("rows", "features") and index.isdecimal():
            count = _length(arrays.get(f"rows_{index}"), 0)
            wanted[f"rows_{index}"] = ("i8", (count,), (0, cells - 1))
            wanted[f"features_{index}"] = ("f4", (count, channels), None)
    for name, (kind, shape, limits) in wanted.items():
        if name not in arrays:
            return f"it has no {name}"
        array = arrays[name]
        if array.dtype != np.dtype(kind) or array.shape != shape or array.size == 0:
            return f"{name} is {array.dtype} {list(array.shape)}, not {np.dtype(kind)} {list(shape)}"
        if not np.isfinite(array).all():
            return f"{name} holds NaN or infinity"
        if limits is not None and not (limits[0] <= array.min() and array.max() <= limits[1]):
            return f"{name} is out of range"
    return ""


def _length(array: np.ndarray | None, axis: int) -> int:
    """The length of an array's axis, at least 1; 1 if there is no such axis."""
    return max(1, array.shape[axis]) if array is not None and array.ndim > axis else 1
