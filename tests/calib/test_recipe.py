"""From ranges to a recipe."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditf.calib.channels import FLOAT16_MAX
from ditf.calib.recipe import (
    FEATURES,
    HEADROOM,
    INNER,
    LIMIT,
    VAE_INNER,
    VAE_LOGITS,
    VAE_RESIDUAL,
    Extent,
    choose_recipe,
    power_of_two,
)
from ditf.runtime.errors import InputError

FF = "transformer_blocks.3.ff"


def extent(kind, value, name=f"{FF}.net.2", branch=FF, stream="image"):
    return Extent(name, branch, kind, stream, value)


@given(st.floats(1e-6, 1e30))
def test_the_power_of_two_is_the_least_that_fits(value):
    s = power_of_two(value)
    assert math.ldexp(value, -s) <= LIMIT * (1 + 1e-12)
    assert s == 0 or math.ldexp(value, -(s - 1)) > LIMIT * (1 - 1e-12)


def test_small_values_need_nothing():
    kinds = [*INNER, "scaled weight", "emitted", "gated", VAE_RESIDUAL, VAE_INNER, VAE_LOGITS, FEATURES]
    recipe = choose_recipe([extent(kind, LIMIT * 0.99) for kind in kinds])
    assert recipe.exceptions() == []
    assert recipe.summary() == "nothing out of float16's range"


@pytest.mark.parametrize("kind", INNER)
def test_a_value_inside_a_branch_keeps_the_branch_in_float32(kind):
    recipe = choose_recipe([extent(kind, 1e5, f"{FF}.net.0.proj"), extent("emitted", 1e6)])
    assert recipe.float32 == {FF: f"{kind} of {FF}.net.0.proj reaches 1e+05"}
    assert not recipe.emitted  # float32 needs no scale


@pytest.mark.parametrize(("emitted", "gated"), [(1e6, 1e3), (1e6, 1e6), (1e3, 1e6)])
def test_what_a_branch_emits_is_scaled_by_how_its_gate_is_kept(emitted, gated):
    recipe = choose_recipe([extent("emitted", emitted), extent("gated", gated)])
    assert recipe.scale(f"{FF}.net.2", folded=False).exponent == power_of_two(emitted)
    assert recipe.scale(f"{FF}.net.2", folded=True).exponent == power_of_two(gated)
    assert recipe.scale("another", folded=True).exponent == 0


def test_image_and_text_share_the_larger_scale_and_its_reason():
    recipe = choose_recipe([extent("emitted", 2e4), extent("emitted", 1e6, stream="text")])
    [entry] = recipe.exceptions()
    assert entry["is"] == f"scaled by 2**-{power_of_two(1e6)}"
    assert "(text tokens) reaches 1e+06" in entry["why"]


def test_parameters_beyond_float16_are_scaled_too():
    assert choose_recipe([extent("scaled weight", 1e5)]).scale(f"{FF}.net.2", folded=True).exponent == 4


def test_the_encoder():
    recipe = choose_recipe(
        [
            extent(VAE_RESIDUAL, 1e5, "vae.conv_in", "vae"),
            extent(VAE_RESIDUAL, 3e5, "vae.mid_block.resnets.0", "vae"),
            extent(VAE_INNER, 5e4, "vae.mid_block.resnets.0.conv1", "vae"),
            extent(VAE_LOGITS, 1e6, "vae.mid_block.attentions.0", "vae"),
        ]
    )
    assert recipe.vae_residual.exponent == power_of_two(3e5)
    assert {name: s.exponent for name, s in recipe.vae_inner.items()} == {"vae.mid_block.resnets.0.conv1": 3}
    assert "1e+06" in recipe.vae_attention_float32
    assert len(recipe.exceptions()) == 3


def test_a_summary_stays_a_line():
    extents = [extent("emitted", 1e6, f"blocks.{i}.ff.net.2", f"blocks.{i}.ff") for i in range(9)]
    assert choose_recipe(extents).summary().endswith("and 5 more")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_by_name(value):
    with pytest.raises(InputError, match=f"emitted of {FF}.net.2 is not finite"):
        choose_recipe([extent("emitted", 1.0), extent("emitted", value)])


def test_features_out_of_range_are_refused():
    with pytest.raises(InputError, match=r"features reach 3e\+04.*--features-dtype float32"):
        choose_recipe([extent(FEATURES, 3e4, FEATURES, FEATURES)])


def test_json_keeps_an_extent():
    one = extent("logits", 123.5, stream="both")
    document = one.to_json()
    assert document["headroom"] == FLOAT16_MAX / 123.5
    assert Extent.from_json(document) == one
    assert HEADROOM * LIMIT == FLOAT16_MAX
    with pytest.raises(TypeError):
        Extent.from_json({**document, "name": 3})
