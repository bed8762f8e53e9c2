"""Whether the oracle can judge an export, or the streamed reference has to."""

from __future__ import annotations

from collections.abc import Iterator

from ditf.export.checkpoints.formats.safetensors_weights import SafetensorsWeights
from ditf.export.planning.plan import Plan
from ditf.runtime.errors import DitfError

_WHERE_UNKNOWN = 8 << 30
"""Memory that the oracle may need where the machine does not say how much there is, in bytes."""


class PipelineFails(DitfError):
    """The checkpoint's own pipeline cannot be run on it."""


def why_not(plan: Plan, needed: int, available: int | None) -> str | None:
    """The reason why the checkpoint's own pipeline cannot be the oracle; None where it can.

    Args:
        needed: bytes of memory that the pipeline needs.
        available: bytes of memory that there are, or None where that is unknown.
    """
    if available is None and needed > _WHERE_UNKNOWN:
        return f"the whole pipeline needs {needed / 1e9:.1f} GB in float32, and available memory is unknown"
    if available is not None and needed > available:
        return (
            f"the whole pipeline needs {needed / 1e9:.1f} GB in float32, and {available / 1e9:.1f} GB are"
            " available"
        )
    checkpoint = plan.checkpoint
    if checkpoint.loras:
        return "plain from_pretrained reads no LoRA"
    if checkpoint.transformer is not None and checkpoint.transformer.is_file():
        return "plain from_pretrained reads no single file"
    for name in _components(plan):
        plain = isinstance(checkpoint.weights(name), SafetensorsWeights)
        if not plain or "quantization_config" in checkpoint.config(name):
            return f"its {name} is quantised, and plain from_pretrained does not dequantise it"
    return None


def _components(plan: Plan) -> Iterator[str]:
    """The models that the pipeline loads."""
    checkpoint = plan.checkpoint
    for name in ("transformer", "vae", *checkpoint.text_encoders()):
        if checkpoint.has(name) and not name.startswith(plan.options.unneeded):
            yield name
