"""Finding and reading checkpoints, and everything that can be wrong with one."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.opening import open_checkpoint
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import make_plan
from ditf.runtime.errors import DitfError, InputError, MissingComponent

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tiny_pixart, tmp_path):
    return shutil.copytree(tiny_pixart, tmp_path / "checkpoint")


def read_one(folder):
    with open_checkpoint(str(folder)) as checkpoint:
        return checkpoint.weights("transformer").tensor("pos_embed.proj.bias")


def test_sharded_weights_are_read(copy):
    folder = copy / "transformer"
    tensors = load_file(folder / WEIGHTS)
    expected = tensors["pos_embed.proj.bias"]
    (folder / WEIGHTS).unlink()
    index = {}
    for number, name in enumerate(sorted(tensors)):
        shard = f"model-{number % 2}.safetensors"
        index[name] = shard
    for shard in set(index.values()):
        save_file({n: t for n, t in tensors.items() if index[n] == shard}, folder / shard)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
    assert torch.equal(read_one(copy), expected)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks model-1\.safetensors"):
        read_one(copy)


def shards_of(folder):
    """Split a component's file in two shards with an index."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    path.unlink()
    index = {}
    for number, name in enumerate(sorted(tensors)):
        index[name] = f"{path.stem}-0000{1 + number % 2}-of-00002.safetensors"
    for shard in set(index.values()):
        save_file({n: t for n, t in tensors.items() if index[n] == shard}, folder / shard)
    (folder / f"{path.name}.index.json").write_text(json.dumps({"weight_map": index}))
    return sorted(set(index.values()))


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_damaged_shards_are_found_before_the_work(copy, component):
    """Each is opened, and no value read: the bytes that its header promises have to be there."""
    options = ExportOptions(model=str(copy), layer="2", size=(48, 80))
    _, second = shards_of(copy / component)
    path = copy / component / second
    whole = path.read_bytes()
    with open_checkpoint(str(copy)) as checkpoint:
        make_plan(options, checkpoint)
        path.write_bytes(whole[:-1])
        with pytest.raises(InputError, match=rf"{second} is not a readable safetensors .*; download"):
            make_plan(options, checkpoint)
        path.unlink()
        with pytest.raises(InputError, match=f"lacks {second}, which its index names; download"):
            make_plan(options, checkpoint)


def test_half_precision_weights_are_read_as_float32(copy):
    path = copy / "transformer" / WEIGHTS
    save_file({name: t.bfloat16() for name, t in load_file(path).items()}, path)
    assert read_one(copy).dtype == torch.float32


@pytest.mark.parametrize("suffix", ["bin", "pt", "ckpt"])
def test_pickle_weights_are_refused(copy, suffix):
    path = copy / "transformer" / WEIGHTS
    path.rename(path.with_name(f"diffusion_pytorch_model.{suffix}"))
    with pytest.raises(InputError, match="only pickle weights"):
        read_one(copy)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 100])
def test_corrupt_weights(copy, content):
    (copy / "transformer" / WEIGHTS).write_bytes(content)
    with pytest.raises(InputError, match="not a readable safetensors file"):
        read_one(copy)


def test_truncated_weights(copy):
    path = copy / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        read_one(copy)


def test_a_missing_tensor_is_named(copy):
    path = copy / "transformer" / WEIGHTS
    tensors = load_file(path)
    del tensors["pos_embed.proj.bias"]
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"no tensor pos_embed\.proj\.bias"):
        read_one(copy)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_broken_config(copy, text):
    (copy / "transformer" / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        read_one(copy)


def test_no_checkpoint(tmp_path):
    (tmp_path / "file").write_text("x")
    cases = {
        str(tmp_path): "not a diffusers checkpoint",
        str(tmp_path / "absent"): "no such directory",
        str(tmp_path / "file"): "is no file of weights",
        "not an id": "no such directory",
    }
    for model, message in cases.items():
        with pytest.raises(InputError, match=message), open_checkpoint(model):
            pass


def test_a_hub_id_without_network(monkeypatch):
    """Where there is no network the error says so; huggingface_hub's own offline switch is the proof."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DitfError, match="hub cannot be reached") as caught, open_checkpoint("some/model"):
        pass
    assert isinstance(caught.value, MissingComponent)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("component", ["text_encoder", "vae"])
def test_pickles_are_refused_in_every_component(copy, component, tmp_path):
    """from_pretrained is never allowed to fall back to a .bin beside."""
    from ditf.export.exporter import export_bundle
    from ditf.export.planning.export_options import ExportOptions

    (path,) = (copy / component).glob("*.safetensors")
    torch.save(load_file(path), path.with_suffix(".bin"))
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()
    with pytest.raises(InputError, match="has only pickle weights"):
        export_bundle(ExportOptions(model=str(copy), layer="0", output=tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("labels", [{"9" * 5000: "cat"}, {"one": "cat"}, ["cat"]])
def test_labels_that_are_no_table(copy, labels):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "id2label": labels}))
    with open_checkpoint(str(copy)) as checkpoint, pytest.raises(InputError, match="no table of classes"):
        checkpoint.class_names()


def test_a_config_with_a_byte_order_mark(tmp_path):
    """Some editors write one, and diffusers does not read it either."""
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_bytes(b"\xef\xbb\xbf{}")
    with pytest.raises(InputError, match="save it as UTF-8 without a byte-order mark"):
        Checkpoint(tmp_path, "here").config("transformer")
