"""Files of prompt embeddings, with which an export needs no text encoders.

A file is in safetensors format. Its tensors have the names of the inputs of a graph with --conditioning live,
and its metadata holds the prompt.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ditf.export.families.base import Condition, Family
from ditf.runtime.errors import InputError
from ditf.runtime.files.reading import read_regular
from ditf.runtime.files.writing import write_whole

_MASK = "prompt_attention_mask"
_LARGEST = 256 << 20  # bytes: 512 tokens of 4,096 channels have 8 MB
_GUIDANCE = "guidance"  # a setting, which no text encoder gives
_MAKE = "make one with ditf export --prompt TEXT --save-prompt-embeds FILE, where the text encoders are"


@dataclass(frozen=True)
class Embeddings:
    """The content of a file of embeddings.

    Attributes:
        condition: tensors in float32, the mask in int64; without guidance.
        prompt: the prompt that was encoded, or None where the file does not name it.
        sha256: hash of the file.
    """

    condition: Condition
    prompt: str | None
    sha256: str


def read_embeddings(path: Path, family: Family) -> Embeddings:
    """Read a file and compare it with what a family takes.

    Raises:
        InputError: the file cannot be read, its tensors are not this family's, or its values are not what a
            text encoder gives.
    """
    if not path.exists():
        raise InputError(f"--prompt-embeds {path}: no such file", _MAKE)
    try:
        content = read_regular(path, _LARGEST)
        tensors = load(content)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--prompt-embeds {path} is no readable safetensors file ({reason})", _MAKE
        ) from None
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata: dict[str, str] = header.get("__metadata__", {})
    tensors.pop(_GUIDANCE, None)
    wanted = {name: tensor for name, tensor in family.example_condition().items() if name != _GUIDANCE}
    for name in sorted(wanted.keys() ^ tensors.keys()):
        what = "lacks" if name in wanted else "has an unknown"
        raise InputError(f"--prompt-embeds {path} {what} {name}", f"{family.name} takes {', '.join(wanted)}")
    tokens = int(tensors["prompt_embeds"].shape[1]) if tensors["prompt_embeds"].ndim == 3 else 0
    most = family.longest_text or family.text_length(family.example_condition())
    if not 1 <= tokens <= most:
        raise InputError(
            f"prompt_embeds of {path} is {list(tensors['prompt_embeds'].shape)}, not [1, tokens, channels]"
            f" with 1 to {most} tokens",
            _MAKE,
        )
    for name, example in wanted.items():
        _check(path, name, tensors[name], example, tokens)
    condition = {name: tensors[name].to(example.dtype) for name, example in wanted.items()}
    return Embeddings(condition, metadata.get("prompt"), hashlib.sha256(content).hexdigest())


def _check(path: Path, name: str, tensor: torch.Tensor, example: torch.Tensor, tokens: int) -> None:
    shape = list(example.shape)
    if len(shape) > 1 and name.startswith("prompt_"):
        shape[1] = tokens
    if list(tensor.shape) != shape:
        raise InputError(f"{name} of {path} is {list(tensor.shape)}, not {shape}", _MAKE)
    if tensor.is_floating_point() != example.is_floating_point():
        wanted = "floating point" if example.is_floating_point() else "whole numbers"
        raise InputError(
            f"{name} of {path} is {str(tensor.dtype).removeprefix('torch.')}, not {wanted}", _MAKE
        )
    if not torch.isfinite(tensor.to(torch.float32)).all():
        raise InputError(f"{name} of {path} holds NaN or infinity", _MAKE)
    if name == _MASK:
        mask = tensor[0].to(torch.int64)
        ones = int(mask.sum())
        if ones < 1 or not torch.equal(mask, (torch.arange(tokens) < ones).to(torch.int64)):
            raise InputError(f"{name} of {path} is not ones and then zeros", _MAKE)


def write_embeddings(path: Path, condition: Condition, prompt: str, model: str) -> None:
    """Write one condition as `read_embeddings` reads it."""
    tensors = {name: tensor.contiguous() for name, tensor in condition.items() if name != _GUIDANCE}
    write_whole(path, save(tensors, metadata={"prompt": prompt, "model": model}))
