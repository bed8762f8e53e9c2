"""FP8 and int8 weights that are stored with scales: the number is always the stored value times its scale.

| who writes them | values | scale | shape of the scale |
|---|---|---|---|
| ComfyUI | F8 | `scale_weight`, since late 2025 `weight_scale` | one number |
| ComfyUI `int8_tensorwise` | I8 | `weight_scale` | one number, or one a row |
| transformers `fp8` | F8 | `weight_scale_inv` | one a block, mostly of 128 x 128; or one number |
| transformers `fbgemm_fp8`, BFL's `fp8r` | F8 | `weight_scale` | one a row |
| compressed-tensors | F8, I8 | `weight_scale` | one number, one a row, one a block or group |
| Quanto | I8, F8 | `weight._scale`, and the values in `weight._data` | one a row |

`weight_scale_inv` is the inverse of what the weight was multiplied by when it was quantised, so that it is a
factor too (transformers' `Fp8Dequantize`). Scales of activations (`input_scale`) do not change the weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from ditf.export.checkpoints.formats.quantised.tensor import PLAIN_FILES, QuantisedTensor, damaged
from ditf.export.checkpoints.formats.safetensors_weights import SafetensorsWeights
from ditf.runtime.errors import InputError

FP8 = ("F8_E4M3", "F8_E5M2")
_SCALE_TYPES = ("F32", "BF16", "F16", "F64")
_SCALES = ("weight_scale", "scale_weight", "weight_scale_inv")
_OF_ACTIVATIONS = ("input_scale", "scale_input", "output_scale", "activation_scale", "input_scale_ub")
_BLOCK = (128, 128)
"""Rows and columns that share a scale, where the config does not say."""

_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "bfl", "quanto", "bitsandbytes")
"""quant_method of the configs whose scales are known to be factors."""

MARKER = "scaled_fp8"
"""Name of the tensor with which ComfyUI marks a file of scaled FP8 weights."""

_COMFY_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
_COMFY_HARMLESS = (
    "format",
    "full_precision_matrix_mult",
    "orig_dtype",
    "orig_shape",
    "per_row",
    "per_channel",
)
_METADATA = "_quantization_metadata"


def comfy_layers(stored: SafetensorsWeights) -> tuple[dict[str, str], set[str]]:
    """What ComfyUI notes in a file: {layer: its format}, and the names of the tensors that are only notes.

    Raises:
        InputError: a note cannot be read, or names a format whose numbers are not value times scale.
    """
    markers = {name for name in stored.shapes if name.rpartition(".")[2] == MARKER}
    notes = sorted(name for name in stored.shapes if name.endswith(".comfy_quant"))
    layers: dict[str, Any] = {}
    try:
        if _METADATA in stored.metadata:
            layers.update(json.loads(stored.metadata[_METADATA])["layers"])
        for name, note in stored.raws(notes).items():
            layers[name.removesuffix(".comfy_quant")] = json.loads(bytes(note.to(torch.uint8).tolist()))
        formats = {layer: _comfy_format(layer, note) for layer, note in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged("the file", f"ComfyUI's note of its format cannot be read ({error!a:.80})") from error
    return formats, markers | set(notes)


def _comfy_format(layer: str, note: Any) -> str:
    note = {"format": note} if isinstance(note, str) else note
    found = {**note.pop("params", {}), **note}
    unknown = [key for key, value in found.items() if value and key not in _COMFY_HARMLESS]
    if found["format"] not in _COMFY_FORMATS or unknown:
        kind = " with ".join([str(found["format"]), *unknown])
        raise InputError(
            f"{layer!a:.80} is quantised in ComfyUI's format {kind!a:.80}, which is not supported",
            PLAIN_FILES,
        )
    return str(found["format"])


def scaled_tensors(
    stored: SafetensorsWeights, config: Mapping[str, Any], comfy: Mapping[str, str], marked: bool
) -> dict[str, QuantisedTensor]:
    """The weights that have a scale: {name: how to read it}.

    Args:
        config: the quantization_config of the component; {} if it has none.
        comfy: {layer: format} as ComfyUI notes it.
        marked: ComfyUI wrote the file, in which FP8 weights without a scale are plain.

    Raises:
        InputError: a scale does not fit its weight, or belongs to a weight that is not FP8 or int8.
    """
    found: dict[str, QuantisedTensor] = {}
    # Layers in a file's metadata may lack the prefix that its tensors have.
    of_int8 = tuple(layer for layer, kind in comfy.items() if kind == "int8_tensorwise")
    for name in stored.shapes:
        if name.endswith("weight._data"):
            base = name.removesuffix("._data")
            found[base] = _scaled(stored, config, name, [f"{base}._scale"], base.removesuffix("weight"))
        elif name.endswith(".weight") or name == "weight":
            module = name.removesuffix("weight")
            scales = [module + leaf for leaf in _SCALES if module + leaf in stored]
            if scales:
                whole_numbers = module.rstrip(".").endswith(of_int8)
                found[name] = _scaled(stored, config, name, scales, module, whole_numbers)
            elif stored.dtypes[name] in FP8 and module.rstrip(".").endswith(tuple(comfy)):
                raise damaged(stored.source(name), f"{module}weight_scale is missing")
            elif marked and stored.shapes[name] and (ignored := _ignored(stored, module)):
                found[name] = QuantisedTensor(stored.shapes[name], name, (), ignored, _plain)
    return found


def _ignored(stored: SafetensorsWeights, module: str) -> tuple[str, ...]:
    return tuple(module + leaf for leaf in _OF_ACTIVATIONS if module + leaf in stored)


def _scaled(
    stored: SafetensorsWeights,
    config: Mapping[str, Any],
    name: str,
    scales: list[str],
    module: str,
    whole_numbers: bool = False,
) -> QuantisedTensor:
    """One scaled weight, by the names of its values, of its scales and of its module with the dot."""
    source, shape = stored.source(name), stored.shapes[name]
    method = config.get("quant_method")
    quanto = name.endswith("._data")
    if len(scales) > 1 or scales[0] not in stored:
        raise damaged(
            source, f"it has {len(scales)} scales" if len(scales) > 1 else f"{scales[0]} is missing"
        )
    if method is not None and method not in _METHODS:
        raise InputError(f"{source} is quantised by {method!a:.40}, which is not supported", PLAIN_FILES)
    accepted = FP8 + (("I8",) if quanto or whole_numbers or method == "compressed-tensors" else ())
    if stored.dtypes[name] not in accepted:
        raise InputError(f"{source} is {stored.dtypes[name]} and has the scale {scales[0]}", PLAIN_FILES)
    if stored.dtypes[scales[0]] not in _SCALE_TYPES:
        raise InputError(f"{stored.source(scales[0])} is {stored.dtypes[scales[0]]}", PLAIN_FILES)
    block = _block(config)
    if not _fits(stored.shapes[scales[0]], shape, block, rows_only=quanto):
        raise damaged(
            source, f"its shape is {list(shape)}, that of {scales[0]} {list(stored.shapes[scales[0]])}"
        )
    decode = partial(_multiplied, rows=shape[0], block=block)
    return QuantisedTensor(shape, name, (scales[0],), _ignored(stored, module), decode)


def _block(config: Mapping[str, Any]) -> tuple[int, int]:
    """How many rows and columns share a scale.

    Raises:
        InputError: the config rotates the weights, or leaves zeros of them out.
    """
    for key in ("transform_config", "sparsity_config"):
        value = config.get(key)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise InputError(f"the quantization_config has {key}, which is not supported", PLAIN_FILES)
    groups = config.get("config_groups")
    first: Any = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    described = first.get("weights") if isinstance(first, dict) else None
    weights = described if isinstance(described, dict) else {}
    group = weights.get("group_size") if weights.get("strategy") == "group" else None
    block = (
        config.get("weight_block_size") or weights.get("block_structure") or (group and (1, group)) or _BLOCK
    )
    if isinstance(block, (list, tuple)) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
        return block[0], block[1]
    raise InputError(f"the quantization_config has blocks of {block!a:.40}", "save the checkpoint again")


def _fits(
    scale: tuple[int, ...], shape: tuple[int, ...], block: tuple[int, int], rows_only: bool = False
) -> bool:
    if not shape:
        return False
    if math.prod(scale) == 1 or scale in ((shape[0],), (shape[0], *[1] * (len(shape) - 1))):
        return True
    return (
        not rows_only
        and len(shape) == 2
        and scale == tuple(-(-n // b) for n, b in zip(shape, block, strict=True))
    )


def _plain(values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return values.float()


def _multiplied(
    values: torch.Tensor, scale: torch.Tensor, start: int, stop: int, rows: int, block: tuple[int, int]
) -> torch.Tensor:
    """Rows start..stop-1 of a tensor of so many rows times their scales, whose shape fits as `_fits` says."""
    values, scale = values.float(), scale.float()
    if scale.numel() == 1:
        return values.mul_(scale.reshape(()))
    if scale.numel() == rows == len(scale):
        return values.mul_(scale[start:stop].reshape(-1, *[1] * (values.ndim - 1)))
    for index in range(start // block[0], -(-stop // block[0])):
        inside = slice(max(index * block[0] - start, 0), (index + 1) * block[0] - start)
        values[inside].mul_(scale[index].repeat_interleave(block[1])[: values.shape[1]])
    return values
