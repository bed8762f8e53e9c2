"""Names for the values of a graph: after the module that computes them, and after the block that they enter.

torch's exporter calls a value "add_12". A name with the module's path says where an error is: in
`ditf check --bisect` and `--ranges`, in a TensorRT builder's message, in Polygraphy and in Netron.
"""

from __future__ import annotations

import re
from collections import Counter

import onnx_ir as ir

from ditf.runtime.bundles.manifest import hidden_states_name

_SCOPES = "pkg.torch.onnx.name_scopes"
_EMBEDDER = "trunk.embedder"
_RESIDUAL_OUTPUT = re.compile(r"trunk\.\w+\.\d+\.residual_output")


def name_values(model: ir.Model) -> dict[str, str]:
    """Name every node, and the values it makes, after its module: "trunk.blocks.3.feed_forward.up/MatMul".

    The image's residual that enters block i is called `hidden_states.<i>`. Where text and image are one
    sequence, text first, the value holds both. Graph inputs, outputs and initializers keep their names. The
    paths come from the metadata that torch's exporter writes on nodes.

    Returns:
        {torch's name: new name} of the values.
    """
    graph = model.graph
    outputs = {id(value) for value in graph.outputs}
    boundaries = _boundaries(graph)
    taken: Counter[str] = Counter()
    names: dict[str, str] = {}
    for node in graph:
        base = "/".join(part for part in (_scope(node), node.op_type) if part)
        node.name = _unique(base, taken)
        for index, value in enumerate(node.outputs):
            if id(value) in outputs or not value.name:
                continue
            name = boundaries.get(id(value)) or node.name + (f":{index}" if index else "")
            names[value.name] = name
            value.name = name
    return names


def _scope(node: ir.Node) -> str:
    """The path of the module that a node belongs to."""
    listed = re.findall(r"'([^']*)'", node.metadata_props.get(_SCOPES, ""))
    scope = listed[-2] if len(listed) > 1 else ""
    return "" if scope.startswith("_empty") else scope  # torch's name for no module


def _unique(base: str, taken: Counter[str]) -> str:
    taken[base] += 1
    return base if taken[base] == 1 else f"{base}_{taken[base] - 1}"


def _boundaries(graph: ir.Graph) -> dict[int, str]:
    """Names of the residuals that leave the embedder and each block, by the identity of the value.

    A block's is what its `ditf.export.graph.blocks.trunk.ResidualOutput` computes; the blocks follow one
    another in the graph.
    """
    residuals: list[ir.Value] = []
    embedded: ir.Value | None = None
    for node in graph:
        scope = _scope(node)
        if scope.startswith(_EMBEDDER):
            embedded = node.outputs[0]  # the last one leaves it
        elif _RESIDUAL_OUTPUT.fullmatch(scope):
            residuals.append(node.outputs[0])
    first = [] if embedded is None else [embedded]
    return {id(value): hidden_states_name(index) for index, value in enumerate([*first, *residuals])}
