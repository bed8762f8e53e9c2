from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ditf.calib.images import procedural_image


@pytest.fixture
def video(tmp_path):
    """A picture and three frames in which it moves to the right by 8 pixels each, one cell of the bundle."""
    wide = procedural_image((48, 140), seed=3)
    paths = []
    for index in range(4):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(wide[:, 40 - 8 * index :][:, :80]).save(paths[-1])
    return paths


def test_points_move_with_the_picture(ditf, pixart_bundle, video, tmp_path):
    done = ditf(
        "track", pixart_bundle, *video, "--points", "24,24", "--points", "40,20",
        "--json", tmp_path / "t.json", "-o", tmp_path / "drawn",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 4
    document = json.loads((tmp_path / "t.json").read_text())
    assert [frame["frame"] for frame in document["frames"]] == [str(path) for path in video[1:]]
    assert np.array(document["frames"][0]["matches"]).shape == (2, 2)
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == [f"{i:06d}.png" for i in range(3)]


def test_the_source_is_found_in_itself(ditf, pixart_bundle, video, tmp_path):
    done = ditf(
        "track", pixart_bundle, video[0], video[0], "--points", "24,24", "--json", tmp_path / "t.json"
    )
    assert done.returncode == 0, done.stderr
    frame = json.loads((tmp_path / "t.json").read_text())["frames"][0]
    assert frame["matches"] == [[24.0, 24.0]]
    assert frame["scores"][0] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--points", "900,1"], "outside the source image"),
        (["--points", "a,b"], "is not x,y"),
        (["--points", "1,1", "-o", "0.png"], "is not a directory"),
        (["--points", "1,1", "none.png"], "none.png: no such file"),
    ],
)
def test_bad_input(ditf, pixart_bundle, video, change, message):
    done = ditf("track", pixart_bundle, *video, *change)
    assert done.returncode == 2
    assert message in done.stderr
