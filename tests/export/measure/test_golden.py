"""The golden file: small, and its matches are the published protocol's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from ditf.export.measure.golden import reference_match


@pytest.mark.parametrize("channels", [3, 64, 130])
def test_reference_match_is_upsample_normalise_argmax(channels):
    rng = np.random.default_rng(channels)
    source, target = rng.normal(size=(2, channels, 6, 5)).astype(np.float32)
    points = np.stack([rng.integers(0, 40, 30), rng.integers(0, 33, 30)], axis=1)
    found, scores = reference_match(source, target, points, (33, 40))
    up = [
        functional.normalize(
            functional.interpolate(torch.from_numpy(m)[None].double(), (33, 40), mode="bilinear")[0], dim=0
        )
        for m in (source, target)
    ]
    cosine = up[0][:, points[:, 1], points[:, 0]].T @ up[1].flatten(1)
    best = cosine.amax(1)
    # float32 may pick a pixel that ties with the best within its rounding
    chosen = cosine[torch.arange(30), torch.from_numpy(found[:, 1] * 40 + found[:, 0]).long()]
    np.testing.assert_allclose(chosen, best, atol=2e-6)
    np.testing.assert_allclose(scores, best, atol=2e-6)


def test_golden_file(demo_bundle):
    assert (demo_bundle / "golden.npz").stat().st_size < 8e6
    with np.load(demo_bundle / "golden.npz", allow_pickle=False) as golden:
        assert golden["images"].dtype == np.uint8
        assert golden["features"].dtype == np.float32
        assert golden["features"].shape[:2] == golden["rows"].shape
        assert len(golden["points"]) == len(golden["match_points"]) == len(golden["match_scores"])
