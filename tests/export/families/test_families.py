"""Which checkpoints are known, and how their layers are named."""

from __future__ import annotations

import json
import shutil

import pytest

from ditf.export.checkpoints.opening import open_checkpoint
from ditf.export.families import FAMILIES, family_of
from ditf.export.families.base import Blocks
from ditf.runtime.errors import InputError
from tests.checkpoints import SAVE
from tests.export.parity import family_named

FLUX = Blocks((("double", 19), ("single", 38)))


@pytest.mark.parametrize(
    ("layer", "index", "name"),
    [
        ("0", 0, "layer 0 = double.0 of 19+38"),
        ("double.9", 9, "layer 9 = double.9 of 19+38"),
        ("19", 19, "layer 19 = single.0 of 19+38"),
        ("single.9", 28, "layer 28 = single.9 of 19+38"),
        ("56", 56, "layer 56 = single.37 of 19+38"),
    ],
)
def test_layers_have_one_global_index(layer, index, name):
    assert FLUX.resolve(layer) == index
    assert FLUX.describe(index) == name


@pytest.mark.parametrize("layer", ["57", "-1", "double.19", "triple.0", "nine", "", "1.0", "²"])
def test_a_layer_out_of_range_says_the_range(layer):
    with pytest.raises(InputError, match=r"layers 0\.\.56, or double\.0\.\.double\.18 or single\.0"):
        FLUX.resolve(layer)


def test_an_unknown_family_lists_the_known_ones(tiny_pixart, tmp_path):
    copy = shutil.copytree(tiny_pixart, tmp_path / "checkpoint")
    config = copy / "transformer" / "config.json"
    config.write_text(json.dumps({"_class_name": "MochiTransformer3DModel"}))
    with (
        open_checkpoint(str(copy)) as checkpoint,
        pytest.raises(InputError, match=r"MochiTransformer3DModel.*not supported.*dit.*pixart"),
    ):
        family_of(checkpoint)


@pytest.mark.parametrize("name", SAVE)
def test_every_family_says_where_its_defaults_come_from(checkpoint, name):
    assert family_named(checkpoint(name)).defaults.source


def test_every_family_has_a_tiny_checkpoint(checkpoint):
    assert {type(family_named(checkpoint(name))) for name in SAVE} == set(FAMILIES)
