"""Loads the unmodified text encoders of a checkpoint, from `Checkpoint.weights`.

transformers renames tensors of older layouts when it loads a model. Here it first loads tensors that have a
shape and no values: this shows what is missing or unknown before any work is done, and each parameter's
storage says which tensor of the checkpoint it is. The values are read afterwards, by the names found so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from ditf.export.checkpoints.components import check_files
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.loading import first_line
from ditf.export.checkpoints.offload import give_weights, without_values
from ditf.export.checkpoints.structure import check_tensors
from ditf.export.checkpoints.weights import Weights
from ditf.runtime.errors import InputError

LOCAL = {"local_files_only": True, "trust_remote_code": False}
"""For transformers, which otherwise asks on the terminal whether to run a checkpoint's code."""

_OTHER_PARTS = re.compile(
    r"(model\.)?(decoder|lm_head|visual|vision_tower|vision_model|multi_modal_projector|visual_projection"
    r"|text_projection|logit_scale)(\.|$)"
)
"""Parts of a whole T5, CLIP or vision-language model that its text encoder has no use for."""

_FORMER_BUFFERS = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq)$")
"""Constants that earlier versions of transformers saved."""

_ADAPTER = "adapter_config.json"  # PEFT's; from_pretrained reads it
_FIX = "take config and weights from the same checkpoint, or give the encoders' output with --prompt-embeds"


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of a checkpoint whose tensors were checked and not read.

    Attributes:
        encoder_class: the class of transformers.
        config: the model's, of transformers.
        stored: {name in the model: name in `weights`}.
        doubled: pairs of names in `weights` of which the model has only one tensor.
    """

    name: str
    encoder_class: Any
    config: Any
    weights: Weights
    stored: dict[str, str]
    doubled: tuple[tuple[str, str], ...]

    @property
    def is_clip(self) -> bool:
        """Whether it is CLIP, whose pooled output is that of one token."""
        return str(self.encoder_class.__name__).startswith("CLIP")

    def load(self) -> Any:
        """The model in float32 and eval mode. A large one reads its weights when it runs.

        Raises (when loaded and when run):
            InputError: a tensor cannot be read, or holds NaN or infinity; or two that are one differ.
        """
        for one, other in self.doubled:
            if not torch.equal(self.weights.tensor(one), self.weights.tensor(other)):
                raise InputError(
                    f"the weights of {self.name} hold {one} and {other} with different values, and"
                    f" {self.encoder_class.__name__} has one tensor for both",
                    "save the encoder again with the one that it was trained with",
                )
        empty = without_values(lambda: self.encoder_class(self.config))
        return give_weights(empty, self.weights, self.stored)


def check_encoder(checkpoint: Checkpoint, name: str, encoder_class: Any) -> TextEncoder:
    """Compare the tensors of a text encoder with the model that its config describes. No value is read.

    Args:
        name: the component, such as "text_encoder_2".
        encoder_class: the class of transformers.

    Raises:
        InputError: a tensor is missing, unknown, of another shape, or stored as whole numbers (the message
            names the first one), or no model can be made of the config.
    """
    folder = checkpoint.path / name
    check_files(folder)
    if (folder / _ADAPTER).exists():
        raise InputError(
            f"{folder} has {_ADAPTER}: transformers would load an adapter on top of the text encoder",
            "merge it (PEFT: merge_and_unload) and save the text encoder again, or take the file away",
        )
    weights = checkpoint.weights(name)
    what = f"{name} ({encoder_class.__name__})"
    try:
        config = encoder_class.config_class.from_pretrained(folder, local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # `weights` is dequantised
        config.dtype = torch.float32
        shapes = {tensor: torch.empty(shape, device="meta") for tensor, shape in weights.shapes.items()}
        model, report = encoder_class.from_pretrained(
            None,
            config=config,
            state_dict=shapes,
            dtype=torch.float32,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,  # they are in the report
            output_loading_info=True,
            **LOCAL,
        )
    except Exception as error:  # a config can make a library raise anything
        raise InputError(
            f"{encoder_class.__name__} cannot load {folder} ({first_line(error)})",
            "download the checkpoint again, or save it again with safetensors weights",
        ) from error
    for tensor, found, wanted in sorted(report["mismatched_keys"]):
        raise InputError(f"{tensor} of {what} is {list(found)}, the config says {list(wanted)}", _FIX)
    expected = model.state_dict(keep_vars=True)
    source_of = {_storage(tensor): source for source, tensor in shapes.items()}
    stored = {
        tensor: source_of[_storage(value)]
        for tensor, value in expected.items()
        if _storage(value) in source_of and tensor not in report["missing_keys"]
    }
    patterns = [_FORMER_BUFFERS.pattern, *(model._keys_to_ignore_on_load_unexpected or ())]
    ignored = [
        tensor
        for tensor in weights.shapes
        if _OTHER_PARTS.match(tensor) or any(re.search(pattern, tensor) for pattern in patterns)
    ]
    check_tensors(what, expected, stored, weights, ignored, _FIX)
    output = model.get_output_embeddings()  # which no pipeline reads
    doubled = tuple(
        (stored[source], stored[tied])
        for tied, source in model.all_tied_weights_keys.items()
        if stored[tied] != stored[source] and (output is None or expected[tied] is not output.weight)
    )
    return TextEncoder(name, encoder_class, config, weights, stored, doubled)


def _storage(tensor: torch.Tensor) -> int:
    """The identity of the memory behind a tensor, which views and parameters share, on any device."""
    return tensor.untyped_storage()._cdata
