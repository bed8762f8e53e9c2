"""Gives unmodified models their weights: in memory, or read from disk by each module when it runs.

The weights come from `Checkpoint.weights`, so every model reads what the graph reads: float32 values that
were checked for NaN and infinity. Large models stay on disk, with accelerate's hooks. A small model is held
in memory, because reading it again for every image would cost time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from ditf.export.checkpoints.weights import Weights

RESIDENT = 1 << 30
"""Size in float32, in bytes, of the largest model that is held in memory."""


def is_offloaded(parameters: int) -> bool:
    """Whether the weights of a model with so many parameters stay on disk."""
    return 4 * parameters > RESIDENT


def without_values(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a model whose parameters are on the meta device; its buffers have values."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers announces changes of its own classes
        return make()


def give_weights(
    model: nn.Module, weights: Weights, stored: Mapping[str, str], resident: bool = False
) -> nn.Module:
    """Give a model its weights, in float32 and eval mode; returns it.

    Buffers of whole numbers, such as the count of a batch norm's training steps, keep the values that the
    model made itself: no model reads them when it is not trained.

    Args:
        model: from `without_values`.
        stored: {name in the model: name in `weights`}, for every name of the model's state dict.
        resident: hold the model in memory, whatever its size.

    Raises (when called and, where the weights stay on disk, when the model runs):
        InputError: a tensor cannot be read, or holds NaN or infinity.
    """
    model.eval().requires_grad_(False)
    counts = {name for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}
    stored = {name: source for name, source in stored.items() if name not in counts}
    if not resident and is_offloaded(sum(parameter.numel() for parameter in model.parameters())):
        return _offloaded(model, weights, stored)
    read: dict[str, torch.Tensor] = {}  # tied parameters read one tensor
    for source in stored.values():
        if source not in read:
            read[source] = weights.tensor(source)
    state = {name: read[source] for name, source in stored.items()}
    model.load_state_dict(state, assign=True, strict=False)  # without the counts
    return model


def _offloaded(model: nn.Module, weights: Weights, stored: Mapping[str, str]) -> nn.Module:
    from accelerate.hooks import attach_align_device_hook

    for name, buffer in model.named_buffers():
        if name in stored:
            buffer.copy_(weights.tensor(stored[name]))
    attach_align_device_hook(
        model, execution_device=torch.device("cpu"), offload=True, weights_map=_Tensors(weights, stored)
    )
    return model


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
