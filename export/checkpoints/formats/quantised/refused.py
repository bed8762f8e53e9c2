"""Refuses quantised tensors that cannot be dequantised here, by the name of who writes them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ditf.export.checkpoints.formats.quantised.tensor import PLAIN_FILES, SAVE_DEQUANTISED
from ditf.export.checkpoints.formats.safetensors_weights import SafetensorsWeights
from ditf.export.checkpoints.weights import WHOLE_NUMBERS
from ditf.runtime.errors import InputError

_PRODUCERS = (
    (r"\.(weight_scale_2|weight_global_scale)", "NVFP4", PLAIN_FILES),
    (r"\.\w+_blocks", "MXFP4", PLAIN_FILES),
    (r"\.(wscales|wtscale|wcscales|wzeros|smooth_factor(_orig)?)", "SVDQuant (nunchaku)", PLAIN_FILES),
    (r"\.(qweight|qzeros)", "GPTQ or AWQ", PLAIN_FILES),
    (r"\.(weight_packed|weight_shape|bitmask|compressed)", "compressed-tensors in packed form", PLAIN_FILES),
    (r"\.W_q", "HQQ", PLAIN_FILES),
    (r"[._]weight(:_data|:qdata|_qdata)", "torchao", SAVE_DEQUANTISED),
    (r"\.weight\.(_shift|_data\._data)", "Quanto with 4 or 2 bits", SAVE_DEQUANTISED),
    (r"\.(svd_up|svd_down)", "SDNQ", SAVE_DEQUANTISED),
    (r"\.(weight|input|output)_quantizer\.\w+", "ModelOpt", PLAIN_FILES),
    (r"\.(codebooks|weight_codebook)", "a quantiser with codebooks", PLAIN_FILES),
    (r"\.weight\.(quant_type|blocksize)", "an old version of bitsandbytes", SAVE_DEQUANTISED),
)
"""(how the names of tensors end, who writes such tensors, what to do); the first that fits is named."""

_UNREADABLE = ("F4", "F6", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64")
"""How the names of types begin that are not numbers one by one, or of which no file is known."""

_ALWAYS_COMPANION = re.compile(
    r"(^|\.)(weight_(scale|zero_point|scales|scale_inv|g_idx|format|shift|amax)\w*|scale_(weight|input)|SCB|absmax"
    r"|quant_map|nested_absmax|nested_quant_map|qscale_\w+|quant_state\..+|\w+_scale_inv)$"
)
_COMPANION_OF_WEIGHT = re.compile(r"(.*\.)(scales?|\w+_scale|zero_points?|zeros|amax|_amax|_scale)$")


def refuse_known(stored: SafetensorsWeights) -> None:
    """Refuse tensors that a known producer writes and that are not read here.

    Raises:
        InputError: names the producer and the first such tensor.
    """
    for pattern, producer, fix in _PRODUCERS:
        ending = re.compile(f".*{pattern}")
        for name in stored.shapes:
            if ending.fullmatch(name):
                raise InputError(f"{stored.source(name)} is of {producer}, which is not supported", fix)


def refuse_rest(
    stored: SafetensorsWeights, rest: Collection[str], config: Mapping[str, Any], plain_fp8: bool
) -> None:
    """Refuse what is left once all known quantised tensors are taken out, unless it is plain numbers.

    Args:
        rest: names of the tensors that no known format has claimed.
        config: the quantization_config of the component; {} if it has none.
        plain_fp8: FP8 weights without a scale are numbers, not values that miss their scale.

    Raises:
        InputError: a tensor belongs to a quantised weight in an unknown way, or is a weight that is stored as
            whole numbers, as FP8 that should have a scale, or in a type that cannot be read.
    """
    method = f" (its config says {config['quant_method']!a:.40})" if config.get("quant_method") else ""
    for name in rest:
        dtype, weight = stored.dtypes[name], name.rpartition(".")[2] == "weight"
        matrix = len(stored.shapes[name]) > 1
        if dtype.startswith(_UNREADABLE):
            raise InputError(
                f"{stored.source(name)} is stored as {dtype}, which is not supported", PLAIN_FILES
            )
        if _is_companion(name, stored):
            raise InputError(
                f"{stored.source(name)} belongs to a weight that is quantised in an unknown way{method}",
                PLAIN_FILES,
            )
        if dtype in WHOLE_NUMBERS and (weight or (matrix and dtype in ("I8", "U8"))):
            raise InputError(
                f"{stored.source(name)} is stored as {dtype} without its scales{method}", PLAIN_FILES
            )
        if dtype.startswith("F8") and matrix and not plain_fp8:
            raise InputError(
                f"{stored.source(name)} is stored as {dtype} without its scales{method}", PLAIN_FILES
            )


def _is_companion(name: str, stored: SafetensorsWeights) -> bool:
    if _ALWAYS_COMPANION.search(name):
        return True
    match = _COMPANION_OF_WEIGHT.fullmatch(name)
    return match is not None and (f"{match[1]}weight" in stored or match[1].rstrip(".") in stored)
