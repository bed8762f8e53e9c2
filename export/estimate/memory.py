"""How much memory an export will need, stage by stage, and whether the machine has it."""

from __future__ import annotations

from collections.abc import Mapping

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.offload import is_offloaded
from ditf.export.graph.features import FeaturesGraph
from ditf.export.planning.plan import Plan
from ditf.runtime.errors import InputError

_TRACED = 2
"""How many times the activations are in memory while the traced program is recorded: float16 values are also
held in float32, and each is reduced to its sketch in float64."""

_COPIES = 4
"""How many float32 copies of the largest weight are in memory while it is read, folded and cast."""


def stage_bytes(plan: Plan, graph: FeaturesGraph, activations: int) -> dict[str, int]:
    """Memory that each stage needs beside the libraries: {stage: bytes}.

    Attention's logits are counted whole: the graph has them, though diffusers' attention does not.

    Args:
        graph: of the plan, in float32, without values.
        activations: the most bytes of activations that live at once in it.
    """
    weights = plan.checkpoint.weights("transformer")
    largest = 4 * max(max(map(weights.numel, weights.shapes)), *(p.numel() for p in graph.parameters()))
    parameters = sum(map(weights.numel, weights.shapes))
    vae = sum(4 * parameter.numel() for parameter in graph.encoder.parameters())
    fold = vae + _COPIES * largest
    needs = {"folding the weights": fold, "running the graph": vae + largest + activations}
    if plan.options.golden != "none":
        held = largest if is_offloaded(parameters) else 4 * parameters
        needs["running the unmodified model"] = 2 * vae + held + activations
        needs["recording what the graph computes"] = vae + largest + _TRACED * activations
    if plan.family.takes_prompt and not plan.options.prompt_embeds:
        needs["running the text encoders"] = _encoder_bytes(plan.checkpoint)
    return needs


def oracle_bytes(plan: Plan, activations: int) -> int:
    """Memory that the checkpoint's own pipeline needs in float32 (`ditf.export.measure.oracle`).

    The text encoders run before the transformer is loaded. The VAEs stay.

    Args:
        activations: as for `stage_bytes`.
    """
    checkpoint = plan.checkpoint
    encoders = () if plan.options.prompt_embeds else checkpoint.text_encoders()
    text = sum(checkpoint.stored(name)[0] for name in encoders if checkpoint.has(name))
    vaes = {latents.source for latents in (plan.latents, plan.own_latents) if latents.source is not None}
    stored = sum(part.checkpoint.stored(part.name)[0] for part in vaes)
    return 4 * (stored + max(text, checkpoint.stored("transformer")[0])) + activations


def _encoder_bytes(checkpoint: Checkpoint) -> int:
    """Small encoders are in memory together; of large ones, one tensor at a time is."""
    held, largest = 0, 0
    for name in filter(checkpoint.has, checkpoint.text_encoders()):
        weights = checkpoint.weights(name)
        sizes = [4 * weights.numel(tensor) for tensor in weights.shapes]
        if is_offloaded(sum(sizes) // 4):
            largest = max(largest, *sizes)
        else:
            held += sum(sizes)
    return held + 2 * largest


def check_stages(plan: Plan, needs: Mapping[str, int], available: int) -> None:
    """Reject an export that needs more memory than there is.

    Args:
        needs: {stage: bytes}; available: bytes.

    Raises:
        InputError: names the stage, what it needs and what is available.
    """
    stage = max(needs, key=lambda name: needs[name])
    if needs[stage] > available:
        smaller = ["a smaller --size"]
        if plan.options.ensemble > 1:
            smaller.append("--ensemble 1")
        raise InputError(
            f"{stage} needs about {needs[stage] / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are"
            " available",
            f"choose {' or '.join(smaller)}, or export on a larger machine",
        )
