"""Loads the unmodified diffusers and transformers models of a checkpoint, from safetensors only."""

from __future__ import annotations

import inspect
import logging
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import diffusers
import torch
from accelerate import init_empty_weights

from ditf.export.checkpoints.components import check_components, check_files
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.offload import is_offloaded, offload_encoder
from ditf.export.checkpoints.weights import Weights
from ditf.runtime.errors import InputError, MissingComponent
from ditf.runtime.files.unfinished import register

_LEGACY = {
    ("Transformer2DModel", "ada_norm_zero"): "DiTTransformer2DModel",
    ("Transformer2DModel", "ada_norm_single"): "PixArtTransformer2DModel",
}
"""(class, norm type) in the configs of early DiT and PixArt checkpoints: the present name of the class."""

_LOCAL = {"local_files_only": True, "trust_remote_code": False}
"""For transformers, which otherwise asks on the terminal whether to run a checkpoint's code."""

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
    unknown = [key for key in config if not key.startswith("_") and key not in parameters]
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
    hints = get_type_hints(found.__init__)
    for key, value in config.items():
        if key in hints and not _fits(value, hints[key], defaults.get(key)):
            raise InputError(
                f"the config of {name} has {key}={value!r:.60}, which is no {_hint_name(hints[key])}",
                "correct its config.json, or take the published one",
            )
    return {**defaults, **config}


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


def check_structure(name: str, config: Mapping[str, Any], weights: Weights, fix: str) -> None:
    """Compare the names and shapes of tensors with the model that the config describes; no value is read.

    Args:
        fix: what to do where they differ.

    Raises:
        InputError: a tensor is missing, unknown or has the wrong shape (the message names the first one), or
            no model can be made of the config.
    """
    expected = model_shapes(name, config)
    for tensor in sorted(expected.keys() - weights.shapes.keys()):
        raise InputError(f"the weights of {name} lack {tensor}, which the config asks for", fix)
    for tensor in sorted(weights.shapes.keys() - expected.keys()):
        raise InputError(f"the weights of {name} have {tensor}, which the config does not know", fix)
    for tensor, shape in sorted(expected.items()):
        if weights.shapes[tensor] != shape:
            raise InputError(
                f"{tensor} of {name} is {list(weights.shapes[tensor])}, the config says {list(shape)}", fix
            )


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
    known = {key: value for key, value in config.items() if not key.startswith("_")}
    accepted = inspect.signature(getattr(diffusers, name).__init__).parameters
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: torch.nn.Module = getattr(diffusers, name)(
                **{k: v for k, v in known.items() if k in accepted}
            )
    except Exception as error:  # a config can make a library raise anything
        raise InputError(
            f"{name} cannot be made from its config ({first_line(error)})",
            "correct its config.json, or take the published one",
        ) from error
    return model


def load_model(model_class: Any, checkpoint: Checkpoint, component: str) -> Any:
    """Load a component of a checkpoint as a model in float32 and eval mode.

    Raises:
        InputError: the component is not that model, or its weights are incomplete, NaN or infinite.
    """
    if component == "transformer" and checkpoint.transformer is not None and checkpoint.transformer.is_file():
        return _model_of(model_class, checkpoint.config(component), checkpoint.weights(component))
    folder = checkpoint.folder(component)
    variant = checkpoint.loading_variant(component)
    model, info = _from_pretrained(
        model_class, folder, variant=variant, use_safetensors=True, output_loading_info=True
    )
    for problem in ("missing_keys", "mismatched_keys"):
        for key in info.get(problem, ()):
            raise InputError(
                f"{folder}: {key if isinstance(key, str) else key[0]} is {problem.partition('_')[0]}",
                "the checkpoint's config and weights do not belong together: download it again",
            )
    model = model.to(torch.float32).eval().requires_grad_(False)
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"tensor {name} of {folder} holds NaN or infinity",
                "the checkpoint is damaged: download or save it again",
            )
    return model


def _model_of(model_class: Any, config: Mapping[str, Any], weights: Weights) -> Any:
    """A diffusers model in float32 and eval mode that is made of tensors, where it has no folder of its own.

    Raises:
        InputError: a tensor is missing, has another shape, or holds NaN or infinity.
    """
    with init_empty_weights(include_buffers=False), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers announces changes of its own classes
        model = model_class.from_config(config)
    model.load_state_dict({name: weights.tensor(name) for name in model.state_dict()}, assign=True)
    return model.eval().requires_grad_(False)


