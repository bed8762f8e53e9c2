"""Layers of the traced transformer: linears, attention and feed-forwards in the graph's precision.

Weights are stored as [in, out], so that the graph needs no Transpose before a MatMul.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from ditf.export.checkpoints.weight_spill import spilled
from ditf.export.checkpoints.weights import Weights
from ditf.export.graph.blocks.smoothing import Channels
from ditf.export.graph.precision import Precision
from ditf.export.graph.range_probes import Stream, Where, joined, probe
from ditf.export.graph.roles import Role, Roles

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of a rotary position embedding, each [N, D / 2]."""

Heads = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]
"""Query [B, H, N, D], or None where the tokens are only attended to, key and value [B, G, N, D]."""


def constant(tensor: torch.Tensor) -> nn.Parameter:
    """A frozen parameter: it is named in the graph, counted in the manifest, and kept on disk while one is
    open for it (`ditf.export.checkpoints.weight_spill`).
    """
    return nn.Parameter(spilled(tensor.detach()), requires_grad=False)


class Linear(nn.Module):
    """x W + b in the type of W.

    Args:
        weight: [out, in] as torch.nn.Linear has it, float32.
        bias: [out] float32, or None.
        dtype: type of the product, from `Precision.of`.
        where: names the linear to range probes; None for one that is float32 in every recipe.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, where: Where | None = None
    ) -> None:
        super().__init__()
        self.where = where
        self.weight = constant(weight.T.to(dtype))
        self.bias = None if bias is None else constant(bias.to(dtype))

    @classmethod
    def read(
        cls, weights: Weights, *names: str, precision: Precision, where: Where | None = None, kept: str = ""
    ) -> Linear:
        """The linear of this name in the checkpoint, or several stacked along out.

        Args:
            kept: as for `Precision.of`.
        """
        return cls(*read_linear(weights, *names), precision.of(*names, kept=kept), where)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = probe(self.where, "input", x.to(self.weight.dtype)) @ self.weight
        probe(self.where, "weight", self.weight)
        if self.bias is not None:
            probe(self.where, "weight", self.bias)
            y = y + self.bias
        return probe(self.where, "output", y)


def read_linear(weights: Weights, *names: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [out, in] and bias of one linear layer, or of several stacked along out."""
    weight = torch.cat([weights.tensor(f"{name}.weight") for name in names])
    if f"{names[0]}.bias" not in weights:
        return weight, None
    return weight, torch.cat([weights.tensor(f"{name}.bias") for name in names])


def read_bias(weights: Weights, name: str) -> torch.Tensor | None:
    """Bias [out] of one linear layer, if it has one."""
    return weights.tensor(f"{name}.bias") if f"{name}.bias" in weights else None


