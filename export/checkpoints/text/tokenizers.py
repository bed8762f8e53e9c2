"""Loads the tokenizers of a checkpoint, and checks that each fits its text encoder.

A tokenizer of another model, or one that lost files, gives token numbers like any other, and nothing in
transformers or diffusers compares them with the encoder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ditf.export.checkpoints.components import check_files
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.loading import first_line
from ditf.export.checkpoints.text.encoders import LOCAL, TextEncoder
from ditf.runtime.errors import InputError

_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
_ARGMAX_EOS = 2  # with this eos_token_id, CLIP pools the token of the highest number (transformers 24773)
_PROBE = "a photo"
_DIFFERENT = 0.01  # share of a vocabulary: files of one model may differ in a few special tokens
_FIX = "take the tokenizer from the checkpoint of its text encoder, or give --prompt-embeds"


def load_tokenizer(checkpoint: Checkpoint, name: str, tokenizer_class: Any) -> Any:
    """Load a tokenizer.

    Raises:
        InputError: files are missing or cannot be read, or two of them hold different vocabularies.
    """
    folder = checkpoint.path / name
    check_files(folder)
    if not any((folder / file).is_file() for file in _VOCABULARIES):
        raise InputError(
            f"{folder} has no vocabulary ({', '.join(_VOCABULARIES)})", "download the tokenizer again"
        )
    try:
        tokenizer = tokenizer_class.from_pretrained(folder, **LOCAL)
        vocabulary = tokenizer.get_vocab()
        tokenizer(_PROBE)
        stored = list(_stored_vocabularies(folder))
    except Exception as error:  # files can make a library raise anything
        raise InputError(
            f"{tokenizer_class.__name__} cannot load {folder} ({first_line(error)})",
            "take the tokenizer's folder of the published checkpoint",
        ) from error
    for file, tokens in stored:
        other = sum(vocabulary.get(token) != number for token, number in tokens.items())
        if other > _DIFFERENT * len(tokens):
            raise InputError(
                f"{folder} holds two vocabularies: {file} numbers {other} tokens otherwise than"
                f" {tokenizer_class.__name__} has read from tokenizer.json",
                "remove the file that is of another model",
            )
    return tokenizer


def _stored_vocabularies(folder: Path) -> Iterable[tuple[str, Mapping[str, int]]]:
    """The vocabularies that lie beside tokenizer.json, which is read in their place."""
    if not (folder / "tokenizer.json").is_file():
        return
    if (folder / "vocab.json").is_file():
        yield "vocab.json", json.loads((folder / "vocab.json").read_text("utf-8"))
    for path in (folder / "spiece.model", folder / "tokenizer.model"):
        if path.is_file():
            from sentencepiece import SentencePieceProcessor

            pieces = SentencePieceProcessor(model_file=str(path))
            yield path.name, {pieces.id_to_piece(number): number for number in range(len(pieces))}


def check_tokenizer(tokenizer: Any, name: str, encoder: TextEncoder) -> None:
    """Compare a tokenizer with the config of its text encoder.

    Args:
        name: the component, such as "tokenizer_2".

    Raises:
        InputError: it does not belong to the encoder; says why.
    """
    kind, config = encoder.encoder_class.__name__, encoder.config
    rows, size = config.vocab_size, len(tokenizer)
    base = tokenizer.vocab_size
    numbers = tokenizer(_PROBE).input_ids
    if base > rows or max(numbers) >= rows:
        raise InputError(f"{name} has {max(base, size)} tokens, the {kind} that reads it {rows}", _FIX)
    if 2 * size < rows:
        raise InputError(f"{name} has {size} tokens of the {rows} that its {kind} reads", _FIX)
    if tokenizer.pad_token_id is None:
        raise InputError(f"{name} has no pad_token", _FIX)
    if encoder.is_clip:
        _check_clip(tokenizer, name, kind, config, numbers)
    if kind == "T5EncoderModel":
        _check_number(name, kind, "a text ends with", numbers[-1], "eos_token_id", config)
        _check_number(name, kind, "a text is padded with", tokenizer.pad_token_id, "pad_token_id", config)
    if kind == "UMT5EncoderModel":
        _check_number(name, kind, "its eos_token is", tokenizer.eos_token_id, "eos_token_id", config)
    if kind == "Gemma2Model":
        _check_number(name, kind, "a text begins with", numbers[0], "bos_token_id", config)


def _check_number(name: str, kind: str, where: str, number: int, key: str, config: Any) -> None:
    wanted = getattr(config, key)
    if number != wanted:
        raise InputError(
            f"{name}: {where} token {number}, the config of its {kind} says {key}={wanted}", _FIX
        )


def _check_clip(tokenizer: Any, name: str, kind: str, config: Any, numbers: list[int]) -> None:
    eos = config.eos_token_id
    pooled = max(numbers) if eos == _ARGMAX_EOS else eos
    if numbers.count(pooled) != 1 or numbers[-1] != pooled or numbers[0] != tokenizer.bos_token_id:
        raise InputError(
            f"{name} makes {numbers} of {_PROBE!r}: its {kind} pools the token that ends the text"
            f" (eos_token_id={eos} in its config), and there is none",
            _FIX,
        )
    most, longest = tokenizer.model_max_length, config.max_position_embeddings
    if most > longest:
        reads = "no model_max_length" if most > 1e9 else f"model_max_length={most}"
        raise InputError(
            f"{name} has {reads}, its {kind} reads {longest} tokens",
            f'write "model_max_length": {longest} into {name}/tokenizer_config.json',
        )


def check_added_tokens(tokenizer: Any, name: str, config: Any, prompts: Iterable[str]) -> None:
    """Check that the text encoder has rows for the added tokens of a prompt, as of a textual inversion.

    Raises:
        InputError: a prompt has an added token that the encoder's embedding has no row for; names it.
    """
    for number, token in tokenizer.added_tokens_decoder.items():
        if number >= config.vocab_size and any(str(token) in prompt for prompt in prompts):
            raise InputError(
                f"{str(token)!r} of the prompt is token {number} of {name}, and its text encoder embeds only"
                f" {config.vocab_size} tokens",
                "load the textual inversion in diffusers and save the whole pipeline",
            )
