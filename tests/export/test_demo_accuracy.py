"""The demo model finds the keypoints of animals it has not seen, in every precision."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import ditf
from ditf.calib.eval.benchmarks import BENCHMARKS
from ditf.calib.eval.correspondence import evaluate_pairs, matcher
from ditf.calib.eval.creature_pairs import CreaturePairs
from ditf.calib.eval.outcomes import totals
from ditf.export.exporter import export_bundle
from ditf.export.measure.torch_baseline import torch_baseline
from ditf.export.planning.export_options import ExportOptions
from ditf.runtime.bundles.manifest import read_manifest
from ditf.runtime.images import fit_image
from ditf.runtime.matching.points import match_points

FLOOR = 0.45
"""Of PCK@0.1 on these 400 points; the model card gives it on 2,000."""

MARGIN = 0.015
"""Six of 400 points: what rounding may move across the threshold. int8 is allowed twice as much."""


def accuracy(match, drawn):
    return totals(evaluate_pairs(drawn, match, BENCHMARKS["creatures"].criteria))["pck"]["0.1"]


@pytest.fixture(scope="module")
def drawn():
    return CreaturePairs(40)[:40]


@pytest.fixture(scope="module")
def reference(drawn, demo_bundle_float32):
    """PCK of the unmodified diffusers model with hooks."""
    manifest = read_manifest(demo_bundle_float32)
    with torch_baseline(manifest, "eager") as baseline:

        def features(image):
            pixels, _ = fit_image(Image.fromarray(image), manifest.size, "stretch")
            return ditf.FeatureMap(baseline.features(pixels), image.shape[:2])

        def match(pair):
            source, target = map(features, pair.images)
            return match_points(source, target, pair.queries(source.image_size)).points

        return accuracy(match, drawn)


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    return export_bundle(ExportOptions(precision="int8", output=tmp_path_factory.mktemp("int8") / "bundle"))


def test_the_reference_finds_them(reference, drawn):
    assert reference >= FLOOR
    assert reference > 2 * accuracy(lambda pair: pair.points, drawn)


@pytest.mark.parametrize(
    ("fixture", "margin"), [("demo_bundle_float32", MARGIN), ("demo_bundle", MARGIN), ("int8", 2 * MARGIN)]
)
def test_every_precision_keeps_the_accuracy(request, reference, drawn, fixture, margin):
    with ditf.load(request.getfixturevalue(fixture)) as model:
        found = accuracy(matcher(model), drawn)
    np.testing.assert_allclose(found, reference, rtol=0, atol=margin)
