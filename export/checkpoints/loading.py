"""Loads the unmodified diffusers models of a checkpoint, and completes and checks their configs."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import diffusers
import torch

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.offload import give_weights, without_values
from ditf.export.checkpoints.structure import BELONG, check_tensors
from ditf.export.checkpoints.weights import Weights
from ditf.runtime.errors import InputError, MissingComponent

_LEGACY = {
    ("Transformer2DModel", "ada_norm_zero"): "DiTTransformer2DModel",
    ("Transformer2DModel", "ada_norm_single"): "PixArtTransformer2DModel",
}
"""(class, norm type) in the configs of early DiT and PixArt checkpoints: the present name of the class."""

_UPGRADE = "run: pip install --upgrade diffusers"


def current_class(config: Mapping[str, Any]) -> str:
    """The present name of the diffusers class that a config is for."""
    name = str(config.get("_class_name"))
    return _LEGACY.get((name, str(config.get("norm_type"))), name)


def full_config(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config completed with the defaults of its diffusers class.

    Raises:
        MissingComponent: the installed diffusers has no such class, or a newer version wrote the config and
            it has keys that the installed version does not know.
        InputError: a value has the wrong type, or a size is negative.
    """
    found = getattr(diffusers, name, None)
    if found is None:
        raise MissingComponent(f"diffusers {diffusers.__version__} has no {name}", _UPGRADE)
    parameters = inspect.signature(found.__init__).parameters
    written = str(config.get("_diffusers_version", "0"))
    known = {*parameters, "quantization_config"}  # which says how the weights are stored
    unknown = [key for key in config if not key.startswith("_") and key not in known]
    if unknown and _newer(written, diffusers.__version__):
        raise MissingComponent(
            f"{name} has {unknown[0]}={config[unknown[0]]!r}, which diffusers {diffusers.__version__} does"
            f" not know: it was saved by {written}",
            _UPGRADE,
        )
    defaults = {
        key: parameter.default
        for key, parameter in parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    hints = {**_hints_of(defaults), **get_type_hints(found.__init__)}
    for key, value in config.items():
        if key in hints and not _fits(value, hints[key], defaults.get(key)):
            raise InputError(
                f"the config of {name} has {key}={value!r:.60}, which is no {_hint_name(hints[key])}",
                "correct its config.json, or take the published one",
            )
    return {**defaults, **config}


def _hints_of(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Types of the parameters that have no annotation, where their defaults are numbers or lists of them."""
    hints: dict[str, Any] = {}
    for key, value in defaults.items():
        if type(value) is int:
            hints[key] = int
        elif isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
            hints[key] = list[int]
    return hints


def _fits(value: Any, hint: Any, default: Any) -> bool:
    """Whether a JSON value has an annotated type; True for annotations that are not plain types."""
    if value is None:
        return default is None or type(None) in get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, option, default) for option in get_args(hint) if option is not type(None))
    if get_origin(hint) in (tuple, list) or hint in (tuple, list):
        items = [item for item in get_args(hint) if item is not Ellipsis][:1]
        return isinstance(value, (list, tuple)) and all(_fits(v, item, None) for item in items for v in value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (str, bool) else True


def _hint_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _newer(one: str, other: str) -> bool:
    from packaging.version import InvalidVersion, Version

    try:
        return Version(one) > Version(other)
    except InvalidVersion:
        return False


def check_structure(
    name: str, config: Mapping[str, Any], weights: Weights, fix: str = BELONG, what: str | None = None
) -> dict[str, str]:
    """Compare the tensors of a checkpoint with the diffusers model that the config describes.

    Args:
        name: the model's class.
        fix: what to do where they differ.
        what: the model, for messages; its class by default.

    Returns:
        {name in the model: name in `weights`}. They differ where diffusers itself renames tensors: early VAEs
        call the projections of their attention `query`, `key`, `value` and `proj_attn`.

    Raises:
        InputError: a tensor is missing, unknown, of another shape, or stored as whole numbers (the message
            names the first one), or no model can be made of the config.
    """
    model = shape_model(name, config)
    stored = {tensor: tensor for tensor in weights.shapes}
    model._fix_state_dict_keys_on_load(stored)  # type: ignore[operator]
    expected = model.state_dict()
    ignored = [
        tensor
        for tensor in weights.shapes
        for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        if re.search(pattern, tensor)
    ]
    stored = {tensor: source for tensor, source in stored.items() if tensor in expected}
    check_tensors(what or name, expected, stored, weights, ignored, fix)
    return stored


def model_shapes(name: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a diffusers model made from a config.

    Raises:
        InputError: as for `shape_model`.
    """
    state = shape_model(name, config).state_dict()
    return {tensor: tuple(value.shape) for tensor, value in state.items()}


def shape_model(name: str, config: Mapping[str, Any]) -> torch.nn.Module:
    """A diffusers model made from a config, on the meta device: it has shapes and no values.

    Raises:
        InputError: no model can be made of this config.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _make(name, config)
    except Exception as error:  # a config can make a library raise anything
        raise InputError(
            f"{name} cannot be made from its config ({first_line(error)})",
            "correct its config.json, or take the published one",
        ) from error


def _make(name: str, config: Mapping[str, Any]) -> torch.nn.Module:
    """A diffusers model with the keys of a config that its class knows, and therefore without a quantiser."""
    model_class = getattr(diffusers, name)
    accepted = inspect.signature(model_class.__init__).parameters
    known = {key: value for key, value in config.items() if not key.startswith("_") and key in accepted}
    model: torch.nn.Module = model_class(**known)
    return model


def load_model(model_class: Any, checkpoint: Checkpoint, component: str, resident: bool = True) -> Any:
    """Load a component of a checkpoint as an unmodified diffusers model, in float32 and eval mode.

    Args:
        resident: hold the model in memory. Otherwise a large one reads its weights when it runs.

    Raises:
        InputError: the component is not that model, or its weights are incomplete, NaN or infinite.
    """
    name = model_class.__name__
    config = full_config(name, checkpoint.config(component))
    weights = checkpoint.weights(component)
    stored = check_structure(name, config, weights)
    return give_weights(without_values(lambda: _make(name, config)), weights, stored, resident)


def first_line(error: Exception) -> str:
    """The first line of a library's error message, at most 160 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]


def quieten_libraries() -> None:
    """Turn off the progress bars and the advice that diffusers and transformers print."""
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    for name in ("accelerate", "huggingface_hub"):  # the hub's client logs every attempt
        logging.getLogger(name).setLevel(logging.ERROR)
