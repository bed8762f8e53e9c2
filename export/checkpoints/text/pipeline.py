"""Loads the text half of a checkpoint's pipeline: its tokenizers and text encoders, and nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers

from ditf.export.checkpoints.components import check_components
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.text.encoders import TextEncoder, check_encoder
from ditf.export.checkpoints.text.tokenizers import check_added_tokens, check_tokenizer, load_tokenizer
from ditf.runtime.errors import InputError, MissingComponent

_OPTIONAL = "tokenizer_3"
"""With its text encoder it may be missing: Stable Diffusion 3 without T5 takes zeros for its output."""


@dataclass(frozen=True)
class TextPipeline:
    """The text half of a pipeline, checked: its text encoders are not read yet.

    Attributes:
        pipeline_class: the class of diffusers.
        encoders, tokenizers: {name of the component: ...}.
    """

    pipeline_class: Any
    encoders: dict[str, TextEncoder]
    tokenizers: dict[str, Any]

    def load(self) -> Any:
        """The pipeline of diffusers with its text encoders in float32, and without its other components.

        The weights of a large encoder are read from disk when they are used. diffusers' own loader is not
        used, because model_index.json could make it load other classes.

        Raises:
            InputError: as for `TextEncoder.load`.
        """
        loaded = {name: encoder.load() for name, encoder in self.encoders.items()}
        parts = {**dict.fromkeys(_components(self.pipeline_class)), **self.tokenizers, **loaded}
        return self.pipeline_class(**parts)

    def cut_text(self, prompt: str) -> str | None:
        """Which text encoder reads only the start of a prompt, for a line of the output; None if none does.

        CLIP reads 77 tokens. Where T5 reads the prompt beside it, the pipeline cuts CLIP's share of a longer
        prompt. FLUX takes only one vector from CLIP; SD3 takes its tokens too.
        """
        clips = [name for name, encoder in self.encoders.items() if encoder.is_clip]
        if len(clips) == len(self.encoders):
            return None
        for name in clips:
            tokenizer = self.tokenizers[name.replace("text_encoder", "tokenizer")]
            count = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
            if count > tokenizer.model_max_length:
                return (
                    f"CLIP reads the first {tokenizer.model_max_length} of its {count} tokens, as in"
                    " diffusers; T5 reads them all"
                )
        return None


def load_text_pipeline(checkpoint: Checkpoint, pipelines: Sequence[str], classes: Sequence[str]) -> Any:
    """Load the checkpoint's pipeline with its tokenizers and text encoders only, in float32.

    Args:
        pipelines, classes: as for `check_text`.

    Raises:
        InputError: as for `check_text` and `TextPipeline.load`.
    """
    return check_text(checkpoint, pipelines, classes).load()


def check_text(
    checkpoint: Checkpoint, pipelines: Sequence[str], classes: Sequence[str], prompts: Iterable[str] = ()
) -> TextPipeline:
    """Check the text encoders and tokenizers of a checkpoint. No value of a tensor is read.

    Args:
        pipelines: names of diffusers pipelines. The checkpoint's own is used if it is one of them, else the
            first.
        classes: text encoders and tokenizers of transformers that model_index.json may name.
        prompts: what will be encoded.

    Raises:
        InputError: model_index.json names a class that is not in `classes`; a component is missing; the
            tensors of a text encoder are not those of its model; or a tokenizer does not fit its encoder.
        MissingComponent: the installed transformers lacks a class.
    """
    check_components(checkpoint, classes)
    index = checkpoint.index()
    own = str(index.get("_class_name"))
    pipeline_class = getattr(diffusers, own if own in pipelines else pipelines[0])
    names = _components(pipeline_class)
    present = {name for name in names if index.get(name) not in (None, [None, None])}
    encoders: dict[str, TextEncoder] = {}
    tokenizers: dict[str, Any] = {}
    for name in names:
        encoder = name.replace("tokenizer", "text_encoder")
        lacking = [one for one in (encoder, name) if one not in present]
        if not name.startswith("tokenizer") or (len(lacking) == 2 and name == _OPTIONAL):
            continue
        if lacking:
            raise InputError(f"{checkpoint.id} has no {lacking[0]}", "save or download the whole pipeline")
        tokenizer = load_tokenizer(checkpoint, name, _class_in_transformers(checkpoint, index[name]))
        found = check_encoder(checkpoint, encoder, _class_in_transformers(checkpoint, index[encoder]))
        check_tokenizer(tokenizer, name, found)
        check_added_tokens(tokenizer, name, found.config, prompts)
        tokenizers[name], encoders[encoder] = tokenizer, found
    return TextPipeline(pipeline_class, encoders, tokenizers)


def _components(pipeline_class: Any) -> list[str]:
    """The names of the components that a pipeline has to be given."""
    return [
        name
        for name, parameter in inspect.signature(pipeline_class.__init__).parameters.items()
        if name != "self" and parameter.default is inspect.Parameter.empty
    ]


def _class_in_transformers(checkpoint: Checkpoint, entry: Sequence[str]) -> Any:
    import transformers

    found = getattr(transformers, entry[1], None)
    if found is None:
        raise MissingComponent(
            f"transformers {transformers.__version__} has no {entry[1]}, which {checkpoint.id} names",
            "run: pip install --upgrade transformers",
        )
    return found
