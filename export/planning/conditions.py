"""The conditions of an export: prompts or classes at timesteps, their names and their encoding."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.loading import first_line
from ditf.export.checkpoints.text.pipeline import check_text
from ditf.export.families.base import Condition, Defaults, Family
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.prompt_embeds import read_embeddings
from ditf.runtime.errors import DitfError, InputError
from ditf.runtime.files.reading import read_regular

NULL_CLASS = "null"
_LARGEST_FILE = 1 << 20  # bytes of a file of prompts
_MOST_ENTRIES = 1000


@dataclass(frozen=True)
class Entry:
    """One condition of a bundle.

    Attributes:
        name: the name that the runtime chooses it by.
        prompt, class_label: one of them is set; where neither is, the condition is the null class.
        timestep: diffusion timestep.
        condition: the tensors of the text encoders, once they ran.
        embeds: sha256 of the file of --prompt-embeds that the condition is from, or None.
        cut_text: which text encoder reads only the start of the prompt, or None; for people.
    """

    name: str
    prompt: str | None
    class_label: int | None
    timestep: int
    condition: Condition
    embeds: str | None = None
    cut_text: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "prompt": self.prompt,
            "class_label": self.class_label,
            "timestep": self.timestep,
            **({} if self.embeds is None else {"prompt_embeds": self.embeds}),
            **({} if self.cut_text is None else {"cut_text": self.cut_text}),
        }


def plan_entries(
    options: ExportOptions, checkpoint: Checkpoint, family: Family, defaults: Defaults
) -> tuple[Entry, ...]:
    """The entries that an export asks for, not encoded yet: every prompt or class at every timestep.

    Raises:
        InputError: the model takes no prompt, or no class; two names are the same; more than one entry is to
            be baked; or a class is out of range.
    """
    timesteps = options.timestep or (defaults.timestep,)
    subjects: list[Entry]
    if options.prompt_embeds:
        subjects = _given(options, family)
    elif family.takes_prompt:
        subjects = _prompts(options, family, defaults)
    else:
        subjects = _classes(options, checkpoint, family)
    entries = tuple(
        replace(one, name=f"{one.name}@{t}" if len(timesteps) > 1 else one.name, timestep=t)
        for one, t in itertools.product(subjects, timesteps)
    )
    for name, count in Counter(entry.name for entry in entries).items():
        if count > 1:
            raise InputError(f"two conditions are called {name!r:.60}", "give every prompt its own name")
    if len(entries) > _MOST_ENTRIES:
        raise InputError(f"{len(entries)} conditions are too many", f"give at most {_MOST_ENTRIES}")
    if options.conditioning == "bake" and len(entries) > 1:
        raise InputError(
            f"{len(entries)} conditions cannot be baked into one graph", "add --conditioning bank"
        )
    return entries


def _given(options: ExportOptions, family: Family) -> list[Entry]:
    """The entries of --prompt-embeds. Each is named after its prompt, or its file if that is unknown."""
    if options.prompt or options.prompts is not None or options.class_label:
        raise InputError(
            "--prompt-embeds is in place of a prompt: the file says which one it is of",
            "leave --prompt, --prompts and --class-label out",
        )
    if not family.takes_prompt:
        raise InputError(f"{family.name} reads no text", "leave --prompt-embeds out")
    entries = []
    for path in options.prompt_embeds:
        found = read_embeddings(path, family)
        name = path.stem if found.prompt is None else found.prompt
        entries.append(Entry(name, found.prompt, None, 0, found.condition, found.sha256))
    return entries


def _prompts(options: ExportOptions, family: Family, defaults: Defaults) -> list[Entry]:
    if options.class_label:
        raise InputError(f"{family.name} is text-conditional and takes no class label", "use --prompt")
    named = [(prompt, prompt) for prompt in options.prompt]
    if options.prompts is not None:
        named += read_prompts(options.prompts)
    if not named:
        assert defaults.prompt is not None
        named = [(defaults.prompt, defaults.prompt)]
    return [Entry(name, prompt, None, 0, {}) for name, prompt in named]


def _classes(options: ExportOptions, checkpoint: Checkpoint, family: Family) -> list[Entry]:
    if options.prompt or options.prompts is not None:
        raise InputError(f"{family.name} is class-conditional and takes no prompt", "use --class-label")
    if not options.class_label:
        return [Entry(NULL_CLASS, None, None, 0, {})]
    names = checkpoint.class_names()
    return [
        Entry(label, None, _class_number(label, names, family.null_class), 0, {})
        for label in options.class_label
    ]


def _class_number(label: str, names: Mapping[str, int], last: int) -> int:
    if label.isdecimal():
        if int(label) > last:
            raise InputError(f"class label {label} is out of range", f"choose 0..{last}")
        return int(label)
    if label in names:
        return names[label]
    known = f"{len(names)} names, such as {next(iter(names))!r}" if names else "numbers only"
    raise InputError(f"no class is called {label!r}", f"this checkpoint has {known}")


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """Read (name, prompt) from lines `name: prompt`; empty lines and lines that start with # are left out.

    Raises:
        InputError: the file cannot be read, a line has no name or no prompt, or there is no line.
    """
    try:
        lines = read_regular(path, _LARGEST_FILE).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--prompts {path} cannot be read ({reason})", "give a text file") from error
    named = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, prompt = line.partition(":")
        if not colon or not name.strip() or not prompt.strip():
            raise InputError(f"{path}, line {number} is not 'name: prompt': {line.strip()[:40]!r}")
        named.append((name.strip(), prompt.strip()))
    if not named:
        raise InputError(f"{path} holds no prompt", "write lines such as: cat: a photo of a cat")
    return named


def check_prompts(entries: Sequence[Entry], family: Family, checkpoint: Checkpoint) -> tuple[Entry, ...]:
    """Check the text encoders and tokenizers that the entries need; their values are not read.

    Returns:
        The entries, each with its `cut_text`.

    Raises:
        InputError: as for `check_text`.
    """
    prompts = [entry.prompt for entry in entries if entry.embeds is None and entry.prompt is not None]
    if not prompts:
        return tuple(entries)
    text = check_text(checkpoint, family.pipelines, family.text_classes, prompts)
    cut = {prompt: text.cut_text(prompt) for prompt in dict.fromkeys(prompts)}
    return tuple(replace(entry, cut_text=cut.get(entry.prompt or "")) for entry in entries)


def warnings_of(entries: Sequence[Entry]) -> list[str]:
    """A line for each prompt of which a text encoder reads only the start."""
    cut = {str(entry.prompt): entry.cut_text for entry in entries if entry.cut_text is not None}
    return [f"warning: the prompt {prompt[:40]!r}...: {line}" for prompt, line in cut.items()]


def encode(
    entries: Sequence[Entry], family: Family, checkpoint: Checkpoint, guidance: float | None
) -> tuple[Entry, ...]:
    """The entries with their conditions. Where embeddings were given, no text encoder is opened.

    Raises:
        InputError: a prompt is too long; or a text encoder fails, gives NaN, or is not of this transformer.
    """
    if entries[0].embeds is not None:
        setting = {} if guidance is None else {"guidance": torch.tensor([guidance])}
        return tuple(replace(entry, condition={**entry.condition, **setting}) for entry in entries)
    subjects: list[str | int] = []
    for entry in entries:
        subject = entry.prompt if entry.prompt is not None else entry.class_label
        subjects.append(family.null_class if subject is None else subject)
    unique = list(dict.fromkeys(subjects))
    try:
        encoded = family.encode_conditions(checkpoint, unique, guidance)
    except (DitfError, MemoryError):
        raise
    except Exception as error:  # damaged files can raise anything in the libraries that read them
        raise InputError(
            f"the text encoders of {checkpoint.id} fail ({first_line(error)})",
            "download the checkpoint again",
        ) from error
    conditions = dict(zip(unique, encoded, strict=True))
    example = family.example_condition()
    for subject, condition in conditions.items():
        for name, tensor in condition.items():
            if tensor.is_floating_point() and tensor.shape[-1] != example[name].shape[-1]:
                raise InputError(
                    f"the text encoders of {checkpoint.id} give {name} of {tensor.shape[-1]} channels, its"
                    f" transformer takes {example[name].shape[-1]}",
                    "take the text encoders and the transformer from the same checkpoint",
                )
            if not torch.isfinite(tensor).all():
                raise InputError(
                    f"{name} of {subject!r:.60} holds NaN or infinity: the text encoder is damaged",
                    "download the checkpoint again",
                )
    return tuple(
        replace(entry, condition=conditions[subject])
        for entry, subject in zip(entries, subjects, strict=True)
    )


def trim(
    entries: Sequence[Entry], family: Family, live: bool = False, tokens: int | None = None
) -> tuple[Entry, ...]:
    """The entries without the text tokens that are masked in all of them; this changes no feature.

    Args:
        live: True keeps masked tokens, which another prompt may need.
        tokens: number of T5 tokens to keep (--text-tokens), which is an approximation; None for all.
    """
    length = family.text_length if live else family.text_tokens
    longest = max(length(entry.condition) for entry in entries)
    if tokens is not None:
        longest = min(longest, family.leading_tokens + tokens)
    return tuple(replace(entry, condition=family.trim_text(entry.condition, longest)) for entry in entries)


def example_condition(family: Family, text_tokens: int | None = None) -> Condition:
    """Tensors of the shapes that a model's text encoders give, filled with zeros.

    Args:
        text_tokens: number of unmasked text tokens; all of them by default.
    """
    condition = family.example_condition()
    return condition if text_tokens is None else family.trim_text(condition, text_tokens)


def usual_text_tokens(family: Family, text_tokens: int | None) -> int | None:
    """How many text tokens an export of a short prompt keeps, or None for a model that reads no text.

    Args:
        text_tokens: the value of --text-tokens.
    """
    if not family.takes_prompt:
        return None
    tokens = family.short_text or family.text_length(family.example_condition())
    return tokens if text_tokens is None else min(tokens, family.leading_tokens + text_tokens)


def describe(entries: Sequence[Entry]) -> str:
    """What is encoded, for a line of progress."""
    if len(entries) == 1:
        return f"the condition {json.dumps(entries[0].name[:60])}"
    return f"{len(entries)} conditions"
