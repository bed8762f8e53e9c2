"""Traces a module to an ONNX file with its weights beside it, and checks what was written."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import nn

from ditf.export.checkpoints.weight_spill import rest
from ditf.export.graph.quantised_linears import TRANSLATIONS
from ditf.export.onnx_writing.value_names import name_values

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Traced:
    """The program that was written to a file.

    Attributes:
        program: the program itself, which PyTorch can run.
        names: {node of the program: value in the file}.
        float32_products: names of the file's matrix products that are computed in float32.
    """

    program: torch.export.ExportedProgram
    names: dict[str, str]
    float32_products: list[str]


def write_onnx(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    path: Path,
    opset: int,
    dynamic_shapes: dict[str, Any] | tuple[Any, ...] | None = None,
    progress: Progress = lambda done, total: None,
) -> Traced:
    """Trace `module` and write `path` and, if it has weights, `path`.data.

    Args:
        inputs: example inputs by name, in the order of the module's forward.
        outputs: names of what the module returns.
        dynamic_shapes: {dimension: torch.export.Dim} for every argument of the module's forward, by name
            or in order; None for static shapes.
        progress: called with the bytes of weights that are written so far, and of all weights.

    Raises:
        RuntimeError: as `check_onnx`.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        # torch.export warns of torch's own deprecations, which ditf cannot avoid.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dynamic_shapes,
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
        assert program is not None
        assert program.exported_program is not None
        names = name_values(program.model)
        products = [node for node in program.model.graph if node.op_type in ("MatMul", "Gemm")]
        wide = [str(node.name) for node in products if node.outputs[0].dtype == ir.DataType.FLOAT]
        _strip_metadata(program.model)
        _save(program.model, path, any(True for _ in module.parameters()), progress)
        check_onnx(path, opset)
    return Traced(program.exported_program, names, wide)


def _save(model: ir.Model, path: Path, external: bool, progress: Progress) -> None:
    """Write a model tensor by tensor, so that only one of them is in memory."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    total = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    done = [0]

    def wrote(tensor: ir.TensorProtocol, info: Any) -> None:
        rest()
        done[0] += tensor.nbytes
        progress(done[0], total)

    ir.save(model, path, external_data=f"{path.name}.data" if external else None, callback=wrote)
    progress(total, total)  # the smallest tensors are in the model itself, and are not reported


def _strip_metadata(model: ir.Model) -> None:
    """Remove the metadata of every node: stack traces that hold this machine's paths."""
    for graph in model.graphs():
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            value.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()


def check_onnx(path: Path, opset: int) -> None:
    """Run onnx's checker, with shape inference, on a written file, and compare its opset.

    Raises:
        RuntimeError: torch's exporter wrote an invalid file, or another opset.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except onnx.checker.ValidationError as error:
        raise RuntimeError(f"torch wrote an invalid {path.name}: {error}") from error
    model = onnx.load(str(path), load_external_data=False)
    written = {item.domain: item.version for item in model.opset_import}
    if written != {"": opset}:
        raise RuntimeError(f"{path.name} has opsets {written} instead of {opset}")