def _difference(weights: Weights, name: str, other: str) -> torch.Tensor | None:
    """The bias [out] of one linear layer less that of another; None where it is the same layer's."""
    if name == other:
        return None
    bias, subtracted = read_bias(weights, name), read_bias(weights, other)
    if bias is None or subtracted is None:
        return bias if subtracted is None else -subtracted
    return bias - subtracted


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, N, C] -> [B, H, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    where: Where | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multi-head attention [B, H, N, D] x [B, G, M, D] -> [B, N, C].

    With fewer key heads than query heads, G < H, the queries of a group are rows of one product, so that no
    key is repeated. The query must be scaled by head_dim**-0.5 already: folded into its weights, the scale
    costs nothing and keeps the logits small in float16. The products are written out because torch's
    exporter would scale query and key separately.

    Args:
        where: names the attention to range probes.
        bias: [M], or [N, M] where every query has a key head of its own; added to the logits.
    """
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        query = query.unflatten(1, (-1, repeats)).flatten(2, 3)
    logits = query @ key.transpose(-1, -2)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    probe(where, "logits", _ungrouped(logits, repeats))
    attended = _ungrouped(torch.softmax(logits, dim=-1) @ value, repeats)
    return probe(where, "attended", attended).transpose(1, 2).flatten(2)


def _ungrouped(x: torch.Tensor, repeats: int) -> torch.Tensor:
    """[B, G, R N, D] -> [B, G R, N, D]."""
    return x.unflatten(2, (repeats, -1)).flatten(1, 2) if repeats > 1 else x


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Weight * x / rms(x) over the last dimension, in the type of x."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


@dataclass(frozen=True)
class AttentionNames:
    """Where one stream of an attention has its tensors, and what is done to query and key.

    Attributes:
        projections: modules of query, key and value.
        norms: modules of the RMSNorm of a head's query and of its key; None where there is none.
        stream: whose tokens they are.
        centred: the norms are LayerNorms.
        rotary: query and key are rotated.
        eps: of the norms.
    """

    projections: tuple[str, str, str]
    norms: tuple[str, str] | None = None
    _: KW_ONLY
    stream: Stream = "image"
    centred: bool = False
    rotary: bool = False
    eps: float = 1e-6


class HeadProjection(nn.Module):
    """Query, key and value of one stream, as heads: linears, biases, norm, rotary embedding.

    Interleaved pairs are rotated as two halves: the rows of the query's and of the key's weights are permuted
    alike, which changes no inner product. Keys and values may have fewer heads than queries.

    Biases are added after the split into heads, because TensorRT copies query, key and value once more where
    a bias comes before it. Those that all keys of a softmax share are not added at all. A softmax does not
    change when q . b is added to the logits of all keys, and its weights sum to 1, so that a bias of all
    values can join the output's (`shared_value_bias`).

    Args:
        names: where the stream has its tensors.
        heads: of the queries.
        query: False where the stream is only attended to.
        shared: the stream whose biases are left out of all keys and values of the attention: this one, or
            one that it is attended together with, whose biases are then subtracted from its own. Every
            projection of the attention must name the same one, and every output that reads it must have that
            stream's `shared_value_bias`. The biases of keys with a norm or a rotation are not left out. None
            leaves nothing out.
    """

    roles: ClassVar[Roles] = dict.fromkeys(("norm_query", "norm_key"), Role.SELF_ATTENTION)

    def __init__(
        self,
        weights: Weights,
        names: AttentionNames,
        heads: int,
        precision: Precision,
        query: bool = True,
        shared: AttentionNames | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.query = query
        self.eps = names.eps
        self.centred = names.centred
        self.rotary = names.rotary
        self.dtype = precision.of(*names.projections)
        used = names.projections if query else names.projections[1:]
        self.where = Where(joined(used), names.stream)
        self.norm_query: nn.Parameter | None = None
        self.norm_key: nn.Parameter | None = None
        head_dim = weights.shapes[f"{names.projections[0]}.weight"][0] // heads
        # Norm and rotation are float32, and so is what is added before them.
        self.finished = names.norms is not None or names.rotary
        parts, biases = [], {}
        for index, (role, name) in enumerate(zip("qkv", names.projections, strict=True)):
            if role == "q" and not query:
                continue
            weight, bias = read_linear(weights, name)
            if shared is not None and (role == "v" or (role == "k" and not self.finished)):
                bias = _difference(weights, name, shared.projections[index])
            scale = head_dim**-0.5 if role == "q" and names.norms is None else 1.0
            order = torch.arange(len(weight))
            if names.rotary and role != "v":
                order = order.reshape(-1, head_dim // 2, 2).transpose(1, 2).flatten()
            parts.append(weight[order] * scale)
            if bias is not None:
                dtype = torch.float32 if self.finished and role != "v" else self.dtype
                biases[role] = constant((bias[order] * scale).reshape(1, -1, 1, head_dim).to(dtype))
        self.sizes = [len(weight) for weight in parts]
        self.kv_heads = self.sizes[-1] // head_dim
        self.linear = Linear(torch.cat(parts), None, self.dtype, self.where)
        self.query_bias, self.key_bias, self.value_bias = (biases.get(role) for role in "qkv")
        if names.norms is not None:
            if query:
                self.norm_query = self._norm_weight(weights, names.norms[0], head_dim, head_dim**-0.5)
            self.norm_key = self._norm_weight(weights, names.norms[1], head_dim, 1.0)

    @property
    def channels(self) -> int:
        """C, the width of its input."""
        return int(self.linear.weight.shape[0])

    def values(self, path: str) -> Channels:
        """The linear's output channels that are the value.

        Args:
            path: of this module in the block.
        """
        return Channels(f"{path}.linear", sum(self.sizes[:-1]))

    def value_biases(self, path: str) -> tuple[str, ...]:
        """The path of the value's bias, if there is one.

        Args:
            path: of this module in the block.
        """
        return () if self.value_bias is None else (f"{path}.value_bias",)

    def _norm_weight(self, weights: Weights, name: str, head_dim: int, scale: float) -> nn.Parameter:
        if f"{name}.weight" in weights:
            weight = weights.tensor(f"{name}.weight")
        else:
            weight = torch.ones(head_dim)
        if self.rotary:
            weight = weight.reshape(-1, 2).T.flatten()
        return constant(weight * scale)

    def forward(self, x: torch.Tensor, rotary: Rotary | None = None) -> Heads:
        """[B, N, C] -> query (or None) [B, H, N, D], key and value [B, G, N, D], in the graph's precision.

        Args:
            rotary: None for tokens at the origin, which a rotation does not change.
        """
        *first, key, value = self.linear(x).split(self.sizes, dim=-1)
        head_query = None
        if first:
            query = self._finish(first[0], self.heads, self.query_bias, self.norm_query, rotary)
            head_query = probe(self.where, "query", query)
        head_key = self._finish(key, self.kv_heads, self.key_bias, self.norm_key, rotary)
        head_value = self._add(split_heads(value, self.kv_heads), self.value_bias)
        return head_query, probe(self.where, "key", head_key), probe(self.where, "output", head_value)

    def _add(self, x: torch.Tensor, bias: nn.Parameter | None) -> torch.Tensor:
        """Add a bias in the graph's precision."""
        return x if bias is None else x + probe(self.where, "weight", bias)

    def _finish(
        self,
        x: torch.Tensor,
        heads: int,
        bias: nn.Parameter | None,
        norm: nn.Parameter | None,
        rotary: Rotary | None,
    ) -> torch.Tensor:
        """Norm and rotate in float32, since the squares of a query without a norm pass float16's range."""
        x = split_heads(x, heads)
        if not self.finished:
            return self._add(x, bias)
        x = x.to(torch.float32)
        if bias is not None:
            x = x + bias
        if self.centred:
            x = x - x.mean(dim=-1, keepdim=True)
        if norm is not None:
            x = rms_norm(x, norm, self.eps)
        if rotary is not None:
            x = rotate(x, rotary)
        return x.to(self.dtype)


def shared_value_bias(weights: Weights, names: AttentionNames) -> torch.Tensor | None:
    """The bias [C] of a stream's values, for an output whose attention leaves it out (`HeadProjection`).

    None where they have none. Keys have as many heads as queries.
    """
    return read_bias(weights, names.projections[2])


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotate the two halves of [B, H, N, D] against each other."""
    cosine, sine = rotary
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class FeedForward(nn.Module):
    """The first half of a diffusers `FeedForward` with gelu-approximate: it gives the hidden activations."""

    def __init__(self, weights: Weights, name: str, precision: Precision, stream: Stream = "image") -> None:
        super().__init__()
        self.where = Where(name, stream)
        self.up = Linear.read(weights, name, precision=precision, where=self.where)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return probe(self.where, "hidden", functional.gelu(self.up(x), approximate="tanh"))


class GatedFeedForward(nn.Module):
    """The first half of a feed-forward with a second linear as its gate: silu(x A) * (x B).

    Args:
        names: of A and B, or of the one linear that has both, A first.
    """

    def __init__(
        self, weights: Weights, names: tuple[str, ...], precision: Precision, stream: Stream = "image"
    ) -> None:
        super().__init__()
        self.where = Where(joined(names), stream)
        self.up = Linear.read(weights, *names, precision=precision, where=self.where)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, hidden = self.up(x).chunk(2, dim=-1)
        return probe(self.where, "hidden", functional.silu(gate) * hidden)
