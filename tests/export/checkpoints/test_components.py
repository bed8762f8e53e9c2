"""A checkpoint brings weights and settings: no class that is not supported, no code, and plain files only."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys

import pytest

from ditf.export.checkpoints.components import check_components, check_files
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.families import FAMILIES, family_of
from ditf.export.planning.conditions import encode
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import make_plan
from ditf.runtime.errors import InputError
from tests.checkpoints import SAVE


@pytest.fixture
def copy(tiny_pixart, tmp_path):
    return shutil.copytree(tiny_pixart, tmp_path / "checkpoint")


def change(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def encode_default(folder):
    plan = make_plan(ExportOptions(model=str(folder)), Checkpoint(folder, "it"))
    return encode(plan.entries, plan.family, plan.checkpoint, None)


def evil(folder, name):
    """A module that leaves a file behind when it is imported, and what imports it by transformers' rules."""
    mark = folder.parent / "ran"
    (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\n")
    return mark


@pytest.mark.parametrize("class_name", ["AutoModel", "T5EncoderModel"])
def test_code_of_a_text_encoder_never_runs_whatever_the_terminal_says(copy, monkeypatch, class_name):
    mark = evil(copy / "text_encoder", "modeling_evil")
    change(copy / "model_index.json", text_encoder=["transformers", class_name])
    names = {"AutoConfig": "modeling_evil.Evil", "AutoModel": "modeling_evil.Evil"}
    change(copy / "text_encoder" / "config.json", model_type="evil", auto_map=names)
    terminal = io.StringIO("y\n" * 9)
    monkeypatch.setattr(sys, "stdin", terminal)
    with pytest.raises(InputError, match=r"which is not supported|names code to run: auto_map"):
        encode_default(copy)
    assert not mark.exists()
    assert terminal.tell() == 0


@pytest.mark.parametrize("class_name", ["AutoTokenizer", "T5Tokenizer"])
def test_code_of_a_tokenizer_never_runs(copy, monkeypatch, class_name):
    mark = evil(copy / "tokenizer", "tokenization_evil")
    change(copy / "model_index.json", tokenizer=["transformers", class_name])
    names = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    change(copy / "tokenizer" / "tokenizer_config.json", tokenizer_class="Evil", auto_map=names)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(InputError, match=r"which is not supported|names code to run: auto_map"):
        encode_default(copy)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("component", "entry"),
    [
        ("tokenizer", ["evil", "Evil"]),
        ("tokenizer", ["antigravity", "x"]),
        ("tokenizer", ["diffusers", "AutoencoderKL"]),
        ("text_encoder", ["os", "system"]),
        ("text_encoder", ["transformers", "pipeline"]),
        ("text_encoder", ["transformers", "\x1b[2J"]),
        ("scheduler", ["subprocess", "Popen"]),
        ("scheduler", ["diffusers", {}]),
        ("vae", ["a", "b", "c"]),
        ("text_encoder", "T5EncoderModel"),
        ("tokenizer", {}),
        ("anything", ["evil", "Evil"]),
        ("_class_name", ["pipeline", "Evil"]),
    ],
    ids=str,
)
def test_other_classes_are_refused_by_name(copy, component, entry):
    """Before anything is imported: no module is new afterwards."""
    change(copy / "model_index.json", **{component: entry})
    checkpoint = Checkpoint(copy, "it")
    classes = family_of(checkpoint).text_classes
    before = set(sys.modules)
    with pytest.raises(InputError) as caught:
        check_components(checkpoint, classes)
    assert set(sys.modules) == before
    assert "\x1b" not in str(caught.value)
    assert component in str(caught.value) or "pipeline of its own" in str(caught.value)


def test_what_is_not_loaded_may_be_of_any_class(copy):
    change(copy / "model_index.json", text_encoder=["elsewhere", "Encoder"])
    check_components(Checkpoint(copy, "it"), (), ("text_encoder", "tokenizer"))


@pytest.mark.parametrize("name", sorted(SAVE))
def test_checkpoints_as_pipelines_save_them_pass(checkpoint, name):
    folder = checkpoint(name)
    check_components(Checkpoint(folder, name), family_of(Checkpoint(folder, name)).text_classes)
    for component in ("transformer", "vae"):
        check_files(folder / component)


def test_every_class_that_may_be_named_exists():
    import diffusers
    import transformers

    for family in FAMILIES:
        assert all(hasattr(transformers, name) for name in family.text_classes)
        assert all(hasattr(diffusers, name) for name in family.pipelines)
        assert bool(family.pipelines) == bool(family.text_classes) == family.takes_prompt


@pytest.mark.parametrize(
    "entry",
    [
        {"auto_map": {"AutoModel": "m.E"}},
        {"vision": {"text": [{"trust_remote_code": True}]}},
        {"_attn_implementation_internal": "someone/kernels"},
        {"attn_implementation": "someone/kernels:f"},
    ],
    ids=str,
)
def test_settings_that_name_code_are_refused(copy, entry):
    change(copy / "text_encoder" / "config.json", **entry)
    with pytest.raises(InputError, match=r"text_encoder/config\.json names code to run"):
        encode_default(copy)


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder/generation_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/additional_chat_templates/x.jinja",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_fifos_are_refused_and_not_waited_for(copy, name):
    (copy / name).unlink(missing_ok=True)
    (copy / name).parent.mkdir(exist_ok=True)
    os.mkfifo(copy / name)
    with pytest.raises(InputError, match="it is a FIFO, not a regular file"):
        encode_default(copy)


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json", "tokenizer/tokenizer.json"])
def test_sizes_are_looked_at_before_reading(copy, name):
    """A sparse file: whoever reads it takes 8 GB."""
    with (copy / name).open("wb") as file:
        file.truncate(8 << 30)
    with pytest.raises(InputError, match=r"it has 8,589,934,592 bytes, more than"):
        encode_default(copy)


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "transformer/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer_config.json",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
    ],
)
def test_deep_json_is_bad_input(copy, name):
    (copy / name).write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(InputError, match=r"nested too deeply|is not a shard index"):
        encode_default(copy)


def test_other_files_are_none_of_its_business(copy):
    """A clone holds large packs, and a VAE's repository pictures."""
    (copy / "vae" / ".git").mkdir()
    for name in (".git/pack", "example.png", "diffusion_pytorch_model.bin"):
        with (copy / "vae" / name).open("wb") as file:
            file.truncate(8 << 30)
    check_files(copy / "vae")


@pytest.mark.parametrize(
    ("component", "key"), [("text_encoder", "num_layers"), ("vae", "layers_per_block")], ids=str
)
def test_more_layers_than_any_model_has(copy, component, key):
    """Making such a model would not end."""
    change(copy / component / "config.json", **{key: 10**8})
    with pytest.raises(InputError, match=f"{key}=100000000; take the published config"):
        make_plan(ExportOptions(model=str(copy)), Checkpoint(copy, "it"))
