"""Counts for the manifest: a graph's parameters by part, and what of the checkpoint it leaves out."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ditf.export.assemble.features_graph import AssembledGraph
from ditf.export.checkpoints.weights import Weights
from ditf.export.graph.roles import role_of
from ditf.export.planning.plan import Plan

Counts = dict[str, dict[str, int]]


def parameter_parts(module: nn.Module) -> dict[str, Counts]:
    """{part: {dtype: {"parameters": n, "bytes": n}}} of a features graph, by the roles of its modules.

    Raises:
        LookupError: a module does not say what its parameters are for.
    """
    parts: dict[str, Counts] = {}
    for name, tensor in module.named_parameters():
        part = role_of(module, name).value
        dtype = str(tensor.dtype).removeprefix("torch.")
        entry = parts.setdefault(part, {}).setdefault(dtype, {"parameters": 0, "bytes": 0})
        entry["parameters"] += tensor.numel()
        entry["bytes"] += tensor.numel() * tensor.element_size()
    return parts


def removed_parts(plan: Plan, made: AssembledGraph) -> Counts:
    """What each step of the export left out, in the size that it has in the checkpoint.

    No tensor is known by its name. A tensor that was not read is unused, and what only the conditioner read
    is in the graph only if the conditioner is.
    """
    weights = plan.checkpoint.weights("transformer")
    running = tuple(f"{plan.family.block_name(index)}." for index in range(plan.layer))
    used = made.read_by_trunk | made.read_by_conditioner
    unused = weights.shapes.keys() - used
    dead = {name for name in unused if name.startswith(running)}
    steps = {
        f"blocks {plan.layer}.. and the final layer": unused - dead,
        "text stream of the last block, after it is read": dead,
    }
    if plan.options.conditioning != "live":
        steps["conditioning, now constants"] = made.read_by_conditioner - made.read_by_trunk
    removed = {step: _count(weights, names) for step, names in steps.items()}
    encoders = filter(plan.checkpoint.has, plan.checkpoint.text_encoders())
    stored = [plan.checkpoint.stored(name) for name in encoders]
    removed["text encoders"] = {
        "parameters": sum(parameters for parameters, _ in stored),
        "bytes": sum(size for _, size in stored),
    }
    if plan.latents.source is not None:
        vae = plan.latents.source.weights()
        encoder = ("encoder.", "quant_conv.", "bn.")
        removed["VAE decoder"] = _count(vae, (name for name in vae.shapes if not name.startswith(encoder)))
    if plan.options.vae is not None:
        own = plan.checkpoint.weights("vae")
        removed["VAE that --vae replaces"] = _count(own, own.shapes)
    return {step: count for step, count in removed.items() if count["parameters"]}


def _count(weights: Weights, names: Iterable[str]) -> dict[str, int]:
    listed = list(names)
    return {
        "parameters": sum(weights.numel(name) for name in listed),
        "bytes": sum(weights.bytes_of[name] for name in listed),
    }
