"""How much memory an export will need, stage by stage, and whether the machine has it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.offload import streams
from ditf.export.estimate.cost import shape_graph
from ditf.export.estimate.op_counter import keep_ledger
from ditf.export.graph.precision import FLOAT32
from ditf.export.planning.plan import Plan
from ditf.runtime.errors import InputError

_TRACED = 2
"""Times the activations that live at once while the traced program is recorded: float16's are also held in
float32, and each is sketched in float64."""

_COPIES = 4
"""Of the largest weight, in float32, while it is read, folded and cast."""


@torch.no_grad()
def stage_bytes(plan: Plan) -> dict[str, int]:
    """What each stage needs beside the libraries: {stage: bytes}.

    Attention's logits are counted whole: the graph has them, though diffusers' attention does not.
    """
    graph, feeds = shape_graph(replace(plan, precision=FLOAT32))
    image = torch.empty((1, *plan.size, 3), dtype=torch.uint8, device="meta")
    activations = keep_ledger(graph, image, *feeds).peak_bytes()
    weights = plan.checkpoint.weights("transformer")
    largest = 4 * max(max(map(weights.numel, weights.shapes)), *(p.numel() for p in graph.parameters()))
    parameters = sum(map(weights.numel, weights.shapes))
    vae = sum(4 * parameter.numel() for parameter in graph.encoder.parameters())
    fold = vae + _COPIES * largest
    needs = {"folding the weights": fold, "running the graph": vae + largest + activations}
    if plan.options.golden != "none":
        held = largest if streams(parameters) else 4 * parameters
        needs["running the unmodified model"] = 2 * vae + held + activations
        needs["recording what the graph computes"] = vae + largest + _TRACED * activations
    if plan.family.takes_prompt and not plan.options.prompt_embeds:
        needs["running the text encoders"] = _encoder_bytes(plan.checkpoint)
    return needs


def _encoder_bytes(checkpoint: Checkpoint) -> int:
    """Small ones are in memory together; of the others, one tensor at a time."""
    held, largest = 0, 0
    for name in checkpoint.index():
        if name.startswith("text_encoder") and checkpoint.has(name):
            weights = checkpoint.weights(name)
            sizes = [4 * weights.numel(tensor) for tensor in weights.shapes]
            if streams(sum(sizes) // 4):
                largest = max(largest, *sizes)
            else:
                held += sum(sizes)
    return held + 2 * largest


def check_memory(plan: Plan) -> None:
    """Reject an export that this machine has no memory for, before the work starts.

    Raises:
        InputError: names the stage, what it needs and what is available.
    """
    available = available_bytes()
    if available is None:
        return
    needs = stage_bytes(plan)
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


def available_bytes() -> int | None:
    """Memory that this process may still take: the machine's, or its container's; None where nobody says."""
    found = [value for value in (_machine(), _container()) if value is not None]
    return min(found, default=None)


def _machine() -> int | None:
    """MemAvailable of Linux: free, and what the page cache would give back."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return sizes[0] if sizes else None


def _container(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a control group leaves (version 2), with the page cache that it would give back."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
