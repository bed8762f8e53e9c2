"""Every family, layer, conditioning and precision against the checkpoint's own diffusers pipeline.

Here the graph runs as a PyTorch module in its own precision, which is fast and hides no overflow;
test_end_to_end.py runs a selection as bundles.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ditf.calib.images import golden_pair
from ditf.calib.parity import feature_parity
from ditf.export.assemble.features_graph import assemble
from ditf.export.graph.features import FeatureSettings
from ditf.export.graph.precision import holds_gate
from ditf.export.measure.oracle.oracle import Oracle
from ditf.export.onnx_writing.emulation import Float32Accumulation
from ditf.export.planning.conditions import trim
from tests.export.parity import SETTINGS, module_parity, own_pipeline, planned

LAYERS = {
    "dit": (0, 1, 3),
    "pixart": (0, 1, 3),
    "pixart-1024": (2,),
    "sigma": (2,),
    "sd3": (0, 1, 3),
    "sd35": (0, 1, 2, 3),  # two attentions in blocks 0 and 1
    "sd35-large": (2,),
    "flux": (0, 1, 2, 3, 4),  # two double blocks, then three single ones
    "schnell": (0, 2, 4),
    "auraflow": (0, 1, 2, 3, 4),  # two joint blocks, then three single ones
    "flux2": (0, 2, 4),
    "lumina2": (0, 2, 3, 4),  # two blocks over the image, then three over text and image
    "chroma": (0, 2, 4),
    "zimage": (0, 2, 4),  # as lumina2; its 6x10 tokens are padded to 64
}
MODES = ("bake", "bank", "live")


def cases(name, layers):
    """Every layer with folded rows, and with explicit ones in one of two modes; the last in every mode."""
    for number, layer in enumerate(layers):
        yield name, layer, (48, 80), 1, ("bake", ("live", "bank")[number % 2])
    yield name, layers[-1], (64, 64), 3, MODES  # an ensemble, square


CASES = [case for name, layers in LAYERS.items() for case in cases(name, layers)]  # each pipeline loads once


@pytest.mark.parametrize(("name", "layer", "size", "ensemble", "modes"), CASES)
def test_every_mode_and_precision_is_the_unmodified_model(checkpoint, name, layer, size, ensemble, modes):
    for mode in modes:
        exact = module_parity(checkpoint(name), str(layer), mode, False, size, ensemble)
        assert exact["cosine_p01"] > 0.99999, mode
        assert exact["relative_error"] < 5e-6, mode  # another order of summation, a few blocks deep
        half = module_parity(checkpoint(name), str(layer), mode, True, size, ensemble)
        assert half["cosine_mean"] > 0.999, mode
        assert half["cosine_p01"] > 0.995, mode


def test_chroma_with_masked_padding_is_the_unmodified_model_without_it(checkpoint):
    for mode in MODES:
        exact = module_parity(checkpoint("chroma"), "3", mode, False, text_padding="masked")
        assert exact["relative_error"] < 5e-6, mode


@pytest.mark.parametrize("name", ["dit", "pixart", "sd35", "flux"])
def test_bake_and_bank_agree_to_rounding(checkpoint, name):
    image = torch.from_numpy(golden_pair((48, 80))[:1])
    maps = []
    for mode in ("bake", "bank"):
        plan, entries = planned(checkpoint(name), "2", (48, 80), 1, 1, mode, False)
        made = assemble(plan, trim(entries, plan.family), plan.noise(), SETTINGS)
        with torch.no_grad():
            maps.append(made.graph(image, *made.feeds[0].values())[0].numpy().transpose(1, 2, 0))
    assert feature_parity(maps[0], maps[1])["relative_error"] < 2e-6


@pytest.mark.parametrize("name", ["pixart", "sd35", "flux"])
def test_conditions_of_a_bank_differ(checkpoint, name):
    """The prompt reaches the features; else the tests above would pass on a graph that ignores it."""
    plan, entries = planned(checkpoint(name), "3", (48, 80), 1, 2, "bank", False)
    made = assemble(plan, trim(entries, plan.family), plan.noise(), SETTINGS)
    image = torch.from_numpy(golden_pair((48, 80))[:1])
    with torch.no_grad():
        first, second = (made.graph(image, *feeds.values()).numpy() for feeds in made.feeds)
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        FeatureSettings((3,), adaln=False),
        FeatureSettings((3,), "after"),
        FeatureSettings(()),
        FeatureSettings((), adaln=False),
    ],
    ids=["no-adaln", "discard-after", "discard-none", "raw"],
)
def test_ablations(checkpoint, settings):
    plan, entries = planned(checkpoint("pixart"), "2", (64, 64), 1, 1, "bake", True, adaln=settings.adaln)
    made = assemble(plan, trim(entries, plan.family), plan.noise(), settings)
    image = golden_pair((64, 64))[:1]
    with torch.no_grad(), Float32Accumulation():
        actual = made.graph(torch.from_numpy(image), *made.feeds[0].values())[0].numpy()
    expected = Oracle(plan, own_pipeline(plan.checkpoint.path)).maps(entries[0], image, settings)[0]
    assert actual.dtype == (np.float16 if settings.adaln else np.float32)  # z may not fit float16
    assert feature_parity(actual.transpose(1, 2, 0), expected.transpose(1, 2, 0))["cosine_p01"] > 0.995


def test_text_that_no_block_reads_is_no_input(checkpoint):
    """At layer 0 no text is read: only what modulates block 0 remains."""
    plan, entries = planned(checkpoint("flux"), "0", (48, 80), 1, 1, "live", False)
    made = assemble(plan, entries, plan.noise(), SETTINGS)
    assert made.condition_inputs == ("pooled_prompt_embeds", "guidance", "timestep")


@pytest.mark.parametrize(("gate", "fp16", "folds"), [
    (0.5, True, True), (0.5, False, True), (3.0, True, False), (1e-5, True, False), (1e-5, False, True),
    (0.0, True, True),
])  # fmt: skip
def test_a_gate_folds_where_its_type_holds_it(gate, fp16, folds):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) / 8
    dtype = torch.float16 if fp16 else torch.float32
    assert holds_gate(weight, torch.full((8,), gate), dtype) is folds
