from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import ditf as package
from ditf.calib.images import procedural_image
from ditf.runtime import Propagator


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
        (["--points", "1,1", "moving.gif"], "moving.gif holds 3 pictures; write each to its own file"),
        (["--points", "1,1", "--json", "-"], "'-' is not supported here"),
    ],
)
def test_bad_input(ditf, pixart_bundle, video, tmp_path, change, message):
    frames = [Image.open(path).convert("L") for path in video]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:3])
    done = ditf("track", pixart_bundle, *video, *change)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_folder_of_frames(ditf, pixart_bundle, video, tmp_path):
    (tmp_path / "frames").mkdir()
    for path in video:
        path.rename(tmp_path / "frames" / path.name)
    first = tmp_path / "frames" / video[0].name
    (tmp_path / "frames" / "sound.wav").touch()
    done = ditf("track", pixart_bundle, first, "frames", "--points", "24,24", "--json", tmp_path / "t.json")
    assert done.returncode == 0, done.stderr
    frames = json.loads((tmp_path / "t.json").read_text())["frames"]
    assert [one["frame"] for one in frames] == [f"frames/{path.name}" for path in video]
    assert "frames: skipped, because they are no image files: sound.wav\n" in done.stderr


@pytest.fixture
def mask(video):
    """Labels of the first frame: 0, and 3 on the right half; 9 on one pixel, smaller than a cell."""
    labels = np.zeros((48, 80), np.uint8)
    labels[:, 40:] = 3
    labels[0, 0] = 9
    path = video[0].with_name("mask.png")
    image = Image.fromarray(labels)
    image.putpalette([7, 8, 9] * 256)
    image.save(path)
    return path


def test_labels_move_with_the_picture(ditf, pixart_bundle, video, mask, tmp_path):
    done = ditf(
        "track",
        pixart_bundle,
        *video,
        "--labels",
        mask,
        "-o",
        tmp_path / "out",
        "--json",
        tmp_path / "t.json",
    )
    assert done.returncode == 0, done.stderr
    assert "labels smaller than a cell are lost: 9" in done.stderr
    assert done.stdout.splitlines()[0].split() == ["frame", "label", "0", "label", "3"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{i:06d}.png" for i in range(3)]
    with package.load(pixart_bundle) as model:
        first, *frames = (model.features(path) for path in video)
        propagator = Propagator(first, np.array(Image.open(mask)))
        expected = [propagator.update(frame) for frame in frames]
    document = json.loads((tmp_path / "t.json").read_text())
    for index, labels in enumerate(expected):
        with Image.open(tmp_path / "out" / f"{index:06d}.png") as picture:
            assert picture.mode == "P"
            assert picture.getpalette()[:3] == [7, 8, 9]
            np.testing.assert_array_equal(np.array(picture), labels)
        assert document["frames"][index]["pixels"] == {
            "0": int((labels == 0).sum()),
            "3": int((labels == 3).sum()),
        }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "points or labels are needed"),
        (["--labels", "mask.png"], "give --output DIR"),
        (["--labels", "mask.png", "--points", "1,1", "-o", "out"], "exclude each other"),
        (["--labels", "absent.png", "-o", "out"], "absent.png: no such picture of labels"),
        (["--labels", "text.png", "-o", "out"], "text.png is not a readable picture"),
        (["--labels", "colour.png", "-o", "out"], "colour.png is a picture of mode RGB"),
        (["--labels", "small.png", "-o", "out"], "small.png has 79x48 pixels, the image 80x48"),
    ],
)
def test_bad_labels(ditf, pixart_bundle, video, mask, tmp_path, change, message):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (80, 48)).save(tmp_path / "colour.png")
    Image.new("L", (79, 48)).save(tmp_path / "small.png")
    done = ditf("track", pixart_bundle, *video, *change)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_frames_are_not_overwritten_by_their_labels(ditf, pixart_bundle, video, mask, tmp_path):
    frame = video[1].rename(tmp_path / "000000.png")
    before = frame.read_bytes()
    done = ditf("track", pixart_bundle, video[0], frame, "--labels", mask, "-o", tmp_path)
    assert done.returncode == 2
    assert "would overwrite" in done.stderr
    assert frame.read_bytes() == before
