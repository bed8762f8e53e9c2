"""The tensors of a LoRA file by what they are for; which module of the model they change is not known here.

For every linear module that it changes, a LoRA file holds two factors: `down` (A, [rank, in]) and `up` (B,
[out, rank]). The change of the weight is `alpha / rank * B @ A`. The key of a tensor is the module's name in
one of several layouts, and a suffix that says which of the module's tensors it is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ditf.export.checkpoints.formats.safetensors_weights import SafetensorsWeights
from ditf.runtime.errors import InputError
from ditf.runtime.files.json_file import read_json

_SUFFIXES = {
    "down": r"lora_A(\.\w+)?\.weight|lora_down\.weight|lora\.down\.weight|lora_linear_layer\.down\.weight"
    r"|down\.weight",
    "up": r"lora_B(\.\w+)?\.weight|lora_up\.weight|lora\.up\.weight|lora_linear_layer\.up\.weight"
    r"|up\.weight",
    "alpha": r"alpha",
    "up_bias": r"lora_B(\.\w+)?\.bias|lora_up\.bias",
    "magnitude": r"lora_magnitude_vector(\.\w+)?(\.weight)?",
    "difference": r"diff",
    "bias_difference": r"diff_b",
}
"""The suffixes of each of a module's tensors, in the layouts of PEFT, Kohya, diffusers and XLabs."""

_KEY = re.compile(
    r"(?P<module>.+?)\.(?:" + "|".join(f"(?P<{use}>{one})" for use, one in _SUFFIXES.items()) + ")"
)

_OTHER_ADAPTERS = {
    r"\.dora_scale$": "a DoRA in LyCORIS' layout",
    r"\.hada_[wt]\d": "a LoHa",
    r"\.lokr_[wt]\d": "a LoKr",
    r"\.b?oft_|\.oft_(R|blocks)": "an OFT",
    r"\.lora_mid\.|\.lora_[AB]_mid": "a Tucker-decomposed LoRA",
    r"\.lora_embedding_[AB]": "a LoRA of an embedding",
    r"ia3_l|\.on_input$": "an IA3",
    r"vera_lambda": "a VeRA",
    r"\.(w|b)_norm$|\.(set|reshape)_weight$": "a replacement of whole tensors",
    r"\.[ab][12]\.weight$": "a GLoRA",
}
"""Other kinds of adapters, by a part of their keys."""

_MERGE = "merge it into the model where it was trained, and pass that as --model"
_LARGEST_CONFIG = 4 << 20  # bytes
_PLAIN_START = (True, False, None, "gaussian", "orthogonal", "eva")
"""The values of PEFT's `init_lora_weights` that leave the model's own weights as they are."""


@dataclass(frozen=True)
class Part:
    """The tensors of one module: each is a key of the file, or None.

    Attributes:
        module: the module's name as the file has it.
        down, up: the factors A [rank, in] and B [out, rank]; for a convolution [rank, in, h, w] and
            [out, rank, 1, 1].
        alpha: a number; without it the change is B @ A.
        up_bias: the bias of B, [out], which changes the module's bias.
        magnitude: of a DoRA, [out]: the lengths of the rows of the changed weight.
        difference, bias_difference: changes of the weight and the bias that are stored as they are.
    """

    module: str
    down: str | None = None
    up: str | None = None
    alpha: str | None = None
    up_bias: str | None = None
    magnitude: str | None = None
    difference: str | None = None
    bias_difference: str | None = None

    @property
    def key(self) -> str:
        """One of its keys, for messages."""
        given = (self.up, self.difference, self.bias_difference, self.down, self.alpha)
        return next(key for key in (*given, self.up_bias, self.magnitude) if key is not None)


@dataclass(frozen=True)
class Scaling:
    """How PEFT scales a LoRA, where the keys do not say it.

    Attributes:
        alpha: of all modules; None for the rank of each.
        alpha_pattern: of single modules, by their names or the ends of their names.
        by_root: divide by the square root of the rank (`use_rslora`).
    """

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] | None = None
    by_root: bool = False

    def factor(self, module: str, rank: int) -> float:
        """The factor of B @ A of one module, by its name in the model."""
        alpha = self.alpha
        for pattern, value in (self.alpha_pattern or {}).items():
            ends = pattern.removeprefix("^")
            if module == ends or (ends == pattern and module.endswith(f".{ends}")):
                alpha = value
                break
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.by_root else rank)


