"""What the LoRAs of an export have changed, for the manifest and for people."""

from __future__ import annotations

from typing import Any

from ditf.export.assemble.features_graph import AssembledGraph
from ditf.export.planning.plan import Plan


def lora_records(plan: Plan, made: AssembledGraph) -> list[dict[str, Any]]:
    """For each LoRA its file, hash and scale, and how many tensors that the features depend on it changes.

    Returns:
        [{"file": path, "sha256": hex, "scale": s, "tensors": {component: count}}], as the manifest has it.
    """
    counts: list[dict[str, int]] = [{} for _ in plan.checkpoint.loras]
    encoders = () if plan.options.prompt_embeds else plan.checkpoint.text_encoders()
    for component in ("transformer", *encoders):
        for count, names in zip(counts, plan.checkpoint.changed_by_loras(component), strict=True):
            if component == "transformer":
                names &= made.read_by_trunk | made.read_by_conditioner
            if names:
                count[component] = len(names)
    return [
        {"file": str(lora.path), "sha256": lora.digest, "scale": lora.scale, "tensors": count}
        for lora, count in zip(plan.checkpoint.loras, counts, strict=True)
    ]


def describe_loras(plan: Plan, made: AssembledGraph) -> str:
    """A line for people; a LoRA that changes nothing is named."""
    parts = []
    for lora, record in zip(plan.checkpoint.loras, lora_records(plan, made), strict=True):
        counts = [f"{count} tensors of {component}" for component, count in record["tensors"].items()]
        what = " and ".join(counts) or f"nothing up to layer {plan.layer}: the features are those without it"
        parts.append(f"{lora.path.name} changes {what}")
    return "; ".join(parts)
