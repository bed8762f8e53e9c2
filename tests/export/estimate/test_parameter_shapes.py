"""What folding saves, counted from configs of real width; no weights are needed."""

from __future__ import annotations

import pytest

from ditf.export.assemble.features_graph import assemble, assemble_shapes
from ditf.export.estimate.estimate import Estimate
from ditf.export.estimate.published_configs import CONFIGS, open_configs
from ditf.export.planning.conditions import example_condition, trim
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import plan_from_configs
from tests.export.parity import SETTINGS, planned


def transformer_parameters(name, layer, size, text_tokens=None):
    """Parameters of a published transformer: all, cut at a layer, and with the condition folded in."""
    found = []
    for mode in ("live", "bake"):
        options = ExportOptions(model=name, layer=str(layer), size=size, conditioning=mode)
        with open_configs(name) as checkpoint:
            plan = plan_from_configs(options, checkpoint)
            estimate = Estimate(plan, example_condition(plan.family, text_tokens))
            graph, whole = estimate.graph, estimate.whole
        parts = [graph.trunk, graph.condition.conditioner] if mode == "live" else [graph.trunk]
        found.append(sum(p.numel() for part in parts for p in part.parameters()))
    return whole, *found


def test_flux_at_layer_28_folds_to_less_than_half():
    """docs/design.md, "Truncation and folding": 11.90 B, cut 7.80 B, folded 5.3 B."""
    with open_configs("FLUX.1-dev") as checkpoint:
        plan = plan_from_configs(ExportOptions(model="FLUX.1-dev"), checkpoint)
    assert plan.layer == 28
    assert plan.family.defaults.channels == (154, 1446)
    whole, cut, folded = transformer_parameters("FLUX.1-dev", 28, (640, 640))
    assert whole / 1e9 == pytest.approx(11.90, abs=0.005)
    assert cut / 1e9 == pytest.approx(7.80, abs=0.005)
    assert 1 - folded / cut == pytest.approx(0.32, abs=0.005)
    assert 1 - folded / whole == pytest.approx(0.55, abs=0.005)


@pytest.mark.parametrize("name", CONFIGS)
def test_folding_and_cutting_only_remove(name):
    with open_configs(name) as checkpoint:
        middle = plan_from_configs(ExportOptions(model=name), checkpoint).family.blocks.count // 2
    whole, cut, folded = transformer_parameters(name, middle, (512, 512))
    assert folded < cut < whole


def test_shapes_alone_count_as_values_do(checkpoint):
    """Against the module that is exported: every weight is there or is not, whether it has values or not."""
    plan, entries = planned(checkpoint("sd35"), "2", (48, 80), 1, 1, "bake", False)
    made = assemble(plan, trim(entries, plan.family), plan.noise(), SETTINGS)
    shapes = assemble_shapes(plan, entries[0].condition)
    assert {n: p.shape for n, p in shapes.graph.named_parameters()} == {
        n: p.shape for n, p in made.graph.named_parameters()
    }
