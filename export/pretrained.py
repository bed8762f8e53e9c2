"""Loading the unmodified diffusers and transformers parts of a checkpoint, from safetensors only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ditf.runtime.errors import InputError


def load_model(model_class: Any, folder: Path) -> Any:
    """A model in float32 and eval mode.

    Raises:
        InputError: what is there is not that model; the library's first line says why.
    """
    model = _from_pretrained(model_class, folder)
    return model.to(torch.float32).eval().requires_grad_(False)


def load_pipeline(pipeline_class: Any, folder: Path, **components: Any) -> Any:
    """A pipeline; pass `component=None` for those that are not needed.

    Raises:
        InputError: as `load_model`.
    """
    return _from_pretrained(pipeline_class, folder, **components)


def _from_pretrained(loaded: Any, folder: Path, **options: Any) -> Any:
    try:
        return loaded.from_pretrained(folder, use_safetensors=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{loaded.__name__} cannot load {folder} ({lines[0][:160]})",
            "download or save the checkpoint again, with safetensors weights",
        ) from error


def quieten_libraries() -> None:
    """Stop the bars and the advice that diffusers and transformers print for their own users."""
    import diffusers
    import transformers

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
