"""What folding saves, counted from configs of real width; no weights are needed."""

from __future__ import annotations

import pytest

from ditf.export.assemble.features_graph import specialise
from ditf.export.estimate.parameter_shapes import count_parameters
from ditf.export.estimate.published_configs import CONFIGS, example_condition, published_family
from ditf.export.planning.conditions import trim
from tests.export.parity import SETTINGS, planned


def test_flux_at_layer_28_folds_to_less_than_half():
    """The figures of design section 7: 11.90 B, cut 7.80 B, folded 5.3 B."""
    family = published_family("FLUX.1-dev")
    assert family.defaults.layer == 28
    assert family.defaults.channels == (154, 1446)
    counts = count_parameters(family, 28, (640, 640), (40, 40), example_condition(family))
    assert counts.whole / 1e9 == pytest.approx(11.90, abs=0.005)
    assert counts.live / 1e9 == pytest.approx(7.80, abs=0.005)
    assert 1 - counts.bake / counts.live == pytest.approx(0.32, abs=0.005)
    assert 1 - counts.bake / counts.whole == pytest.approx(0.55, abs=0.005)


@pytest.mark.parametrize("name", CONFIGS)
def test_folding_and_cutting_only_remove(name):
    family = published_family(name)
    middle = family.blocks.count // 2
    counts = count_parameters(family, middle, (512, 512), (32, 32), example_condition(family))
    assert counts.bake < counts.live < counts.whole


def test_shapes_alone_count_as_values_do(checkpoint):
    """Against the module that is exported: every weight is there or is not, whether it has values or not."""
    folder = checkpoint("sd35")
    plan, entries = planned(folder, "2", (48, 80), 1, 1, "bake", False)
    made = specialise(plan, trim(entries, plan.family), plan.noise(), SETTINGS)
    counts = count_parameters(plan.family, 2, plan.size, plan.grid, entries[0].condition)
    assert counts.bake == sum(parameter.numel() for parameter in made.graph.trunk.parameters())