def load_text_pipeline(checkpoint: Checkpoint, pipelines: Sequence[str], classes: Sequence[str]) -> Any:
    """Load the checkpoint's pipeline with its tokenizers and text encoders only, in float32.

    The weights of a large encoder are read from disk when they are used. diffusers' own loader is not used,
    because model_index.json could make it load other classes.

    Args:
        pipelines: names of diffusers pipelines. The checkpoint's own is used if it is one of them, else the
            first.
        classes: text encoders and tokenizers of transformers that model_index.json may name.

    Raises:
        InputError: as for `load_model`, or model_index.json names a class that is not in `classes`.
    """
    check_components(checkpoint, classes)
    index = checkpoint.index()
    own = str(index.get("_class_name"))
    pipeline_class = getattr(diffusers, own if own in pipelines else pipelines[0])
    parts: dict[str, Any] = {
        name: None
        for name, parameter in inspect.signature(pipeline_class.__init__).parameters.items()
        if name != "self" and parameter.default is inspect.Parameter.empty
    }
    for name in parts:
        if name.startswith(("text_encoder", "tokenizer")) and index.get(name) not in (None, [None, None]):
            load = _load_encoder if name.startswith("text_encoder") else _load_tokenizer
            parts[name] = load(checkpoint, name, _class_in_transformers(checkpoint, index[name]))
    for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"):
        if parts.get(name, "not of this pipeline") is None:
            raise InputError(f"{checkpoint.id} has no {name}", "save or download the whole pipeline")
    return pipeline_class(**parts)


def _class_in_transformers(checkpoint: Checkpoint, entry: Sequence[str]) -> Any:
    import transformers

    found = getattr(transformers, entry[1], None)
    if found is None:
        raise MissingComponent(
            f"transformers {transformers.__version__} has no {entry[1]}, which {checkpoint.id} names",
            "run: pip install --upgrade transformers",
        )
    return found


def _load_tokenizer(checkpoint: Checkpoint, name: str, tokenizer_class: Any) -> Any:
    return _from_pretrained(tokenizer_class, checkpoint.path / name, **_LOCAL)


def _load_encoder(checkpoint: Checkpoint, name: str, encoder_class: Any) -> Any:
    """Load a text encoder in float32; the weights of a large one are read when they are used."""
    folder = checkpoint.path / name
    options = {
        "variant": checkpoint.loading_variant(name),
        "dtype": torch.float32,
        "use_safetensors": True,
        **_LOCAL,
    }
    if not checkpoint.loras and not is_offloaded(checkpoint.stored(name)[0]):
        return _from_pretrained(encoder_class, folder, **options).eval()
    try:
        offloaded = offload_encoder(encoder_class, folder, checkpoint.weights(name))
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        raise InputError(
            f"{encoder_class.__name__} cannot be made of {folder}/config.json ({first_line(error)})",
            "download or save the checkpoint again",
        ) from error
    if offloaded is not None:
        return offloaded
    if any(checkpoint.changed_by_loras(name)):
        raise InputError(
            f"{folder} stores its tensors in an older layout, and a LoRA changes them",
            "load and save the text encoder with transformers again",
        )
    # The tensors have an older layout. from_pretrained converts them and writes the result to this folder.
    rewritten = tempfile.mkdtemp(prefix="ditf-encoder-")
    remove = partial(shutil.rmtree, rewritten, ignore_errors=True)
    register(remove)
    try:
        encoder = _from_pretrained(
            encoder_class, folder, **options, device_map={"": "disk"}, offload_folder=rewritten
        )
    except BaseException:
        remove()
        raise
    weakref.finalize(encoder, remove)
    return encoder.eval()


def _from_pretrained(loaded: Any, folder: Path, **options: Any) -> Any:
    check_files(folder)
    try:
        with warnings.catch_warnings():  # diffusers announces changes of its own classes
            warnings.simplefilter("ignore", FutureWarning)
            return loaded.from_pretrained(folder, **options)
    except Exception as error:  # files can make a library raise anything
        raise InputError(
            f"{loaded.__name__} cannot load {folder} ({first_line(error)})",
            "download or save the checkpoint again, with safetensors weights",
        ) from error


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
