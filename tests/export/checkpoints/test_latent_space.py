"""Configs of VAEs whose latents no pipeline of the model would normalise are refused."""

from __future__ import annotations

import shutil

import pytest

from ditf.export.checkpoints.latent_space import LatentSpace
from ditf.export.checkpoints.layout import Checkpoint
from ditf.runtime.errors import InputError
from tests.vaes import copy_with_config


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("flux", {"latents_mean": [0.1] * 4}, "has latents_mean, with which no pipeline"),
        ("flux", {"latents_std": [1.5] * 4}, "has latents_std, with which no pipeline"),
        ("flux", {"down_block_types": ["DownEncoderBlock2D"] * 2 + ["DownBlock2D"]}, "of DownBlock2D"),
        ("flux2", {"patch_size": [4, 4]}, "has patch_size="),
        ("pixart", {"shift_factor": 0.06}, "has shift_factor=0.06, which the pipelines of this model do not"),
    ],
)
def test_a_vae_that_is_refused(checkpoint, tmp_path, name, changes, message):
    copy_with_config(checkpoint(name) / "vae", tmp_path / "vae", **changes)
    channels = 16 if name == "flux2" else 4
    with pytest.raises(InputError, match=message):
        LatentSpace.of(Checkpoint(tmp_path, "x"), channels, shifts=name != "pixart")


def test_a_shift_is_of_the_pipelines_that_subtract_it(checkpoint, tmp_path):
    shutil.copytree(checkpoint("flux") / "vae", tmp_path / "vae")
    assert LatentSpace.of(Checkpoint(tmp_path, "x"), 4).shift == pytest.approx(0.1)
