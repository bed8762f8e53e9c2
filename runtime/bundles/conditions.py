"""The graph's inputs for each condition of a bundle that has several conditions or a live one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ditf.runtime.bundles.bundle import CONDITIONS, Bundle
from ditf.runtime.errors import BundleError, InputError

_OTHERS = ("image", "noise")  # inputs of a graph that do not belong to its condition
TIMESTEP = "timestep"
TIMESTEPS = 1000  # of every supported scheduler

Feeds = dict[str, np.ndarray]


def key(index: int, name: str) -> str:
    """The name in conditions.npz of the array for the graph's input `name` under condition `index`."""
    return f"{index}.{name}"


class Conditions:
    """The conditions of an opened bundle, by name.

    Args:
        bundle: a bundle with conditioning "bank" or "live". With "bake" there is nothing to choose.
        inputs: {name: shape} of the graph's inputs.
    """

    def __init__(self, bundle: Bundle, inputs: Mapping[str, tuple[int | None, ...]]) -> None:
        self._mode = bundle.manifest.conditioning
        self._entries = bundle.manifest.conditions
        self._rows: list[Feeds] = []
        if self._mode == "bake":
            return
        arrays = bundle.read_arrays(CONDITIONS)
        names = [name for name in inputs if name not in _OTHERS]
        if {name.partition(".")[2] for name in arrays} != set(names) or any(
            array.shape != inputs[name.partition(".")[2]] for name, array in arrays.items()
        ):
            raise BundleError(f"{bundle.path / CONDITIONS} does not fit the graph", "export the bundle again")
        try:
            self._rows = [
                {name: arrays[key(index, name)] for name in names} for index in range(len(self._entries))
            ]
        except KeyError as error:
            raise BundleError(
                f"{bundle.path / CONDITIONS} lacks {error}", "export the bundle again"
            ) from None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the conditions, the default first."""
        return tuple(entry["name"] for entry in self._entries)

    def feeds(self, prompt: str | None, custom: Mapping[str, np.ndarray] | None = None) -> Feeds:
        """The graph's inputs for a condition.

        Args:
            prompt: the name of a condition; None is the first.
            custom: tensors that replace those of the condition, for a live graph.

        Raises:
            InputError: the name is unknown, there is nothing to choose, or the graph does not take a tensor.
        """
        if self._mode == "bake":
            if prompt is not None and prompt not in self.names:
                raise InputError(
                    f"this bundle has its condition baked in and knows no {prompt!r}",
                    "export it with --conditioning bank",
                )
            if custom is not None:
                raise InputError(
                    "this bundle has its condition baked in", "export it with --conditioning live"
                )
            return {}
        row = self._rows[self._index(prompt)]
        return row if custom is None else self._replaced(row, custom)

    def _index(self, prompt: str | None) -> int:
        if prompt is None:
            return 0
        if prompt not in self.names:
            known = ", ".join(map(repr, self.names[:8])) + (", ..." if len(self.names) > 8 else "")
            raise InputError(f"this bundle has no condition {prompt!r}", f"choose one of {known}")
        return self.names.index(prompt)

    def _replaced(self, row: Feeds, custom: Mapping[str, np.ndarray]) -> Feeds:
        if self._mode != "live":
            raise InputError("a bank takes its own rows only", "export it with --conditioning live")
        if not isinstance(custom, Mapping):
            raise InputError("embeddings must be a mapping from the graph's inputs to arrays")
        arrays: Feeds = {}
        for name, value in custom.items():
            if name not in row:
                raise InputError(f"the graph has no input {name!r}", f"choose from {', '.join(row)}")
            wanted = row[name]
            array = _as_array(value, wanted)
            arrays[name] = array
            if array.shape != wanted.shape or array.dtype != wanted.dtype:
                raise InputError(
                    f"{name} must be {wanted.dtype} {list(wanted.shape)},"
                    f" got {array.dtype} {list(array.shape)}"
                )
            if not np.isfinite(array).all():
                raise InputError(f"{name} holds NaN or infinity")
            if name == TIMESTEP and not 0 <= int(array[0]) < TIMESTEPS:
                raise InputError(f"timestep {int(array[0])} is out of range", f"choose 0..{TIMESTEPS - 1}")
        return {**row, **arrays}


def _as_array(value: object, wanted: np.ndarray) -> np.ndarray:
    """An array of the value; if one number is wanted, a number becomes the array that the graph takes."""
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.asarray(None)
    if array.size == wanted.size == 1 and array.ndim <= 1 and array.dtype.kind == wanted.dtype.kind:
        return array.reshape(wanted.shape).astype(wanted.dtype)
    return array
