"""Which of several weight files is read: the one that `from_pretrained` of the component's library reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.weight_files import variant_of, weight_files
from ditf.runtime.errors import InputError

NAMES = {"transformer": "diffusion_pytorch_model", "text_encoder": "model"}
CLASSES = {"transformer": PixArtTransformer2DModel, "text_encoder": T5EncoderModel}
PROBE = {"transformer": "proj_out.bias", "text_encoder": "encoder.final_layer_norm.weight"}


@pytest.fixture
def copy(tiny_pixart, tmp_path):
    return shutil.copytree(tiny_pixart, tmp_path / "checkpoint")


def add_shards(folder, stem, factor, variant=""):
    """An index and two shards beside a single file, with other values."""
    tensors = load_file(folder / f"{stem}.safetensors")
    halves = {name: f"{stem}{variant}-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for shard in set(halves.values()):
        save_file(
            {n: factor * t for n, t in tensors.items() if halves[n] == shard},
            folder / shard,
            {"format": "pt"},
        )
    index = folder / f"{stem}.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": halves}))


def judged(copy, part, variant=None):
    model = CLASSES[part].from_pretrained(copy / part, use_safetensors=True, variant=variant)
    return model.state_dict()[PROBE[part]]


@pytest.mark.parametrize("part", NAMES)
@pytest.mark.parametrize("case", ["index beside a file", "another file beside", "a variant's shards beside"])
def test_the_choice_is_that_of_from_pretrained(copy, part, case):
    folder, stem = copy / part, NAMES[part]
    tensors = load_file(folder / f"{stem}.safetensors")
    if case == "index beside a file":
        add_shards(folder, stem, 3)
    elif case == "another file beside":
        for other in ("a", "zz", *NAMES.values()):
            if other != stem:
                save_file({n: 5 * t for n, t in tensors.items()}, folder / f"{other}.safetensors")
    else:
        add_shards(folder, stem, 7, ".fp16")
    found = Checkpoint(copy, "").weights(part).tensor(PROBE[part])
    assert torch.equal(found, judged(copy, part))
    if case == "a variant's shards beside":
        found = Checkpoint(copy, "", variant="fp16").weights(part).tensor(PROBE[part])
        assert torch.equal(found, judged(copy, part, "fp16"))
        assert torch.equal(found, 7 * tensors[PROBE[part]])


def test_two_files_that_no_library_reads_are_refused(copy):
    folder = copy / "transformer"
    own = folder / "diffusion_pytorch_model.safetensors"
    shutil.copy(own, folder / "first.safetensors")
    assert weight_files(folder) == [own]
    own.rename(folder / "second.safetensors")
    message = (
        r"has first\.safetensors and second\.safetensors.*; leave one there, named diffusion_pytorch_model\."
    )
    with pytest.raises(InputError, match=message):
        weight_files(folder)
    (folder / "first.safetensors").unlink()
    assert weight_files(folder) == [folder / "second.safetensors"]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("diffusion_pytorch_model.safetensors.incomplete", "has not finished; run the download again"),
        ("flux1-dev-Q8_0.gguf", r"but flux1-dev-Q8_0\.gguf; pass that file with --transformer"),
        (
            "diffusion_pytorch_model-00001-of-00002.safetensors",
            r"shards but no index; download its \.safetensors\.index",
        ),
        ("diffusion_pytorch_model.bin", "only pickle weights.*safe_serialization"),
        ("README.md", "has no safetensors weights; download or save them"),
    ],
)
def test_what_helps_where_there_are_no_weights(tmp_path, file, message):
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(InputError, match=message):
        weight_files(tmp_path)


def test_a_config_that_names_the_file(copy):
    """transformers reads the named one, and no other program does."""
    folder = copy / "text_encoder"
    other = {name: 9 * tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(other, folder / "other.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    assert torch.equal(judged(copy, "text_encoder"), other[PROBE["text_encoder"]])
    with pytest.raises(
        InputError, match=r"names the file of weights, 'other\.safetensors'; rename that file"
    ):
        weight_files(folder)


def test_variants():
    names = {
        "model.safetensors": None,
        "model.fp16.safetensors": "fp16",
        "model-00001-of-00002.safetensors": None,
        "model-00001-of-00002.fp16.safetensors": "fp16",
        "model.fp16-00001-of-00002.safetensors": "fp16",
        "model.safetensors.index.json": None,
        "model.safetensors.index.fp16.json": "fp16",
        "model.safetensors.fp16.index.json": "fp16",
        "model.fp16.safetensors.index.json": "fp16",
    }

    assert {name: variant_of(Path(name)) for name in names} == names
