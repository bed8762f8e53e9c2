"""Prompts, classes and timesteps of an export: what they are called and what is refused."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from diffusers import Flux2KleinPipeline, Lumina2Pipeline, ZImagePipeline

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.families import family_of
from ditf.export.planning.conditions import encode, plan_entries, read_prompts, trim
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import make_plan
from ditf.runtime.errors import InputError
from tests.checkpoint_parts import tiny_t5_tokenizer


def entries(folder, **options):
    checkpoint = Checkpoint(folder, str(folder))
    family = family_of(checkpoint)
    return plan_entries(ExportOptions(model=str(folder), **options), checkpoint, family, family.defaults)


def encoded(folder, **options):
    checkpoint = Checkpoint(folder, str(folder))
    plan = make_plan(ExportOptions(model=str(folder), size=(64, 64), **options), checkpoint)
    with torch.no_grad():
        return encode(plan.entries, plan.family, checkpoint, plan.guidance), plan


def test_the_default_is_one_entry(checkpoint):
    (entry,) = entries(checkpoint("pixart"))
    assert (entry.name, entry.prompt, entry.timestep) == ("a photo", "a photo", 261)
    (entry,) = entries(checkpoint("dit"))
    assert (entry.name, entry.prompt, entry.class_label) == ("null", None, None)


def test_prompts_times_timesteps(checkpoint):
    made = entries(checkpoint("flux"), conditioning="bank", prompt=("a cat", "a dog"), timestep=(90, 260))
    assert [entry.name for entry in made] == ["a cat@90", "a cat@260", "a dog@90", "a dog@260"]
    assert [entry.timestep for entry in made] == [90, 260, 90, 260]


def test_a_file_of_prompts(tmp_path, checkpoint):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff# animals\n\ncat: a photo: of a cat\n  dog :  a dog\n")
    assert read_prompts(file) == [("cat", "a photo: of a cat"), ("dog", "a dog")]
    made = entries(checkpoint("pixart"), conditioning="bank", prompts=file, prompt="a bird")
    assert [entry.name for entry in made] == ["a bird", "cat", "dog"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt"),
        (b"# only a comment\n", "holds no prompt"),
        (b"cat: a cat\na dog\n", "line 2 is not 'name: prompt': 'a dog'"),
        (b": a cat\n", "line 1 is not"),
        (b"cat:\n", "line 1 is not"),
        (b"cat: a cat\n" * 200_000, "2,200,000 bytes, more than"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_bad_files_of_prompts(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path / "absent.txt")


def test_class_labels_by_number_and_name(checkpoint):
    made = entries(checkpoint("dit"), conditioning="bank", class_label=("7", "Tinca tinca"))
    assert [entry.class_label for entry in made] == [7, 0]
    assert [entry.name for entry in made] == ["7", "Tinca tinca"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dit", {"prompt": "a cat"}, "class-conditional and takes no prompt; use --class-label"),
        ("sd3", {"class_label": "3"}, "text-conditional and takes no class label; use --prompt"),
        ("dit", {"class_label": "11"}, r"class label 11 is out of range; choose 0\.\.10"),
        ("dit", {"class_label": "poodle"}, "no class is called 'poodle'; this checkpoint has 3 names"),
        ("pixart", {"prompt": ("a", "b")}, "2 conditions cannot be baked into one graph; add --cond"),
        ("pixart", {"prompt": ("a", "a"), "conditioning": "bank"}, "two conditions are called 'a'"),
        ("pixart", {"timestep": (5, 5), "conditioning": "bank"}, "two conditions are called 'a photo@5'"),
    ],
)
def test_what_is_refused(checkpoint, name, options, message):
    with pytest.raises(InputError, match=message):
        entries(checkpoint(name), **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pixart", {"prompt": "a" * 120}, "tokens, T5 reads 120; shorten it, .*--prompt-embeds"),
        ("sd3", {"prompt": "a" * 256}, "tokens, T5 reads 256"),
        ("schnell", {"prompt": "a" * 256}, "tokens, T5 reads 256"),
        ("flux", {"prompt": "a" * 512}, "tokens, T5 reads 512"),
        ("flux2", {"prompt": "a" * 520}, "tokens in its template, Qwen3 reads 512"),
        ("chroma", {"prompt": "a" * 512}, "tokens, T5 reads 512"),
        ("zimage", {"prompt": "a" * 512}, "tokens in its template, Qwen3 reads 512"),
        ("lumina2", {"prompt": "a" * 100}, "tokens, Gemma 2, with the system prompt, reads 256"),
    ],
)
def test_what_the_encoders_refuse(checkpoint, name, options, message):
    with pytest.raises(InputError, match=message):
        encoded(checkpoint(name), **options)


def test_the_longest_prompt_that_fits(checkpoint):
    made, _ = encoded(checkpoint("sigma"), prompt="a" * 298)  # and the marks of begin and end
    assert made[0].condition["prompt_attention_mask"].sum() == 300


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pixart", {"guidance": 3.5}, "takes no guidance"),
        ("schnell", {"guidance": 3.5}, "takes no guidance"),
        ("dit", {"text_tokens": 8}, "reads no text"),
        (
            "zimage",
            {"text_tokens": 33, "size": (64, 64)},
            "zimage pads its text to multiples of 32; the next is 64",
        ),
        ("sd3", {"size": (256, 256)}, "beyond this model's position embedding; choose at most 192x192"),
        ("sd3", {"discard": "published"}, "no massive channels are published for this sd3"),
        ("flux", {"timestep": 1000}, "timestep 1000 is out of range"),
    ],
)
def test_what_a_family_does_not_have(checkpoint, name, options, message):
    folder = checkpoint(name)
    with pytest.raises(InputError, match=message):
        make_plan(ExportOptions(model=str(folder), **options), Checkpoint(folder, "x"))


def test_masked_text_is_dropped_as_far_as_no_prompt_needs_it(checkpoint):
    made, plan = encoded(checkpoint("pixart"), conditioning="bank", prompt=("cat", "a longer prompt"))
    counts = [plan.family.text_tokens(entry.condition) for entry in made]
    assert counts[0] < counts[1] < 120
    for entry in trim(made, plan.family):
        assert entry.condition["prompt_embeds"].shape[1] == counts[1]
    for entry in trim(made, plan.family, live=True):
        assert entry.condition["prompt_embeds"].shape[1] == 120


@pytest.mark.parametrize(
    ("name", "tokens", "kept"), [("flux", 64, 64), ("sd3", 16, 93), ("pixart", 4, 4), ("zimage", 4, 32)]
)
def test_text_tokens_are_t5s(checkpoint, name, tokens, kept):
    made, plan = encoded(checkpoint(name), prompt="a longer prompt")
    (entry,) = trim(made, plan.family, tokens=tokens)
    assert plan.family.text_length(entry.condition) == kept


def test_guidance_reaches_the_condition(checkpoint):
    made, _ = encoded(checkpoint("flux"), guidance=2.0)
    assert made[0].condition["guidance"] == 2.0
    made, _ = encoded(checkpoint("flux"))
    assert made[0].condition["guidance"] == 3.5
    made, _ = encoded(checkpoint("schnell"))
    assert "guidance" not in made[0].condition
    assert made[0].condition["prompt_embeds"].shape[1] == 256


def test_lumina2_reads_what_its_whole_pipeline_encodes(checkpoint):
    """System prompt, layer and mask are the pipeline's; that of the tests is loaded with all of its parts."""
    made, _ = encoded(checkpoint("lumina2"), prompt="the head of a dog")
    pipeline = Lumina2Pipeline.from_pretrained(checkpoint("lumina2"))
    with torch.no_grad():
        embeds, mask, _, _ = pipeline.encode_prompt("the head of a dog", do_classifier_free_guidance=False)
    torch.testing.assert_close(made[0].condition["prompt_embeds"], embeds, rtol=0, atol=0)
    torch.testing.assert_close(made[0].condition["prompt_attention_mask"], mask, rtol=0, atol=0)
    assert embeds.shape[1] == 256 > mask.sum() > 150  # the system prompt is spelled


