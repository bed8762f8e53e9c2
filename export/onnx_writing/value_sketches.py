"""Writes trace.npz: a sketch of every value that the traced program computes in PyTorch.

`ditf check --bisect` compares another runtime's values with it, and finds the first that departs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.fx import Interpreter, Node

from ditf.calib.debug.bisect import boundary_error, image_tokens
from ditf.calib.debug.sketch import sketch
from ditf.export.checkpoints.weight_spill import resting
from ditf.export.onnx_writing.emulation import ExactFeatures, Float32Accumulation
from ditf.export.onnx_writing.onnx_file import Traced
from ditf.runtime.bundles.manifest import HIDDEN_STATES, hidden_states_name

_LEFT_OUT = (
    *("Reshape", "Transpose", "Slice", "Cast", "Split", "Unsqueeze", "Squeeze", "Expand", "Identity"),
    "Softmax",  # positive, so that signed sums cancel: what comes before and after says more
)
"""Operators without a sketch: most only move values."""


@torch.no_grad()
def write_trace(
    path: Path,
    traced: Traced,
    inputs: Mapping[str, torch.Tensor],
    golden: Mapping[str, np.ndarray],
    grid: tuple[int, int],
    ensemble: int,
    exact: ExactFeatures | None = None,
) -> None:
    """Run a traced program in its own precision and write a sketch of every value it computes.

    The file holds `names` [T] in the order of the graph, the `lengths` [T] of their sketches, the sketches
    one after another in `values`, and in `boundaries` [k + 1] the error of the hidden states that enter each
    block. Values of the operators in `_LEFT_OUT` are not in it. `exact` [R, C] and `exact_limit` [] are
    those of `exact`, if it is given.

    Args:
        inputs: the program's inputs by name, as `ditf check` will feed them.
        golden: the arrays of golden.npz; grid: (h, w) of the features.
        exact: the graph's features in float32 arithmetic.
    """
    recorder = _Recorder(traced)
    with resting(), Float32Accumulation():
        recorder.run(*inputs.values())
    hidden_states = (
        image_tokens(recorder.kept[hidden_states_name(index)], grid, ensemble)
        for index in range(len(golden["hidden_states"]))
    )
    boundaries = [
        boundary_error(tokens[golden["hidden_rows"]], expected)
        for tokens, expected in zip(hidden_states, golden["hidden_states"], strict=True)
    ]
    more = {} if exact is None else {"exact": exact.rows, "exact_limit": np.array(exact.limit)}
    np.savez_compressed(
        path,
        allow_pickle=False,
        names=np.array(list(recorder.sketches)),
        lengths=np.array([len(values) for values in recorder.sketches.values()]),
        values=np.concatenate(list(recorder.sketches.values())),
        boundaries=np.array(boundaries),
        **more,
    )


class _Recorder(Interpreter):
    """Runs a program; keeps the sketch of every value by its name in the file, and hidden states whole."""

    def __init__(self, traced: Traced) -> None:
        super().__init__(traced.program.module(check_guards=False))
        self._names = traced.names
        self.sketches: dict[str, np.ndarray] = {}
        self.kept: dict[str, np.ndarray] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        name = self._names.get(n.name)
        if name is None or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        if value.ndim > 1 and not name.rpartition("/")[2].startswith(_LEFT_OUT):
            array = value.to(torch.float32).numpy()
            self.sketches[name] = sketch(array)
            if name.startswith(HIDDEN_STATES):
                self.kept[name] = array
        return value
