"""Embeddings in a file: what is written is what is read, and what is refused."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditf.export.checkpoints.opening import open_checkpoint
from ditf.export.planning.conditions import encode
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import make_plan
from ditf.export.planning.save_prompt import save_prompt
from ditf.runtime.errors import InputError

TEXT = ["pixart", "sigma", "sd35", "flux", "schnell", "auraflow", "flux2", "lumina2"]


def encoded(folder, **options):
    options = ExportOptions(model=str(folder), layer="1", size=(48, 80), **options)
    with open_checkpoint(options.model, unneeded=options.unneeded) as checkpoint, torch.no_grad():
        plan = make_plan(options, checkpoint)
        return encode(plan.entries, plan.family, checkpoint, plan.guidance)


def without_encoders(folder, target):
    ignored = shutil.ignore_patterns("text_encoder*", "tokenizer*")
    return shutil.copytree(folder, target, ignore=ignored)


@pytest.mark.parametrize("name", TEXT)
def test_a_file_replaces_the_encoders(checkpoint, tmp_path, name):
    file = tmp_path / "cat.safetensors"
    folder = checkpoint(name)
    assert save_prompt(ExportOptions(model=str(folder), prompt="a cat"), file) == "a cat"
    (expected,) = encoded(folder, prompt="a cat")
    (given,) = encoded(without_encoders(folder, tmp_path / "bare"), prompt_embeds=file)
    assert (given.name, given.prompt, len(given.embeds)) == ("a cat", "a cat", 64)
    assert given.condition.keys() == expected.condition.keys()
    for key, tensor in expected.condition.items():
        assert torch.equal(given.condition[key], tensor), key
        assert given.condition[key].dtype == tensor.dtype, key
    assert given.to_json()["prompt_embeds"] == given.embeds
    assert "prompt_embeds" not in expected.to_json()


def test_a_checkpoint_without_encoders_asks_for_them(checkpoint, tmp_path):
    bare = without_encoders(checkpoint("flux"), tmp_path / "bare")
    with pytest.raises(InputError, match="names text_encoder, which is not there"):
        encoded(bare)


@pytest.fixture
def cat(checkpoint, tmp_path):
    """A file of the tiny PixArt, and a function that writes it changed."""
    file = tmp_path / "cat.safetensors"
    save_prompt(ExportOptions(model=str(checkpoint("pixart")), prompt="a cat"), file)

    def changed(**tensors):
        kept = {**load_file(file), **tensors}
        save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, file)
        return file

    return changed


MASK = torch.tensor([[1, 0, 1]])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"prompt_embeds": None}, "lacks prompt_embeds; pixart takes"),
        ({"prompt_attention_mask": None}, "lacks prompt_attention_mask"),
        ({"pooled": torch.zeros(1)}, "has an unknown pooled; pixart takes prompt_embeds"),
        ({"prompt_embeds": torch.zeros(120, 32)}, r"prompt_embeds .* is \[120, 32\]"),
        ({"prompt_embeds": torch.zeros(1, 0, 32)}, "1 to 300 tokens"),
        ({"prompt_embeds": torch.zeros(1, 301, 32)}, "1 to 300 tokens"),
        ({"prompt_embeds": torch.zeros(2, 120, 32)}, "prompt_embeds .* not"),
        ({"prompt_embeds": torch.zeros(1, 120, 31)}, r"is \[1, 120, 31\], not \[1, 120, 32\]"),
        ({"prompt_embeds": torch.zeros(1, 119, 32)}, "prompt_attention_mask .* not"),
        ({"prompt_embeds": torch.full((1, 120, 32), float("nan"))}, "holds NaN"),
        ({"prompt_embeds": torch.zeros(1, 120, 32, dtype=torch.int64)}, "is int64"),
        ({"prompt_attention_mask": torch.zeros(1, 120)}, "is float32"),
        ({"prompt_attention_mask": torch.zeros(1, 120, dtype=torch.int64)}, "not ones and then zeros"),
        (
            {"prompt_embeds": torch.zeros(1, 3, 32), "prompt_attention_mask": MASK},
            "not ones and then zeros",
        ),
    ],
    ids=str,
)
def test_files_that_are_refused(checkpoint, cat, tensors, message):
    with pytest.raises(InputError, match=message) as caught:
        encoded(checkpoint("pixart"), prompt_embeds=cat(**tensors))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"\xff" * 100])
def test_files_that_are_no_safetensors(checkpoint, tmp_path, content):
    file = tmp_path / "x.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=r"no (readable safetensors|such) file.*--save-prompt-embeds"):
        encoded(checkpoint("pixart"), prompt_embeds=file)


@pytest.mark.parametrize("options", [{"prompt": "a dog"}, {"prompts": "prompts.txt"}, {"class_label": 1}])
def test_a_prompt_beside_a_file(checkpoint, cat, options):
    with pytest.raises(InputError, match="the file says which one it is of"):
        encoded(checkpoint("pixart"), prompt_embeds=cat(), **options)


def test_models_that_read_no_text(checkpoint, cat, tmp_path):
    with pytest.raises(InputError, match="dit reads no text; leave --prompt-embeds out"):
        encoded(checkpoint("dit"), prompt_embeds=cat())
    with pytest.raises(InputError, match="dit reads no text; leave --save-prompt-embeds out"):
        save_prompt(ExportOptions(model=str(checkpoint("dit"))), tmp_path / "x")


def test_one_prompt_to_a_file(checkpoint, tmp_path):
    options = ExportOptions(model=str(checkpoint("pixart")), prompt=("a cat", "a dog"), conditioning="bank")
    with pytest.raises(InputError, match="one prompt to a file"):
        save_prompt(options, tmp_path / "x")


def test_files_of_a_bank_and_names(checkpoint, cat, tmp_path):
    """A file that does not say its prompt gives its own name; the type of what it holds is not kept."""
    first = cat()
    second = tmp_path / "bird.safetensors"
    tensors = load_file(first)
    save_file({**tensors, "prompt_embeds": tensors["prompt_embeds"].half()}, second)
    made = encoded(
        checkpoint("pixart"), prompt_embeds=(first, second), conditioning="bank", timestep=(10, 20)
    )
    assert [entry.name for entry in made] == ["cat@10", "cat@20", "bird@10", "bird@20"]
    assert {entry.condition["prompt_embeds"].dtype for entry in made} == {torch.float32}


def test_fifos_and_files_too_large_are_refused(checkpoint, tmp_path):
    file = tmp_path / "cat.safetensors"
    os.mkfifo(file)
    with pytest.raises(InputError, match="it is a FIFO, not a regular file"):
        encoded(checkpoint("pixart"), prompt_embeds=file)
    file.unlink()
    with file.open("wb") as opened:
        opened.truncate(8 << 30)
    with pytest.raises(InputError, match="it has 8,589,934,592 bytes"):
        encoded(checkpoint("pixart"), prompt_embeds=file)