def test_flux2_reads_what_its_whole_pipeline_encodes(checkpoint):
    made, _ = encoded(checkpoint("flux2"), prompt="the head of a dog")
    pipeline = Flux2KleinPipeline.from_pretrained(checkpoint("flux2"))
    with torch.no_grad():
        embeds, _ = pipeline.encode_prompt("the head of a dog")
    torch.testing.assert_close(made[0].condition["prompt_embeds"], embeds, rtol=0, atol=0)
    assert embeds.shape == (1, 512, 48)  # three layers, padding too


def test_zimage_reads_what_its_whole_pipeline_encodes(checkpoint):
    """Unpadded, of its own length: what is behind it is for the shapes of the graphs alone."""
    made, plan = encoded(checkpoint("zimage"), prompt="the head of a dog")
    pipeline = ZImagePipeline.from_pretrained(checkpoint("zimage"))
    with torch.no_grad():
        (embeds,), _ = pipeline.encode_prompt("the head of a dog", do_classifier_free_guidance=False)
    condition = made[0].condition
    own = condition["prompt_attention_mask"].sum()
    torch.testing.assert_close(condition["prompt_embeds"][0, :own], embeds, rtol=0, atol=0)
    assert condition["prompt_embeds"].shape == (1, 512, 16)
    assert plan.family.text_tokens(condition) == 64 > own > 32  # padded with learned tokens, to be read


def test_chroma_with_masked_padding_reads_one_token_of_it(checkpoint):
    """And no more of it, which its pipeline means with a mask that its attention takes for a bias."""
    made, plan = encoded(checkpoint("chroma"), prompt="a dog", text_padding="masked")
    condition = made[0].condition
    assert condition["prompt_embeds"].shape == (1, 512, 32)
    own = len(tiny_t5_tokenizer()("a dog").input_ids)
    assert condition["prompt_attention_mask"].sum() == own + 1 == plan.family.text_tokens(condition)
    inputs = plan.family.reference_inputs(condition, 260, plan.size, plan.grid, 2)
    assert inputs["encoder_hidden_states"].shape == (2, own + 1, 32)
    assert inputs["attention_mask"] is None


def test_chroma_reads_all_padding_by_default(checkpoint):
    made, plan = encoded(checkpoint("chroma"), prompt="a dog")
    assert plan.family.text_tokens(made[0].condition) == 512


def test_another_family_has_one_way_to_read_its_padding(checkpoint):
    with pytest.raises(InputError, match="--text-padding masked: flux reads its text in one way"):
        encoded(checkpoint("flux"), text_padding="masked")


def test_another_zimage_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("zimage"), tmp_path / "omni")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "siglip_feat_dim": 8}))
    with pytest.raises(InputError, match="zimage with siglip_feat_dim=8 is not supported"):
        encoded(folder)


def test_the_text_of_another_flux2_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("flux2"), tmp_path / "dev")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "Flux2Pipeline"}))
    with pytest.raises(InputError, match="is a Flux2Pipeline, whose text is not supported; use a Flux2Klein"):
        encoded(folder)


def test_a_fifo_of_prompts_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "prompts.txt")
    with pytest.raises(InputError, match="it is a FIFO, not a regular file"):
        read_prompts(tmp_path / "prompts.txt")
