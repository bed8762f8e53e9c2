"""Datasets that are incomplete or malformed: each item counted with what is wrong, naming the file."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import scipy.io
from PIL import Image

from ditf.calib.eval.benchmarks import BENCHMARKS
from ditf.calib.eval.datasets.base import check_images
from ditf.runtime.errors import InputError
from tests.calib.eval import miniature

MAKE = {
    "spair-71k": miniature.spair,
    "pf-pascal": miniature.pf_pascal,
    "pf-willow": miniature.pf_willow,
    "ap-10k": miniature.ap10k,
    "hpatches": miniature.hpatches,
    "davis": miniature.davis,
    "tss": miniature.tss,
}


def read(name, folder):
    return check_images(BENCHMARKS[name].read(folder, BENCHMARKS[name].splits[0]))


def first(folder, pattern):
    return sorted(folder.glob(pattern))[0]


def rewrite(path, **changes):
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


SPAIR = "PairAnnotation/test/000000*.json"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"src_kps": [[1, 2]]}, "1 keypoints in the source, 4 in the target"),
        ({"src_kps": [], "trg_kps": []}, "no keypoint is in both"),
        ({"src_kps": "x"}, "src_kps is not numbers"),
        ({"src_kps": [[1, 2], [3]]}, "src_kps is not numbers"),
        ({"src_kps": [[1], [2], [3], [4]]}, "shape"),
        ({"trg_kps": [[1, 2], [3, 4], [5, 6], [7, float("nan")]]}, "NaN"),
        ({"trg_kps": [[1, 2], [3, 4], [5, 6], [7, 1e999]]}, "infinity"),
        ({"trg_kps": [[1, 2], [3, 4], [5, 6], [7, 700]]}, "7,700 is outside the target of 40x60"),
        ({"src_kps": [[-2, 2], [3, 4], [5, 6], [7, 8]]}, "-2,2 is outside the source"),
        ({"trg_bndbox": [9, 9, 9, 9]}, "degenerate"),
        ({"trg_bndbox": [9, 9, 2, 3]}, "degenerate"),
        ({"trg_bndbox": [1, 2, 3]}, "trg_bndbox has shape"),
        ({"trg_bndbox": None}, "trg_bndbox is missing"),
        ({"trg_imsize": [41, 60, 3]}, "is 40x60, its annotation is for 41x60"),
        ({"category": None}, "lacks category"),
        ({"src_imname": "none.jpg"}, "none.jpg: no such image"),
    ],
)
def test_spair(tmp_path, changes, message):
    folder = miniature.spair(tmp_path)
    rewrite(first(folder, SPAIR), **changes)
    reading = read("spair-71k", folder)
    assert len(reading.items) == 4
    assert reading.lost == 1
    (problem,) = reading.problems
    assert message in problem
    assert "000000-" in problem or "none.jpg" in problem


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\xff", '{"src_kps": 1}'])
def test_malformed_json(tmp_path, text):
    folder = miniature.spair(tmp_path)
    first(folder, SPAIR).write_bytes(text.encode("latin-1"))
    reading = read("spair-71k", folder)
    assert (len(reading.items), reading.lost) == (4, 1)


def test_a_missing_image_costs_every_pair_it_is_in(tmp_path):
    folder = miniature.spair(tmp_path)
    first(folder, "JPEGImages/cat/*.jpg").unlink()
    reading = read("spair-71k", folder)
    (problem,) = reading.problems
    assert "no such image" in problem
    assert reading.problems[problem] == 2
    assert len(reading.items) == 3


def test_a_truncated_image(tmp_path):
    folder = miniature.spair(tmp_path)
    path = first(folder, "JPEGImages/cat/*.jpg")
    path.write_bytes(path.read_bytes()[:-200])
    (problem,) = read("spair-71k", folder).problems
    assert str(path) in problem
    assert "truncated" in problem


def test_images_are_read_as_stored(tmp_path):
    """The annotations are of the stored pixels: an EXIF rotation is not applied."""
    folder = miniature.spair(tmp_path)
    path = first(folder, "JPEGImages/cat/*.jpg")
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.load()
        image.save(path, exif=exif)
    assert read("spair-71k", folder).problems == {}


def test_a_keypoint_on_the_edge_is_moved_inside(tmp_path):
    folder = miniature.spair(tmp_path)
    rewrite(first(folder, SPAIR), src_kps=[[64, 48], [3, 4], [5, 6], [-1, 0]])  # of 64x48
    pair = read("spair-71k", folder).items[0]
    np.testing.assert_array_equal(pair.queries((48, 64)), [[63, 47], [3, 4], [5, 6], [0, 0]])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.jpg,b.jpg,21,1;2,1;2,1;2,1;2", "no class of 1 to 20"),
        ("a.jpg,b.jpg,0,1;2,1;2,1;2,1;2", "no class"),
        ("a.jpg,b.jpg,cat,1;2,1;2,1;2,1;2", "no class"),
        ("a.jpg", "no class"),
        ("2008_000001.jpg,2009_000002.jpg,1,1;2,1;2;3,1;2,1;2", "not as many x as y"),
        ("2008_000001.jpg,2009_000002.jpg,1,1;2,1;2,1;2;3,1;2;3", "not as many points"),
        ("2008_000001.jpg,2009_000002.jpg,1,1;x,1;2,1;2,1;2", "not numbers"),
        ("2008_000001.jpg,b.jpg,1,1;2,1;2,1;2,1;2", "no such image"),
        ("2008_000001.jpg,2009_000002.jpg,3", "no such annotation"),
    ],
)
def test_pf_pascal(tmp_path, row, message):
    folder = miniature.pf_pascal(tmp_path)
    with (folder / "test_pairs_pf_pascal.csv").open("a") as file:
        file.write(row + "\n")
    reading = read("pf-pascal", folder)
    assert len(reading.items) == 3
    (problem,) = reading.problems
    assert message in problem


@pytest.mark.parametrize("damage", ["text", "half", "no kps", "shape", "fifo", "large"])
def test_malformed_mat(tmp_path, damage):
    folder = miniature.pf_pascal(tmp_path, in_list=False)
    path = folder / "Annotations" / "aeroplane" / "2008_000001.mat"
    if damage == "text":
        path.write_text("not MATLAB")
    elif damage == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "fifo":
        path.unlink()
        os.mkfifo(path)
    elif damage == "large":  # 64 MB of zeros
        scipy.io.savemat(path, {"kps": np.zeros((1 << 22, 2))}, do_compression=True)
    else:
        scipy.io.savemat(path, {"kps" if damage == "shape" else "points": np.zeros((3, 3))})
    reading = read("pf-pascal", folder)
    assert len(reading.items) == 2
    (problem,) = reading.problems
    assert str(path) in problem


def test_pf_willow(tmp_path):
    folder = miniature.pf_willow(tmp_path)
    path = folder / "test_pairs_pf.csv"
    lines = path.read_text().splitlines()
    lines[1] += ",7"
    path.write_text("\n".join(lines))
    (problem,) = read("pf-willow", folder).problems
    assert "43 columns instead of 42" in problem


@pytest.mark.parametrize(
    ("pattern", "changes", "message"),
    [
        ("PairAnnotation/test/*cat.json", {"src_json_path": "x.json"}, "names no file in ImageAnnotation"),
        ("PairAnnotation/test/*cat.json", {"src_json_path": 3}, "names no file"),
        ("PairAnnotation/test/*cat.json", {"trg_json_path": "ImageAnnotation/no.json"}, "no such annotation"),
        ("ImageAnnotation/Felidae/lion/*.json", {"keypoints": [1, 2]}, "keypoints has shape"),
        ("ImageAnnotation/Felidae/lion/*.json", {"width": None}, "size holds NaN"),
        ("ImageAnnotation/Felidae/lion/*.json", {"width": 9}, "its annotation is for 9x48"),
        ("ImageAnnotation/Felidae/lion/*.json", {"bbox": [1, 1, 0, 0]}, "degenerate"),
    ],
)
def test_ap10k(tmp_path, pattern, changes, message):
    folder = miniature.ap10k(tmp_path)
    rewrite(first(folder, pattern), **changes)
    problems = read("ap-10k", folder).problems
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize("text", ["", "1 0 0\n0 1 0\n", "a b c d e f g h i", "nan " * 9, "0 " * 9])
def test_hpatches(tmp_path, text):
    folder = miniature.hpatches(tmp_path)
    (folder / "i_books" / "H_1_3").write_text(text)
    (folder / "v_wall" / "H_1_4").unlink()
    reading = read("hpatches", folder)
    assert len(reading.items) == 8
    assert any("H_1_3" in problem for problem in reading.problems)
    assert any("H_1_4: no such" in problem for problem in reading.problems)


def test_davis(tmp_path):
    folder = miniature.davis(tmp_path)
    annotations = folder / "Annotations" / "480p"
    (folder / "ImageSets" / "2017" / "val.txt").write_text("bear\ndogs-jump\nnone\n")
    (annotations / "bear" / "00003.png").unlink()
    Image.new("RGB", (54, 40)).save(annotations / "dogs-jump" / "00002.png")
    problems = list(read("davis", folder).problems)
    assert len(problems) == 3
    assert "6 frames, 5 annotations" in problems[0]
    assert "a RGB image" in problems[1]
    assert "0 frames" in problems[2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("magic", "no .flo file"),
        ("half", "truncated or malformed"),
        ("empty", "no .flo file"),
        ("missing", "no such flow"),
        ("size", "another size"),
        ("nan", "holds NaN"),
        ("unknown", "known nowhere"),
        ("mask", "mask1.png"),
        ("image", "its annotation is for"),
    ],
)
def test_tss(tmp_path, damage, message):
    folder = miniature.tss(tmp_path)
    pair = folder / "FG3DCar" / "pair_000"
    path, data = pair / "flow1.flo", (pair / "flow1.flo").read_bytes()
    if damage in ("magic", "half", "empty"):
        path.write_bytes({"magic": b"PIEX" + data[4:], "half": data[: len(data) // 2], "empty": b""}[damage])
    elif damage == "missing":
        path.unlink()
    elif damage == "mask":
        (pair / "mask1.png").write_text("no")
    elif damage == "image":
        miniature.picture(pair / "image1.png", 1, (20, 20))
    else:
        size = (31, 40) if damage == "size" else (30, 40)
        value = {"nan": np.nan, "unknown": 1e10, "size": 0.0}[damage]
        miniature.write_flow(path, np.full((*size, 2), value))
    problems = read("tss", folder).problems
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize("name", sorted(MAKE))
def test_not_the_dataset(tmp_path, name):
    """Another folder, an empty one, or none is one line, not thousands of missing files."""
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(InputError):
            BENCHMARKS[name].read(folder, BENCHMARKS[name].splits[0])


def test_an_empty_split(tmp_path):
    folder = miniature.spair(tmp_path)
    (folder / "Layout" / "large" / "test.txt").write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        BENCHMARKS["spair-71k"].read(folder, "test")
    shutil.rmtree(folder / "Layout")
    assert len(BENCHMARKS["spair-71k"].read(folder, "test").items) == 5  # sorted by name
    shutil.rmtree(folder / "PairAnnotation")
    (folder / "PairAnnotation" / "test").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no pairs"):
        BENCHMARKS["spair-71k"].read(folder, "test")


FILES = {
    "spair-71k": ("PairAnnotation/test/*.json", "JPEGImages/cat/*.jpg"),
    "pf-pascal": ("JPEGImages/*.jpg",),
    "pf-willow": ("*/*.png",),
    "ap-10k": ("PairAnnotation/test/*.json", "JPEGImages/*/*/*.jpg"),
    "hpatches": ("i_*/H_1_3", "i_*/*.ppm"),
    "davis": ("Annotations/480p/bear/*.png", "JPEGImages/480p/bear/*.jpg"),
    "tss": ("FG3DCar/*/flow1.flo", "FG3DCar/*/mask1.png", "FG3DCar/*/image1.png"),
}


@pytest.mark.parametrize("kind", ["a FIFO", "8,589,934,592 bytes"])
@pytest.mark.parametrize(("name", "pattern"), [(name, one) for name in FILES for one in FILES[name]])
def test_fifos_and_files_too_large_cost_their_items(tmp_path, name, pattern, kind):
    """Neither is read: a FIFO has no end, and the other is 8 GB of holes."""
    folder = MAKE[name](tmp_path)
    path = first(folder, pattern)
    path.unlink()
    if kind == "a FIFO":
        os.mkfifo(path)
    else:
        with path.open("wb") as file:
            file.truncate(8 << 30)
    reading = read(name, folder)
    assert any(kind in problem for problem in reading.problems), reading.problems
    assert reading.items


@pytest.mark.parametrize(
    ("name", "pattern"), [("davis", "Annotations/480p/bear/*.png"), ("tss", "FG3DCar/*/mask1.png")]
)
def test_an_image_of_too_many_pixels_costs_its_item(tmp_path, monkeypatch, name, pattern):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    folder = MAKE[name](tmp_path)
    Image.new("L", (400, 400)).save(first(folder, pattern))
    problems = read(name, folder).problems
    assert any("exceeds limit" in problem for problem in problems), problems


def test_an_image_of_16_bits_costs_its_item(tmp_path):
    """Pillow's convert("RGB") would show it as white."""
    folder = MAKE["pf-willow"](tmp_path)
    path = first(folder, "**/*.png")
    with Image.open(path) as image:
        deep = np.full((image.height, image.width), 1000, np.uint16)
    Image.fromarray(deep).save(path)
    reading = read("pf-willow", folder)
    assert any(f"{path.name} has more than 8 bits" in problem for problem in reading.problems)
    assert reading.items
