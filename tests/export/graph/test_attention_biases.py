"""Biases of query, key and value: after the heads are split, or in the output's bias where that is exact."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch.nn import functional

from ditf.export.checkpoints.weights import Weights
from ditf.export.graph.blocks.adaln import UNGATED
from ditf.export.graph.blocks.gated_linear import read_gated
from ditf.export.graph.blocks.layers import AttentionNames, HeadProjection, attention, shared_value_bias
from ditf.export.graph.precision import FLOAT32, MEASURING
from ditf.export.graph.range_probes import recording
from ditf.export.measure.activation_ranges import _Largest

HEADS, DIM = 3, 16
WIDTH = HEADS * DIM
PARTS = ("q", "k", "v")
ROLES = ("query", "key", "value")


class Given(Weights):
    """Tensors in memory."""

    def __init__(self, tensors):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        super().__init__(shapes, dict.fromkeys(shapes, 0), dict.fromkeys(shapes, "F32"))
        self.tensors = tensors

    def _load(self, name):
        return self.tensors[name]


def weights(*, norm=False, without=()):
    """Two streams with biases that move the logits by several units."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for stream in ("image", "text"):
        for part in (*PARTS, "out"):
            name = f"{stream}.{part}"
            tensors[f"{name}.weight"] = torch.randn(WIDTH, WIDTH, generator=generator) / 4
            if name not in without:
                tensors[f"{name}.bias"] = torch.randn(WIDTH, generator=generator) * 3
        for part in "qk" if norm else "":
            tensors[f"{stream}.norm_{part}.weight"] = 1 + torch.randn(DIM, generator=generator) / 4
    return Given(tensors)


def names(stream, norm=False, rotary=False):
    norms = (f"{stream}.norm_q", f"{stream}.norm_k") if norm else None
    return AttentionNames(tuple(f"{stream}.{part}" for part in PARTS), norms, stream=stream, rotary=rotary)


def plain(weights, tokens, norm, bias):
    """The attention as diffusers computes it, with every bias where the checkpoint has it."""
    heads = {}
    for part in PARTS:
        rows = []
        for stream, x in tokens.items():
            name = f"{stream}.{part}"
            y = functional.linear(x, weights.tensors[f"{name}.weight"], weights.tensors.get(f"{name}.bias"))
            y = y.unflatten(-1, (HEADS, DIM)).transpose(1, 2)
            if norm and part != "v":
                y = functional.rms_norm(y, (DIM,), weights.tensors[f"{stream}.norm_{part}.weight"], 1e-6)
            rows.append(y)
        heads[part] = torch.cat(rows, dim=2)
    mask = None if bias is None else bias.expand(heads["q"].shape[2], -1)
    out = functional.scaled_dot_product_attention(heads["q"], heads["k"], heads["v"], mask)
    return projected(weights, tokens, out.transpose(1, 2).flatten(2))


def projected(weights, tokens, attended):
    parts = attended.split([x.shape[1] for x in tokens.values()], dim=1)
    return [
        functional.linear(
            part, weights.tensors[f"{stream}.out.weight"], weights.tensors.get(f"{stream}.out.bias")
        )
        for stream, part in zip(tokens, parts, strict=True)
    ]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "without", [(), ("image.v", "image.k"), ("text.v", "text.k"), ("image.out",), ("image.q", "text.q")]
)
@pytest.mark.parametrize("streams", [("image",), ("image", "text")])
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_changes(norm, without, streams, masked):
    generator = torch.Generator().manual_seed(1)
    given = weights(norm=norm, without=without)
    tokens = {stream: torch.randn(2, 7 + len(stream), WIDTH, generator=generator) for stream in streams}
    shared = names("image", norm)
    heads = [
        HeadProjection(given, names(stream, norm), HEADS, FLOAT32, shared=shared)(x)
        for stream, x in tokens.items()
    ]
    query, key, value = (torch.cat(parts, dim=2) for parts in zip(*heads, strict=True))
    bias = None
    if masked:
        bias = torch.zeros(key.shape[2])
        bias[:4], bias[4] = -10000.0, 2.0
    attended = attention(query, key, value, None, bias)
    parts = attended.split([x.shape[1] for x in tokens.values()], dim=1)
    value_bias = shared_value_bias(given, shared)
    for stream, part, expected in zip(streams, parts, plain(given, tokens, norm, bias), strict=True):
        out = read_gated(given, f"{stream}.out", UNGATED, FLOAT32, value_bias=value_bias)
        # Another order of summation; the logits reach 30.
        torch.testing.assert_close(out(part, {}), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("stream", "norm", "rotary", "shared", "kept"),
    [
        ("image", False, False, True, ""),  # its own: the key's and the value's go
        ("image", True, False, True, "k"),  # a norm follows: the key's stays
        ("image", False, True, True, "k"),  # a rotation follows: the key's differs between tokens
        ("text", False, False, True, "kv"),  # another stream's are left out: the differences stay
        ("text", True, False, True, "kv"),
        ("image", False, False, False, "kv"),  # nobody folds them
    ],
)
def test_which_biases_are_left_out(stream, norm, rotary, shared, kept):
    given = weights(norm=norm)
    own = names(stream, norm, rotary)
    project = HeadProjection(
        given, own, HEADS, FLOAT32, shared=names("image", norm, rotary) if shared else None
    )
    found = {part: getattr(project, f"{name}_bias") for name, part in zip(ROLES, PARTS, strict=True)}
    assert {part for part, bias in found.items() if bias is not None} == {"q", *kept}
    assert project.linear.bias is None
    if shared and "v" in kept:
        difference = given.tensors["text.v.bias"] - given.tensors["image.v.bias"]
        assert torch.equal(found["v"].flatten(), difference)


@pytest.mark.parametrize(
    ("bundle", "projections", "biases"),
    [
        ("demo_bundle", 9, {"query": 9}),
        # FLUX: the constant text of the first block is not projected; the second block's has its difference.
        ("bank_bundle", 5, {"query": 5, "key": 5, "value": 2}),
    ],
)
def test_no_bias_before_the_heads_in_onnx(request, bundle, projections, biases):
    graph = onnx.load(request.getfixturevalue(bundle) / "features.onnx", load_external_data=False).graph
    readers = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    products = [node for node in graph.node if node.op_type == "MatMul" and "project.linear" in node.name]
    assert len(products) == projections
    assert not [node.name for node in products if "Add" in readers[node.output[0]]]
    ends = [tensor.name.rpartition(".")[2] for tensor in graph.initializer]
    assert {part: ends.count(f"{part}_bias") for part in ROLES if f"{part}_bias" in ends} == biases


def test_a_bias_that_other_values_cancel_is_measured():
    """Only its sum with the product is emitted, and a graph may hold either in float16."""
    seen = _Largest(4)
    given = Given({"blocks.0.out.weight": torch.eye(4) * 1e5, "blocks.0.out.bias": torch.full((4,), -1e5)})
    out = read_gated(given, "blocks.0.out", UNGATED, MEASURING)
    with recording(seen.record):
        for _ in range(2):
            assert not out(torch.ones(1, 4, 4), {}).any()
    largest = {extent.kind: extent.max_abs for extent in seen.extents()}
    assert largest["scaled weight"] == 1e5
