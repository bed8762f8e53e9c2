"""What is measured of a model, and that the recipe made of it survives what is planted."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from ditf.calib.images import golden_pair, procedural_images
from ditf.calib.parity import feature_parity
from ditf.calib.recipe import FEATURES, INNER, SHOWN, Recipe, Scale, choose_recipe
from ditf.export.assemble.features_graph import assemble
from ditf.export.graph.precision import FLOAT16, FLOAT32
from ditf.export.graph.vae_encoders import KLEncoder, scale_down
from ditf.export.measure.activation_ranges import measure_ranges
from ditf.export.measure.reference_model import Reference
from ditf.export.onnx_writing.emulation import Float32Accumulation
from ditf.export.planning.conditions import trim
from ditf.runtime.errors import GateFailed
from tests.checkpoints import planted
from tests.export.parity import SETTINGS
from tests.export.parity import planned as plan_of

SIZE = (48, 80)
LAST = {
    "dit": "3",
    "pixart": "3",
    "sd35": "3",
    "flux": "4",
    "auraflow": "4",
    "flux2": "4",
    "lumina2": "4",
    "zimage": "4",
    "chroma": "4",
}


class Measured:
    """The ranges of a checkpoint, and the parity of a float16 graph made with a recipe."""

    def __init__(self, folder, layer, mode="bake", settings=SETTINGS):
        self.settings = settings
        self.plan, entries = plan_of(folder, layer, SIZE, 1, 1, mode, True)
        self.entries = trim(entries, self.plan.family, mode == "live")
        self.noise = self.plan.noise()
        self.reference = reference = Reference(
            self.plan.checkpoint, self.plan.family, self.plan.layer, SIZE, self.noise
        )
        reference.under(self.entries[0].condition, self.entries[0].timestep)
        self.images = [golden_pair(SIZE)[0], *procedural_images(SIZE, 1)]
        self.hidden_states = reference.hidden_states(self.images[0])
        self.expected = reference.features(self.hidden_states, settings)

    def measure(self):
        return measure_ranges(
            self.plan, self.entries, self.noise, self.images, self.hidden_states, self.settings
        )

    def ranges(self):
        return self.measure()[0]

    def parity(self, recipe, precision=FLOAT16):
        plan = replace(self.plan, precision=replace(precision, recipe=recipe))
        made = assemble(plan, self.entries, self.noise, self.settings)
        with torch.no_grad(), Float32Accumulation():
            actual = made.graph(torch.from_numpy(self.images[0])[None], *made.feeds[0].values())[0]
        return feature_parity(actual.numpy().transpose(1, 2, 0), self.expected.transpose(1, 2, 0))


@lru_cache(maxsize=8)
def measured(folder, layer, mode="bake"):
    return Measured(folder, layer, mode)


@pytest.mark.parametrize("name", LAST)
def test_every_branch_of_every_block_is_measured(checkpoint, name):
    one = measured(checkpoint(name), LAST[name])
    ranges = one.ranges()
    assert all(np.isfinite(extent.max_abs) for extent in ranges)
    for index in range(one.plan.layer):
        block = one.plan.family.block_name(index) + "."
        kinds = {extent.kind for extent in ranges if extent.name.startswith(block)}
        assert {"input", "weight", "output", "query", "key", "logits", "attended", "hidden"} <= kinds
        assert {"emitted", "gated", "scaled weight", "norm input", "gate"} <= kinds
        streams = {extent.stream for extent in ranges if extent.name.startswith(block)}
        alone = name == "dit" or (name == "lumina2" and "refiner" in block)  # Z-Image's have padding
        assert ("text" in streams) == (not alone), block
    assert [extent.kind for extent in ranges].count(FEATURES) == 1
    assert {extent.kind for extent in ranges} & {"vae residual", "vae inner", "vae logits"}
    assert not choose_recipe(ranges).exceptions()


def test_text_and_image_of_one_sequence_are_told_apart(checkpoint, tmp_path):
    folder = planted(checkpoint("flux"), tmp_path / "f", "transformer", {"context_embedder": 1e6})
    found = {
        extent.stream: extent.max_abs
        for extent in measured(folder, "4").ranges()
        if extent.kind == "norm input" and extent.name.startswith("single_transformer_blocks.0.")
    }
    assert found["text"] > 5e5
    assert found["image"] < 1e3


def test_a_graph_that_is_not_the_model_is_refused(checkpoint):
    one = Measured(checkpoint("dit"), "2")
    one.hidden_states = one.hidden_states * 1.01
    with pytest.raises(GateFailed, match=r"differ from the unmodified model's: relative error 0\.0099"):
        one.ranges()


def swap_query_heads(graph):
    project = graph.trunk.blocks[0].attention.project
    outputs = project.linear.weight.shape[1]
    size = outputs // 9  # query, key and value of three heads
    order = torch.arange(outputs)
    order[: 2 * size] = order[: 2 * size].roll(size)
    project.linear.weight.copy_(project.linear.weight[:, order])
    project.query_bias.copy_(project.query_bias[:, [1, 0, 2]])


def scale_latents(graph):
    for parameter in graph.encoder.quant_conv.parameters():
        parameter *= 1.01


def scale_noise(graph):
    graph.noise *= 1.001


def scale_a_column(graph):
    graph.trunk.blocks[1].feed_forward_out.linear.weight[:, 5] *= 1.02


@pytest.mark.parametrize("fault", [swap_query_heads, scale_latents, scale_noise, scale_a_column])
def test_a_fault_of_the_graph_is_found_in_float32(checkpoint, monkeypatch, fault):
    """Whatever the precision of the export: float16's rounding would hide some of them."""

    def assemble_wrongly(*args):
        made = assemble(*args)
        with torch.no_grad():
            fault(made.graph)
        return made

    monkeypatch.setattr("ditf.export.measure.activation_ranges.assemble", assemble_wrongly)
    with pytest.raises(GateFailed, match="hidden states differ from the unmodified model's"):
        measured(checkpoint("pixart"), "2").ranges()


