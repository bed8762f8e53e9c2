"""The demo model's training: it goes on where it stopped, and its views correspond."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel


@pytest.fixture
def scripts(root, monkeypatch):
    """The script and its data module, imported from benchmarks/."""
    monkeypatch.syspath_prepend(root / "benchmarks")
    names = ("train_demo", "train_demo_data")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name)


@pytest.fixture
def training(scripts, tmp_path, monkeypatch):
    """Makes a training of four steps; one that finds a checkpoint goes on from it."""
    command = ["train_demo.py", "--output", str(tmp_path), "--images", "8", "--batch", "4"]
    monkeypatch.setattr(sys, "argv", [*command, "--steps", "4", "--cooldown", "2", "--threads", "1"])
    pictures = scripts.train_demo_data.training_pictures(tmp_path / "pictures.npy", 8)

    def made():
        one = scripts.train_demo.Training(scripts.train_demo.arguments())

        def advance(steps):
            for _ in range(steps):
                one.take_step(pictures)
            return one

        return advance

    return made


def test_an_interrupted_training_takes_the_same_steps(training, tmp_path):
    whole = training()(4)
    training()(2).save()
    resumed = training()(2)
    assert resumed.step == whole.step == 4
    for module in ("model", "average", "head"):
        pairs = zip(getattr(whole, module).parameters(), getattr(resumed, module).parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_what_is_written_loads_as_float16(training, tmp_path):
    trained = training()(2)
    trained.write(tmp_path / "model")
    loaded = DiTTransformer2DModel.from_pretrained(
        tmp_path / "model" / "transformer", torch_dtype=torch.float16
    )
    for one, other in zip(loaded.parameters(), trained.average.module.parameters(), strict=True):
        assert torch.equal(one, other.half())


@pytest.mark.parametrize("flip", [1.0, -1.0])
def test_partners_show_the_same_place(scripts, flip):
    """A view and its mirror image: each token's partner is itself, or the mirrored one."""
    data = scripts.train_demo_data
    side = data.SIZE // data.PATCH
    first = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
    second = torch.tensor([[[flip, 0, 0], [0, 1, 0]]])
    everything = torch.arange(side * side).expand(2, -1)
    found = data.partners(first, second, everything).reshape(side, side)
    expected = torch.arange(side * side).reshape(side, side)
    assert torch.equal(found, expected if flip > 0 else expected.flip(1))


def test_partners_of_drawn_views_have_the_same_colour(scripts):
    """On a picture whose colours tell the place, partners agree to within a token."""
    data = scripts.train_demo_data
    ramp = torch.linspace(-1, 1, data.SIZE)
    picture = torch.stack(
        [ramp.expand(data.SIZE, -1), ramp[:, None].expand(-1, data.SIZE), torch.zeros(data.SIZE, data.SIZE)]
    )
    generator = torch.Generator().manual_seed(0)
    turns = [data.draw_view(picture[None], generator)[1] for _ in range(2)]
    grids = [
        torch.nn.functional.affine_grid(turn, (1, 3, data.SIZE, data.SIZE), align_corners=False)
        for turn in turns
    ]
    views = [torch.nn.functional.grid_sample(picture[None], grid, align_corners=False) for grid in grids]
    tokens = [data.patches(view).unflatten(-1, (-1, 3))[..., :2].mean(2)[0] for view in views]
    everything = torch.arange(tokens[0].shape[0]).expand(2, -1)
    found = data.partners(*turns, everything)[0]
    known = found >= 0
    assert known.sum() > 20
    apart = (tokens[0][known] - tokens[1][found[known]]).abs()
    assert np.quantile(apart.numpy(), 0.9) < 2 * 2 / (data.SIZE // data.PATCH)
