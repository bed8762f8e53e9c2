"""Text encoders are those that plain `from_pretrained` loads whole, or they are refused before any work."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ditf.export.checkpoints import offload
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.text.encoders import check_encoder
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import make_plan
from ditf.runtime.errors import InputError

T5, CLIP, CLIP_WITH = "T5EncoderModel", "CLIPTextModel", "CLIPTextModelWithProjection"
IDS = torch.tensor([[3, 5, 9, 7, 8, 4, 6, 1]])


def found(folder, kind, name="text_encoder"):
    return check_encoder(Checkpoint(folder, "x"), name, getattr(transformers, kind))


def changed(folder, target, change, name="text_encoder"):
    copy = shutil.copytree(folder, target)
    path = copy / name / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, {"format": "pt"})
    return copy


def without(part):
    def change(tensors):
        dropped = [name for name in tensors if part in name]
        assert dropped
        for name in dropped:
            del tensors[name]

    return change


def renamed(pattern):
    def change(tensors):
        for name in list(tensors):
            tensors[pattern.format(name)] = tensors.pop(name)

    return change


def with_tensor(name, shape=(4, 4), dtype=torch.float32):
    return lambda tensors: tensors.update({name: torch.ones(shape, dtype=dtype)})


QUERY = "encoder.block.0.layer.0.SelfAttention.q"


def with_lora(tensors):
    tensors[f"{QUERY}.base_layer.weight"] = tensors.pop(f"{QUERY}.weight")
    tensors[f"{QUERY}.lora_A.default.weight"] = torch.randn(2, 32)
    tensors[f"{QUERY}.lora_B.default.weight"] = torch.randn(32, 2)


def as_int8(tensors):
    tensors[f"{QUERY}.weight"] = (tensors[f"{QUERY}.weight"] * 10).to(torch.int8)


def of_another_shape(tensors):
    tensors[f"{QUERY}.weight"] = tensors[f"{QUERY}.weight"][:16]


@pytest.mark.parametrize(
    ("name", "kind", "change", "message"),
    [
        ("pixart", T5, without("block.1."), r"lack encoder\.block\.1\..*--prompt-embeds"),
        ("pixart", T5, without("shared"), r"lack (encoder\.embed_tokens|shared)\.weight"),
        ("pixart", T5, with_lora, r"an adapter.*q\.base_layer\.weight; merge it"),
        ("pixart", T5, with_tensor("decoder.block.0.layer.0.lora_A.weight"), "an adapter"),
        ("pixart", T5, renamed("text_model_{}"), r"lack encoder\..* and have text_model_encoder\."),
        ("pixart", T5, with_tensor("encoder.block.7.layer.1.layer_norm.weight"), r"have encoder\.block\.7\."),
        ("pixart", T5, with_tensor(f"{QUERY}.scale"), r"q\.scale"),
        ("pixart", T5, as_int8, r"q\.weight of .*text_encoder.* stored as I8"),
        ("pixart", T5, of_another_shape, r"q\.weight of text_encoder .* is \[16, 32\], .* says \[32, 32\]"),
        ("flux", CLIP, without("final_layer_norm"), r"lack final_layer_norm\.bias"),
        ("flux", CLIP, with_tensor("encoder.layers.2.mlp.fc1.bias"), r"have encoder\.layers\.2\."),
        ("sd3", CLIP_WITH, without("text_projection"), r"lack text_projection\.weight"),
        ("lumina2", "Gemma2Model", without("post_attention"), r"lack layers\.0\.post_attention_layernorm"),
        ("zimage", "Qwen3ForCausalLM", without("k_norm"), r"lack model\.layers\.0\.self_attn\.k_norm"),
        ("auraflow", "UMT5EncoderModel", without("block.1.layer.0"), r"lack encoder\.block\.1\.layer\.0\."),
    ],
)
def test_what_is_refused(checkpoint, tmp_path, name, kind, change, message):
    """transformers itself fills what is missing with random values and goes on."""
    copy = changed(checkpoint(name), tmp_path / "copy", change)
    with pytest.raises(InputError, match=message) as caught:
        found(copy, kind)
    assert "\n" not in str(caught.value)


def test_an_adapter_beside_the_weights(checkpoint, tmp_path):
    """As PEFT saves it: transformers loads it on top, without a word."""
    copy = shutil.copytree(checkpoint("pixart"), tmp_path / "copy")
    (copy / "text_encoder" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match=r"has adapter_config\.json.*merge_and_unload"):
        found(copy, T5)


def test_it_is_refused_when_an_export_is_planned(checkpoint, tmp_path):
    copy = changed(checkpoint("flux"), tmp_path / "copy", without("block.1."), "text_encoder_2")
    options = {"model": str(copy), "size": (32, 32)}
    with pytest.raises(InputError, match=r"text_encoder_2 \(T5EncoderModel\) lack encoder\.block\.1\."):
        make_plan(ExportOptions(**options), Checkpoint(copy, "x"))


def test_two_values_of_one_tensor(checkpoint, tmp_path):
    """Earlier versions of transformers take `shared.weight`, and version 5 the other."""

    def double(factor):
        return lambda tensors: tensors.update(
            {"encoder.embed_tokens.weight": tensors["shared.weight"] * factor}
        )

    same = found(changed(checkpoint("pixart"), tmp_path / "same", double(1.0)), T5)
    assert same.weights.read == set()
    assert_plain(same, checkpoint("pixart"))
    other = found(changed(checkpoint("pixart"), tmp_path / "other", double(3.0)), T5)
    with pytest.raises(InputError, match=r"hold shared\.weight and encoder\.embed_tokens\.weight with diff"):
        other.load()


def plain(folder, kind, name="text_encoder"):
    """The model that transformers loads, with nothing missing."""
    model, report = getattr(transformers, kind).from_pretrained(
        folder / name, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    return model.eval()


@torch.no_grad()
def assert_plain(encoder, folder, name="text_encoder"):
    expected = plain(folder, encoder.encoder_class.__name__, name)(IDS, output_hidden_states=True)
    actual = encoder.load()(IDS, output_hidden_states=True)
    pooled = [name for name in ("text_embeds", "pooler_output") if name in expected]
    actual, expected = ((*outputs.hidden_states, *map(outputs.get, pooled)) for outputs in (actual, expected))
    # Not bit by bit: the address of a weight can change the last bit of a product.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("resident", [1 << 30, 0])
@pytest.mark.parametrize(
    ("name", "kind", "change"),
    [
        ("pixart", T5, lambda tensors: None),
        ("sd3", CLIP_WITH, lambda tensors: None),
        ("flux", CLIP, lambda tensors: None),
        ("auraflow", "UMT5EncoderModel", lambda tensors: None),
        ("lumina2", "Gemma2Model", lambda tensors: None),
        ("zimage", "Qwen3ForCausalLM", lambda tensors: None),
        # as other versions and other classes save them
        ("pixart", T5, lambda t: t.update({"encoder.embed_tokens.weight": t.pop("shared.weight")})),
        (
            "pixart",
            T5,
            lambda t: t.update({"lm_head.weight": t["shared.weight"] + 1, f"decoder.{QUERY}": IDS}),
        ),
        ("auraflow", "UMT5EncoderModel", with_tensor("decoder.block.0.layer.0.SelfAttention.q.weight")),
        ("flux", CLIP, renamed("text_model.{}")),
        ("flux", CLIP, with_tensor("text_projection.weight")),
        ("sd3", CLIP_WITH, lambda t: t.update({"text_model.embeddings.position_ids": IDS})),
        ("lumina2", "Gemma2Model", renamed("model.{}")),
        ("lumina2", "Gemma2Model", with_tensor("vision_tower.encoder.layers.0.mlp.fc1.bias")),
    ],
)
def test_what_is_loaded(checkpoint, tmp_path, monkeypatch, name, kind, change, resident):
    monkeypatch.setattr(offload, "RESIDENT", resident)
    encoder = found(changed(checkpoint(name), tmp_path / "copy", change), kind)
    assert encoder.weights.read == set()
    assert_plain(encoder, checkpoint(name))


def test_no_quantiser_runs(checkpoint, tmp_path):
    """The weights of a checkpoint are dequantised before they get here, so that no quantiser is imported."""
    copy = shutil.copytree(checkpoint("pixart"), tmp_path / "copy")
    path = copy / "text_encoder" / "config.json"
    quantised = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantised}))
    assert_plain(found(copy, T5), checkpoint("pixart"))


@pytest.mark.parametrize("resident", [1 << 30, 0])
@pytest.mark.parametrize("change", [without("lm_head"), lambda t: t["lm_head.weight"].add_(1)])
def test_a_head_that_is_tied(checkpoint, tmp_path, monkeypatch, change, resident):
    """Qwen3-4B is saved without its head. One of other values is not read by any pipeline."""
    monkeypatch.setattr(offload, "RESIDENT", resident)
    copy = changed(checkpoint("zimage"), tmp_path / "copy", change)
    path = copy / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    assert_plain(found(copy, "Qwen3ForCausalLM"), checkpoint("zimage"))


@pytest.mark.parametrize("resident", [1 << 30, 0])
@pytest.mark.parametrize(("name", "kind"), [("pixart", T5), ("auraflow", "UMT5EncoderModel")])
def test_an_embedding_whose_config_ties_nothing(checkpoint, tmp_path, monkeypatch, name, kind, resident):
    """As T5-XXL's of FLUX is saved; versions of transformers left it random (transformers 43880, 43992)."""
    monkeypatch.setattr(offload, "RESIDENT", resident)
    copy = shutil.copytree(checkpoint(name), tmp_path / "copy")
    path = copy / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": False}))
    assert_plain(found(copy, kind), checkpoint(name))
