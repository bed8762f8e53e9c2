"""Compares the tensors of a checkpoint with those of the model that they are for. No value is read."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch

from ditf.export.checkpoints.weights import WHOLE_NUMBERS, Weights
from ditf.runtime.errors import InputError

_ADAPTER = re.compile(
    r"(^|[._])(lora|lora_[A-Za-z]+|lokr_\w+|hada_\w+|base_layer|base_model|modules_to_save|adapter|dora_scale)"
    r"([._]|$)"
)
"""Parts of names that only an adapter (LoRA) gives to a tensor."""

_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module.": "activation checkpointing",
}
"""What wrappers of a model put in front of its names, alone or between them."""

BELONG = "the config and the weights do not belong together: take both from the same checkpoint"


def check_tensors(
    what: str,
    expected: Mapping[str, torch.Tensor],
    stored: Mapping[str, str],
    weights: Weights,
    ignored: Collection[str] = (),
    fix: str = BELONG,
) -> None:
    """Check that a checkpoint stores exactly the tensors of a model, in their shapes and types.

    Args:
        what: the component, for messages.
        expected: {name in the model: a tensor of its shape and type}, for the whole state dict.
        stored: {name in the model: name in `weights`}.
        ignored: names in `weights` that the model has no use for and that may be there.
        fix: what to do about tensors that are missing, unknown or of another shape.

    Raises:
        InputError: a tensor is missing, unknown, of another shape, or stored as whole numbers where the model
            has none. The message names the first one.
    """
    unknown = sorted(weights.shapes.keys() - set(stored.values()))
    for tensor in unknown:
        if _ADAPTER.search(tensor):
            raise InputError(
                f"the weights of {what} are those of an adapter, or have one that is not merged: {tensor}",
                "merge it (PEFT: merge_and_unload) and save the model again; a LoRA is given with --lora",
            )
        for prefix, wrapper in _WRAPPERS.items():
            if prefix in tensor and tensor.replace(prefix, "") in expected:
                raise InputError(
                    f"the weights of {what} were saved from inside {wrapper}: they have {tensor}",
                    "save the model that it wraps (accelerate: unwrap_model), or take the prefix off",
                )
    unknown = [tensor for tensor in unknown if tensor not in ignored]
    has = f" have {unknown[0]}, which the config does not know" if unknown else ""
    for tensor in sorted(expected.keys() - stored.keys()):
        raise InputError(
            f"the weights of {what} lack {tensor}, which the config asks for{has and ', and'}{has}", fix
        )
    if unknown:
        raise InputError(f"the weights of {what}{has}", fix)
    for tensor, value in sorted(expected.items()):
        source, shape = stored[tensor], tuple(value.shape)
        if weights.shapes[source] != shape:
            raise InputError(
                f"{source} of {what} is {list(weights.shapes[source])}, the config says {list(shape)}", fix
            )
        if value.is_floating_point() and weights.dtypes[source] in WHOLE_NUMBERS:
            raise InputError(
                f"{source} of {what} is stored as {weights.dtypes[source]}, not as floating-point numbers",
                "take the bf16 or float16 files of this model",
            )
