"""A prompt that CLIP reads only the start of is encoded as diffusers does it, and that is said."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from transformers import T5Config, T5EncoderModel

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.exporter import export_bundle
from ditf.export.planning.conditions import encode, warnings_of
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import make_plan
from ditf.export.planning.save_prompt import save_prompt
from ditf.runtime.errors import InputError

LONG = "a photo of cats, " * 6


def encoded(folder, *prompts):
    options = ExportOptions(model=str(folder), prompt=prompts, size=(32, 32), conditioning="bank")
    plan = make_plan(options, Checkpoint(folder, str(folder)))
    with torch.no_grad():
        return encode(plan.entries, plan.family, plan.checkpoint, plan.guidance)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "pipeline_class", "arguments", "pooled"),
    [
        ("flux", FluxPipeline, {"prompt_2": None}, 1),
        ("sd3", StableDiffusion3Pipeline, {"prompt_2": None, "prompt_3": None}, 2),
    ],
)
def test_it_is_what_the_whole_pipeline_encodes(checkpoint, name, pipeline_class, arguments, pooled):
    long, short = encoded(checkpoint(name), LONG, "a photo")
    pipeline = pipeline_class.from_pretrained(checkpoint(name))
    made = pipeline.encode_prompt(LONG, device="cpu", **arguments)
    expected = {"prompt_embeds": made[0], "pooled_prompt_embeds": made[pooled]}
    for key, tensor in expected.items():
        torch.testing.assert_close(long.condition[key], tensor, rtol=1e-6, atol=1e-6)
    assert short.cut_text is None
    assert warnings_of([long, short]) == [f"warning: the prompt {LONG[:40]!r}...: {long.cut_text}"]
    assert long.to_json()["cut_text"] == long.cut_text
    assert long.cut_text.startswith("CLIP reads the first 77 of its ")
    assert "cut_text" not in short.to_json()


def test_where_only_clip_reads_the_prompt(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("sd3"), tmp_path / "two")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"tokens, CLIP reads 77; shorten it, .*--prompt-embeds"):
        encoded(folder, LONG)


class _Said(Exception):
    """Ends the work once it has been said."""


def test_it_is_said_before_the_work(checkpoint, tmp_path):
    def warn(line):
        raise _Said(line)

    options = ExportOptions(model=str(checkpoint("flux")), prompt=(LONG,), output=tmp_path / "bundle")
    with pytest.raises(
        _Said, match=r"^warning: the prompt 'a photo of cats, .* CLIP reads the first 77 of its \d+ tokens"
    ):
        export_bundle(options, warn=warn)
    with pytest.raises(_Said, match="CLIP reads the first 77"):
        save_prompt(options, tmp_path / "prompt.safetensors", warn)


def test_encoders_of_another_transformer(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("flux"), tmp_path / "copy")
    config = T5Config(vocab_size=140, d_model=16, d_ff=64, d_kv=8, num_layers=2, num_heads=4)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder_2")
    with pytest.raises(InputError, match="give prompt_embeds of 16 channels, its transformer takes 32"):
        encoded(folder, "a photo")