def test_what_rounding_explains_is_no_fault(checkpoint, tmp_path):
    """Logits of 1e5: float32 keeps two digits of them, and the error is far above `AGREEMENT`."""
    folder = planted(
        checkpoint("pixart"), tmp_path / "planted", "transformer", {"transformer_blocks.1.attn2.to_k": 1e5}
    )
    one = Measured(folder, "2", "bank")
    one.ranges()
    one.hidden_states = one.hidden_states * 1.05
    with pytest.raises(GateFailed, match="hidden states differ from the unmodified model's"):
        one.ranges()


PLANTED = [
    # checkpoint, layer, conditioning, where, value, what the recipe should do
    ("dit", "3", "bake", "transformer_blocks.1.attn1.to_q", 1e5, "float32"),
    ("dit", "3", "bake", "transformer_blocks.1.ff.net.0.proj", 1e6, "float32"),
    ("dit", "3", "bake", "transformer_blocks.1.ff.net.2", 1e6, "scaled"),
    ("dit", "3", "bank", "transformer_blocks.1.attn1.to_out.0", 1e5, "scaled"),
    ("pixart", "2", "live", "transformer_blocks.1.attn2.to_q", 1e5, "float32"),
    ("pixart", "2", "bank", "transformer_blocks.1.attn2.to_k", 1e5, "float32"),
    ("pixart", "2", "bake", "transformer_blocks.1.attn2.to_out.0", 1e6, "scaled"),
    ("sd3", "3", "bake", "transformer_blocks.1.attn.add_k_proj", 1e5, "float32"),
    ("sd35", "3", "live", "transformer_blocks.1.ff_context.net.2", 1e6, "scaled"),
    ("flux", "4", "bake", "single_transformer_blocks.0.proj_out", 1e6, "scaled"),
    ("flux", "4", "bake", "single_transformer_blocks.0.proj_mlp", 1e5, "float32"),
    ("flux", "4", "bank", "transformer_blocks.0.attn.add_v_proj", 1e5, "float32"),
    ("flux2", "3", "bake", "transformer_blocks.0.ff.linear_out", 1e6, "scaled"),
    ("flux2", "3", "bake", "transformer_blocks.1.attn.add_v_proj", 1e6, "float32"),
    ("lumina2", "4", "bake", "noise_refiner.1.feed_forward.linear_2", 1e6, "scaled"),
    ("lumina2", "4", "bank", "noise_refiner.1.attn.to_out.0", 1e6, "scaled"),
    ("lumina2", "4", "live", "layers.1.attn.to_v", 1e6, "float32"),
    ("zimage", "4", "bake", "noise_refiner.1.feed_forward.w2", 1e6, "scaled"),
    ("zimage", "3", "live", "noise_refiner.1.attention.to_v", 1e6, "float32"),
]


