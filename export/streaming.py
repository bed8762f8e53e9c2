"""Unmodified models whose weights stay on disk: each module reads its own, runs, and drops them.

accelerate's hooks do it; what they are given is read in float32 and checked like everything else. A model
that is small enough is held in memory: reading it again for every image would only cost time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ditf.export.weights import Weights

RESIDENT = 1 << 30
"""Bytes, in float32, of the largest model that is held in memory."""


def streams(parameters: int) -> bool:
    """Whether a model of so many parameters stays on disk."""
    return 4 * parameters > RESIDENT


class _Tensors(Mapping[str, torch.Tensor]):
    """Tensors by name, as accelerate asks for them."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._weights.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights.shapes)

    def __len__(self) -> int:
        return len(self._weights.shapes)


def stream_model(model_class: Any, config: Mapping[str, Any], weights: Weights) -> Any:
    """A diffusers model in float32 and eval mode that reads its parameters when they are used.

    Args:
        config: of the model; weights: of exactly its tensors (`ditf.export.pretrained.check_structure`).

    Raises (when made and when run):
        InputError: a tensor that cannot be read, or holds NaN or infinity.
    """
    from accelerate import init_empty_weights
    from accelerate.hooks import attach_align_device_hook

    known = {key: value for key, value in config.items() if not key.startswith("_")}
    with init_empty_weights(include_buffers=False):
        model: nn.Module = model_class.from_config(known)
    for name, buffer in model.named_buffers():
        if name in weights:
            buffer.copy_(weights.tensor(name))
    model.eval().requires_grad_(False)
    attach_align_device_hook(
        model, execution_device=torch.device("cpu"), offload=True, weights_map=_Tensors(weights)
    )
    return model
