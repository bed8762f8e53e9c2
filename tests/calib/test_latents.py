"""The measure that decides whether two encoders share a latent space."""

from __future__ import annotations

import numpy as np
import pytest

from ditf.calib.latents import same_space, x_0_agreement


def test_agreement_is_of_x_0():
    rng = np.random.default_rng(0)
    x_0 = rng.normal(size=(2, 4, 8, 8)).astype(np.float32) + 3
    same = x_0_agreement(x_0, x_0)
    assert same["relative_error"] == 0
    assert same["cosine"] == same["gain"] == pytest.approx(1)
    assert x_0_agreement(x_0 + 1, x_0)["relative_error"] == pytest.approx(1, rel=0.1)
    assert x_0_agreement(2 * x_0, x_0)["gain"] == pytest.approx(2)
    unrelated = x_0_agreement(x_0[::-1], x_0)
    assert unrelated["relative_error"] == pytest.approx(2**0.5, rel=0.15)
    assert unrelated["cosine"] > 0.8  # of the mean: why the cosine does not decide
    for broken in (np.full_like(x_0, np.nan), np.full_like(x_0, np.inf), np.zeros_like(x_0)):
        assert not same_space(x_0_agreement(broken, x_0))