class LoraFile:
    """A LoRA file; its tensors are read when they are asked for.

    Args:
        path: the safetensors file.

    Attributes:
        parts: by the modules' names in the file.
        tensors: the tensors by their keys.

    Raises:
        InputError: the file is no readable safetensors file, or holds something else than a LoRA; the
            message names the first such tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = SafetensorsWeights([path])
        found: dict[str, dict[str, str]] = {}
        for key in sorted(self.tensors.shapes):
            for pattern, kind in _OTHER_ADAPTERS.items():
                if re.search(pattern, key):
                    raise InputError(f"--lora {path} is {kind} ({key}), which is not supported", _MERGE)
            match = _KEY.fullmatch(key)
            if match is None:
                raise self._no_part(key)
            use = next(use for use in _SUFFIXES if match[use])
            taken = found.setdefault(match["module"], {}).setdefault(use, key)
            if taken != key:
                raise InputError(f"--lora {path} holds two adapters: {taken} and {key}", "save one of them")
        if not found:
            raise InputError(f"--lora {path} holds no tensors", "download or save it again")
        self.parts = {module: Part(module, **keys) for module, keys in found.items()}
        self._check_pairs()
        self._alphas = self._read_alphas()
        self._settings = _parsed(path, self.tensors.metadata.get("lora_adapter_metadata"))
        self._peft = _peft_config(path)

    def _no_part(self, key: str) -> InputError:
        matches = map(_KEY.fullmatch, self.tensors.shapes)
        if any(match is not None and match["down"] for match in matches):
            return InputError(
                f"{key} of --lora {self.path} is a whole tensor beside a LoRA's",
                "control LoRAs and modules_to_save are not supported: pass a plain LoRA",
            )
        return InputError(
            f"{key} of --lora {self.path} is no part of a LoRA",
            "pass the weights of a whole model as --model",
        )

    def _read_alphas(self) -> dict[str, float]:
        """The alphas by their keys."""
        keys = [part.alpha for part in self.parts.values() if part.alpha is not None]
        for key in keys:
            if math.prod(self.tensors.shapes[key]) != 1:
                raise InputError(f"{key} of --lora {self.path} is no number", "save the LoRA again")
        alphas = {key: float(value.reshape(())) for key, value in self.tensors.raws(keys).items()}
        for key, alpha in alphas.items():
            if not math.isfinite(alpha):
                raise InputError(f"{key} of --lora {self.path} is {alpha}", "save the LoRA again")
        return alphas

    def _check_pairs(self) -> None:
        for part in self.parts.values():
            if (part.down is None) != (part.up is None):
                raise InputError(
                    f"--lora {self.path} is incomplete: it has {part.key} without its other factor",
                    "download or save it again",
                )
            if part.down is None or part.up is None:
                continue
            down, up = self.tensors.shapes[part.down], self.tensors.shapes[part.up]
            if len(down) < 2 or len(up) < 2 or up[1] != down[0] or down[0] == 0 or math.prod(up[2:]) != 1:
                raise InputError(
                    f"--lora {self.path}: {part.up} {list(up)} and {part.down} {list(down)} do not multiply",
                    "download or save it again",
                )

    def is_zero(self, part: Part) -> bool:
        """Whether a part changes nothing."""
        changes = (part.up, part.up_bias, part.difference, part.bias_difference)
        return part.magnitude is None and not any(
            self.tensors.tensor(key).any() for key in changes if key is not None
        )

    def factor(self, part: Part, component: str, module: str) -> float:
        """The factor of B @ A of a part.

        Args:
            component: "transformer" or a text encoder.
            module: the module's name in it.
        """
        assert part.down is not None
        rank = self.tensors.shapes[part.down][0]
        if part.alpha is not None:
            return self._alphas[part.alpha] / rank
        return self.scaling(component).factor(module, rank)

    def scaling(self, component: str) -> Scaling:
        """How PEFT scales the LoRA of one component.

        diffusers writes it into the metadata of the file, PEFT into adapter_config.json beside it.

        Raises:
            InputError: a setting cannot be read, or asks for another kind of adapter.
        """
        prefix = f"{component}."
        settings = {
            key.removeprefix(prefix): value for key, value in self._settings.items() if key.startswith(prefix)
        }
        return _scaling(self.path, settings or self._peft)

    def read(self, key: str) -> torch.Tensor:
        """One tensor in float32.

        Raises:
            InputError: it cannot be read, or holds NaN or infinity.
        """
        return self.tensors.tensor(key)


def _peft_config(path: Path) -> dict[str, Any]:
    """The configuration that PEFT writes beside adapter_model.safetensors; {} for other files."""
    config = path.with_name("adapter_config.json")
    if path.name != "adapter_model.safetensors" or not config.exists():
        return {}
    try:
        document = read_json(config, _LARGEST_CONFIG)
    except (OSError, ValueError) as error:
        raise InputError(f"{config} cannot be read ({error})", "save the adapter again") from error
    return _as_settings(config, document)


def _parsed(path: Path, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"lora_adapter_metadata of {path} is not JSON", "save the LoRA again") from error
    return _as_settings(path, document)


def _as_settings(path: Path, document: Any) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise InputError(f"the settings of {path} are no table", "save the LoRA again")
    return document


def _scaling(path: Path, settings: Mapping[str, Any]) -> Scaling:
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise InputError(f"--lora {path} is of PEFT's type {kind!a:.40}, not LORA", _MERGE)
    start = settings.get("init_lora_weights", True)
    if start not in _PLAIN_START:
        raise InputError(
            f"--lora {path} was trained with init_lora_weights={start!a:.40}, which changes the model's own"
            " weights",
            "convert it to a plain LoRA with PEFT: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    patterns = settings.get("alpha_pattern") or {}
    alpha = settings.get("lora_alpha")
    numbers = [alpha, *(patterns.values() if isinstance(patterns, dict) else ["no table"])]
    for number in numbers:
        if not (number is None or (isinstance(number, (int, float)) and math.isfinite(number))):
            raise InputError(f"the alphas of --lora {path} are no numbers", "save the LoRA again")
    for pattern in patterns:
        if not re.fullmatch(r"\^?[\w.]+", pattern):
            raise InputError(
                f"alpha_pattern of --lora {path} has the expression {pattern!a:.60}, which is not supported",
                "save the LoRA with the names of its modules",
            )
    return Scaling(alpha, patterns, bool(settings.get("use_rslora")))