@pytest.mark.parametrize(("name", "layer", "mode", "where", "value", "kind"), PLANTED)
def test_what_is_planted_is_found_and_survives(checkpoint, tmp_path, name, layer, mode, where, value, kind):
    folder = planted(checkpoint(name), tmp_path / "planted", "transformer", {where: value})
    one = Measured(folder, layer, mode)
    ranges = one.ranges()
    recipe = choose_recipe(ranges)
    exceptions = {entry["where"]: entry["is"] for entry in recipe.exceptions()}
    hit = [what for place, what in exceptions.items() if where.startswith(place)]
    assert len(hit) == 1
    assert hit[0].startswith(kind)
    largest = max(e.max_abs for e in ranges if e.kind not in SHOWN and where.startswith(e.branch))
    assert largest >= 0.5 * value  # a query carries head_dim**-0.5
    # As good as float16 is where nothing is planted: 1e-3 is float16's rounding, a few blocks deep.
    assert one.parity(recipe)["cosine_p01"] > 0.99999
    naive = one.parity(Recipe())
    assert not naive["cosine_p01"] > 0.999


@pytest.mark.parametrize(("name", "where"), [
    ("lumina2", "x_embedder"), ("flux2", "x_embedder"), ("zimage", "all_x_embedder.2-1"),
])  # fmt: skip
def test_a_massive_residual_needs_no_exception(checkpoint, tmp_path, name, where):
    """Of families whose norms are not LayerNorms, or whose embedder has no bias."""
    folder = planted(checkpoint(name), tmp_path / "planted", "transformer", {where: 2e5})
    one = Measured(folder, LAST[name])
    assert np.abs(one.hidden_states).max() > 1e5
    recipe = choose_recipe(one.ranges())
    assert not recipe.exceptions()
    assert one.parity(recipe)["cosine_p01"] > 0.99999


VAE_PLANTED = [
    ({"encoder.conv_in": 1e5}, "VAE residual"),
    ({"encoder.down_blocks.0.resnets.0.conv2": 1e6}, "VAE residual"),
    ({"encoder.mid_block.resnets.0.conv1": 1e5}, "vae.mid_block.resnets.0.conv1"),
    ({"encoder.mid_block.attentions.0.to_q": 2e4}, "VAE attention"),
]


@pytest.mark.parametrize(("biases", "where"), VAE_PLANTED)
def test_the_encoder_survives_too(checkpoint, tmp_path, biases, where):
    folder = planted(checkpoint("pixart"), tmp_path / "planted", "vae", biases)
    one = Measured(folder, "2")
    recipe = choose_recipe(one.ranges())
    assert where in {entry["where"] for entry in recipe.exceptions()}
    assert one.parity(recipe)["cosine_p01"] > 0.9999
    if where != "VAE attention":  # whose bound is an upper one
        assert not one.parity(Recipe())["cosine_p01"] > 0.999


def test_scaling_an_encoder_changes_nothing(checkpoint):
    """In float32, powers of two: only the additions round otherwise."""
    folder = checkpoint("pixart")
    images = torch.rand(1, 3, 48, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1
    answers = []
    for recipe in (
        Recipe(),
        Recipe(vae_residual=Scale(5), vae_inner={"vae.mid_block.resnets.0.conv1": Scale(3)}),
    ):
        vae = AutoencoderKL.from_pretrained(folder / "vae")
        scale_down(vae.encoder, recipe)
        with torch.no_grad():
            answers.append(KLEncoder(vae, 0.1, 0.5, FLOAT32)(images).numpy())
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-4, atol=1e-6)


def test_the_kinds_that_are_recorded_are_known_to_the_recipe(checkpoint):
    known = {*INNER, *SHOWN, "scaled weight", "emitted", "gated", FEATURES}
    known |= {"vae residual", "vae inner", "vae logits"}
    assert {extent.kind for extent in measured(checkpoint("auraflow"), "4").ranges()} <= known
