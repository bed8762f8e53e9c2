"""Runs unmodified models whose weights stay on disk: each module reads its weights, runs, and drops them.

accelerate's hooks do this. The weights that they get are read in float32 and checked for NaN and infinity. A
small model is held in memory, because reading it again for every image would cost time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditf.export.checkpoints.weights import Weights

RESIDENT = 1 << 30
"""Size in float32, in bytes, of the largest model that is held in memory."""


def is_offloaded(parameters: int) -> bool:
    """Whether the weights of a model with so many parameters stay on disk."""
    return 4 * parameters > RESIDENT


class _Tensors(Mapping[str, torch.Tensor]):
    """The mapping that accelerate reads tensors from.

    Args:
        weights: the checkpoint's.
        stored: {name in the model: name in the checkpoint}.
    """

    def __init__(self, weights: Weights, stored: Mapping[str, str]) -> None:
        self._weights = weights
        self._stored = stored

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._weights.tensor(self._stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def offload_model(model_class: Any, config: Mapping[str, Any], weights: Weights) -> Any:
    """A diffusers model in float32 and eval mode that reads its parameters when they are used.

    Args:
        model_class: the diffusers class.
        config: the model's.
        weights: exactly the model's tensors (see `loading.check_structure`).

    Raises (when made and when run):
        InputError: a tensor cannot be read, or holds NaN or infinity.
    """
    from accelerate import init_empty_weights

    known = {key: value for key, value in config.items() if not key.startswith("_")}
    with init_empty_weights(include_buffers=False), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers announces changes of its own classes
        model: nn.Module = model_class.from_config(known)
    return _offloaded(model, weights, {name: name for name in weights.shapes})


def offload_encoder(encoder_class: Any, folder: Path, weights: Weights) -> Any | None:
    """The same for a model of transformers; None if the checkpoint stores its tensors in another layout."""
    from accelerate import init_empty_weights

    config = encoder_class.config_class.from_pretrained(folder, local_files_only=True)
    config.dtype = torch.float32
    with init_empty_weights(include_buffers=False):
        model: nn.Module = encoder_class(config)
    model.tie_weights()  # type: ignore[operator]
    same: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in weights:
            same[id(parameter)] = name
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    persistent = model.state_dict().keys()
    stored = {name: same.get(id(tensor), name) for name, tensor in tensors.items() if name in persistent}
    if any(weights.shapes.get(stored[name]) != tuple(tensors[name].shape) for name in stored):
        return None
    return _offloaded(model, weights, stored)


def _offloaded(model: nn.Module, weights: Weights, stored: Mapping[str, str]) -> nn.Module:
    from accelerate.hooks import attach_align_device_hook

    for name, buffer in model.named_buffers():
        if name in stored:
            buffer.copy_(weights.tensor(stored[name]))
    model.eval().requires_grad_(False)
    attach_align_device_hook(
        model, execution_device=torch.device("cpu"), offload=True, weights_map=_Tensors(weights, stored)
    )
    return model
