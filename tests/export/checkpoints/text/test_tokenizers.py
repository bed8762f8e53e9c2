"""A tokenizer that is not its encoder's is refused: nothing else compares the two."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer, T5EncoderModel, T5Tokenizer

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.text.pipeline import check_text
from ditf.export.families import family_of
from ditf.runtime.errors import InputError
from tests.checkpoint_parts import tiny_t5_tokenizer


def check(folder, *prompts):
    checkpoint = Checkpoint(folder, "x")
    family = family_of(checkpoint)
    return check_text(checkpoint, family.pipelines, family.text_classes, prompts)


def reconfigure(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def settings(component, **changes):
    return lambda folder: reconfigure(folder / component / "tokenizer_config.json", **changes)


def encoder(component, **changes):
    return lambda folder: reconfigure(folder / component / "config.json", **changes)


def without_vocabulary(folder):
    (folder / "tokenizer" / "tokenizer.json").unlink()


def of_another_encoder(folder):
    """A T5 of half the vocabulary, in all files, for the encoder of a larger one."""
    (folder / "text_encoder" / "config.json").write_text(
        (folder / "text_encoder" / "config.json")
        .read_text()
        .replace('"vocab_size": 140', '"vocab_size": 300')
    )

    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors["shared.weight"] = torch.randn(300, 32)
    save_file(tensors, path, {"format": "pt"})


def swapped(folder):
    (folder / "tokenizer").rename(folder / "other")
    (folder / "tokenizer_2").rename(folder / "tokenizer")
    (folder / "other").rename(folder / "tokenizer_2")
    index = json.loads((folder / "model_index.json").read_text())
    names = ("tokenizer", "tokenizer_2")
    reconfigure(folder / "model_index.json", **dict(zip(names, (index[n] for n in names[::-1]), strict=True)))


def without_bos(folder):
    """As copies of Gemma's tokenizer.json had it for some hours (unslothai/unsloth 10312)."""
    path = folder / "tokenizer" / "tokenizer.json"
    reconfigure(path, post_processor={"type": "Sequence", "processors": []})


def with_another_vocabulary(folder):
    """vocab.json of another CLIP beside tokenizer.json, which transformers reads."""
    path = folder / "tokenizer" / "tokenizer.json"
    tokens = list(json.loads(path.read_text())["model"]["vocab"])
    other = {token: number for number, token in enumerate([*tokens[:2], *tokens[:1:-1]])}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(other))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("pixart", without_vocabulary, "tokenizer has no vocabulary"),
        ("flux", without_vocabulary, "tokenizer has no vocabulary"),
        ("flux", swapped, r"its CLIPTextModel pools the token that ends the text"),
        ("pixart", of_another_encoder, "tokenizer has 133 tokens of the 300 that its T5EncoderModel reads"),
        ("pixart", encoder("text_encoder", eos_token_id=2), "a text ends with token 1, .* eos_token_id=2"),
        ("pixart", encoder("text_encoder", pad_token_id=1), "is padded with token 0, .* pad_token_id=1"),
        ("pixart", settings("tokenizer", eos_token="<unk>"), "a text ends with token 2, .* eos_token_id=1"),
        ("pixart", settings("tokenizer", pad_token=None), "tokenizer has no pad_token"),
        ("auraflow", encoder("text_encoder", eos_token_id=2), "eos_token is token 1, .* eos_token_id=2"),
        ("lumina2", without_bos, r"begins with token \d, the config of its Gemma2Model says bos_token_id=2"),
        ("flux", settings("tokenizer", model_max_length=None), "no model_max_length, .* reads 77 tokens"),
        ("flux", settings("tokenizer", model_max_length=200), 'model_max_length=200, .*write "model_max_'),
        ("flux", encoder("text_encoder", eos_token_id=7), r"pools the token that ends .* \(eos_token_id=7"),
        ("flux", encoder("text_encoder", eos_token_id=2), r"pools the token that ends .* \(eos_token_id=2"),
        ("flux", with_another_vocabulary, r"two vocabularies: vocab\.json numbers \d+ tokens otherwise"),
    ],
)
def test_what_is_refused(checkpoint, tmp_path, name, change, message):
    copy = shutil.copytree(checkpoint(name), tmp_path / "copy")
    check(copy, "a photo")
    change(copy)
    with pytest.raises(InputError, match=message) as caught:
        check(copy, "a photo")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["tokenizer_3", "text_encoder_3", "tokenizer", "text_encoder_2"])
def test_half_of_a_pair(checkpoint, tmp_path, missing):
    """Without T5's tokenizer alone, Stable Diffusion 3 would not be the model without T5."""
    copy = shutil.copytree(checkpoint("sd3"), tmp_path / "copy")
    reconfigure(copy / "model_index.json", **{missing: [None, None]})
    with pytest.raises(InputError, match=f"has no {missing}; save or download the whole pipeline"):
        check(copy)


def test_a_vocabulary_in_two_files(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint("flux"), tmp_path / "copy")
    vocabulary = json.loads((copy / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    (copy / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (copy / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    found = check(copy).tokenizers["tokenizer"]
    assert (
        found("a photo").input_ids == CLIPTokenizer.from_pretrained(copy / "tokenizer")("a photo").input_ids
    )


def test_a_vocabulary_of_sentencepiece(checkpoint, tmp_path):
    """spiece.model beside tokenizer.json is that of the same tokenizer, or it is refused."""
    import sentencepiece

    copy = shutil.copytree(checkpoint("pixart"), tmp_path / "copy")
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "spiece"), vocab_size=31, minloglevel=2
    )
    shutil.copy(tmp_path / "spiece.model", copy / "tokenizer")
    with pytest.raises(InputError, match=r"two vocabularies: spiece\.model numbers"):
        check(copy)


def test_added_tokens(checkpoint, tmp_path):
    """A tokenizer with a textual inversion serves every prompt that does not use it."""
    copy = shutil.copytree(checkpoint("pixart"), tmp_path / "copy")
    tokenizer = tiny_t5_tokenizer()
    tokenizer.add_tokens([f"<cat-{index}>" for index in range(10)])
    tokenizer.save_pretrained(copy / "tokenizer")
    check(copy, "a photo", "a <cat-1>")
    with pytest.raises(InputError, match=r"'<cat-8>' of the prompt is token 141 of tokenizer, .* 140 tokens"):
        check(copy, "a photo", "a <cat-8>")
    model = T5EncoderModel.from_pretrained(copy / "text_encoder")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(copy / "text_encoder")
    expected = T5Tokenizer.from_pretrained(copy / "tokenizer")("a <cat-8>").input_ids
    assert 141 in expected
    assert check(copy, "a <cat-8>").tokenizers["tokenizer"]("a <cat-8>").input_ids == expected
