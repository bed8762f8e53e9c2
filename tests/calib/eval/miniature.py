"""Miniature datasets in the exact on-disk formats of the real ones, and toy features of their images."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

from ditf.runtime.features import FeatureMap
from ditf.runtime.matching.points import match_points

CELL, GRID = 4, (8, 10)
"""Toy features: pixels of a cell of the image scaled to 32x40; (h, w) cells."""


def features(image: np.ndarray) -> FeatureMap:
    """float32 [48, 8, 10] of an RGB image."""
    h, w = GRID
    small = np.asarray(Image.fromarray(image).resize((w * CELL, h * CELL), Image.Resampling.BILINEAR))
    cells = small.reshape(h, CELL, w, CELL, 3).transpose(1, 3, 4, 0, 2).reshape(-1, h, w)
    return FeatureMap(cells.astype(np.float32) / 255 - 0.5, image.shape[:2])


def pixels(path: Path) -> np.ndarray:
    """RGB uint8 [H, W, 3] as the published evaluations read it."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def match(pair) -> np.ndarray:
    """Matches of a pair's points by the runtime's exact matcher on toy features."""
    source, target = (features(one if isinstance(one, np.ndarray) else pixels(one)) for one in pair.images)
    return match_points(source, target, pair.queries(source.image_size)).points


def picture(path: Path, seed: int, size: tuple[int, int]) -> Path:
    """Save blurred noise of size (H, W)."""
    rng = np.random.default_rng([seed, 77])
    coarse = rng.integers(0, 256, (size[0] // 6 + 2, size[1] // 6 + 2, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC).save(path)
    return path


def points(rng, count: int, size: tuple[int, int]) -> np.ndarray:
    """float64 [count, 2] inside an image of (H, W)."""
    return np.stack([rng.uniform(0, size[1] - 1, count), rng.uniform(0, size[0] - 1, count)], axis=1)


def near(found: np.ndarray, rng, scale: float, size: tuple[int, int]) -> np.ndarray:
    """Points beside others, clipped to an image of (H, W): some within any limit, some beyond."""
    moved = found + rng.normal(0, scale, found.shape)
    return np.clip(moved, 0, (size[1] - 1, size[0] - 1))


def _near_matches(rng, source, target, start, scale):
    """Truths beside what the toy features match."""
    maps = [features(pixels(path)) for path in (source, target)]
    found = match_points(*maps, np.rint(start)).points
    return near(found, rng, scale, maps[1].image_size)


def spair(root: Path, categories=("cat", "aeroplane")) -> Path:
    """SPair-71k: two categories, three images of different sizes each, five pairs."""
    rng = np.random.default_rng(1)
    folder = root / "SPair-71k"
    names, sizes = {}, [(48, 64), (60, 40), (50, 50)]
    for number, category in enumerate(categories):
        for index, size in enumerate(sizes):
            name = f"2008_00{number}{index:03d}"
            names[category, index] = name
            picture(folder / "JPEGImages" / category / f"{name}.jpg", 10 * number + index, size)
    listed = []
    chosen = [(categories[0], 0, 1), (categories[0], 1, 2), (categories[0], 2, 0), (categories[-1], 0, 2),
              (categories[-1], 1, 0)]  # fmt: skip
    for number, (category, one, other) in enumerate(chosen):
        stem = f"{number:06d}-{names[category, one]}-{names[category, other]}:{category}"
        listed.append(stem)
        count = 4 + number
        paths = [folder / "JPEGImages" / category / f"{names[category, i]}.jpg" for i in (one, other)]
        start = np.rint(points(rng, count, sizes[one])).astype(int)
        truth = np.rint(_near_matches(rng, *paths, start, 5)).astype(int)
        document = {
            "pair_id": number,
            "filename": stem,
            "src_imname": paths[0].name,
            "trg_imname": paths[1].name,
            "src_imsize": [sizes[one][1], sizes[one][0], 3],
            "trg_imsize": [sizes[other][1], sizes[other][0], 3],
            "src_bndbox": [2, 3, sizes[one][1] - 3, sizes[one][0] - 5],
            "trg_bndbox": [5, 2, sizes[other][1] - 6, sizes[other][0] - 4],
            "category": category,
            "src_kps": start.tolist(),
            "trg_kps": truth.tolist(),
            "kps_ids": [str(3 * index) for index in range(count)],
            "mirror": 0,
            "viewpoint_variation": 0,
            "scale_variation": 0,
            "truncation": 0,
            "occlusion": 0,
        }
        path = folder / "PairAnnotation" / "test" / f"{stem}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))
    layout = folder / "Layout" / "large" / "test.txt"
    layout.parent.mkdir(parents=True)
    layout.write_text("".join(f"{stem}\n" for stem in listed))
    return folder


def pf_pascal(root: Path, in_list: bool = True) -> Path:
    """PF-PASCAL: three images, three pairs; points in the list as NC-Net's, or in .mat files only."""
    rng = np.random.default_rng(2)
    folder = root / "PF-dataset-PASCAL"
    sizes = {"2008_000001": (45, 60), "2009_000002": (60, 45), "2010_000003": (40, 60)}
    for index, (name, size) in enumerate(sizes.items()):
        picture(folder / "JPEGImages" / f"{name}.jpg", 40 + index, size)
    annotated = {}
    for name, size in sizes.items():
        kps = points(rng, 9, size)
        if not in_list:
            kps[rng.integers(0, 9, 2)] = np.nan
        annotated[name] = kps
        for category in ("aeroplane", "cat"):
            path = folder / "Annotations" / category / f"{name}.mat"
            path.parent.mkdir(parents=True, exist_ok=True)
            scipy.io.savemat(path, {"kps": kps, "bbox": np.array([[1, 1, size[1], size[0]]])})
    rows = ["source_image,target_image,class" + (",XA,YA,XB,YB" if in_list else "")]
    images = list(sizes)
    for one, other, label in ((0, 1, 1), (1, 2, 8), (2, 0, 8)):
        source, target = (f"PF-dataset-PASCAL/JPEGImages/{images[i]}.jpg" for i in (one, other))
        row = f"{source},{target},{label}"
        if in_list:
            count = 6 + one
            start = annotated[images[one]][:count]
            truth = _near_matches(rng, root / source, root / target, start, 6)
            for column in (start[:, 0], start[:, 1], truth[:, 0], truth[:, 1]):
                row += "," + ";".join(repr(float(value)) for value in column)
        rows.append(row)
    (folder / ("test_pairs_pf_pascal.csv" if in_list else "test_pairs.csv")).write_text(
        "\n".join(rows) + "\n"
    )
    return folder


def pf_willow(root: Path) -> Path:
    """PF-WILLOW: two categories, four pairs of ten points."""
    rng = np.random.default_rng(3)
    folder = root / "PF-dataset"
    letters = ",".join(f"{axis}{image}{n}" for image in "AB" for axis in "XY" for n in range(1, 11))
    rows = [f"imageA,imageB,{letters}"]
    for category in ("car(G)", "winebottle(wC)"):
        names = [f"PF-dataset/{category}/{category[:3]}_{index}.png" for index in range(2)]
        for index, name in enumerate(names):
            picture(root / name, 60 + index + len(category), (44 + 8 * index, 56))
        for one, other in ((0, 1), (1, 0)):
            start = points(rng, 10, (44 + 8 * one, 56))
            truth = _near_matches(rng, root / names[one], root / names[other], start, 5)
            values = [*start[:, 0], *start[:, 1], *truth[:, 0], *truth[:, 1]]
            rows.append(",".join([names[one], names[other], *(repr(float(value)) for value in values)]))
    (folder / "test_pairs_pf.csv").write_text("\n".join(rows) + "\n")
    return folder


def ap10k(root: Path) -> Path:
    """AP-10K as GeoAware-SC prepares it: two families, three species, pairs in all three settings."""
    rng = np.random.default_rng(4)
    folder = root / "ap-10k"
    animals = [("Felidae", "cat"), ("Felidae", "cat"), ("Felidae", "lion"), ("Bovidae", "argali sheep")]
    paths = []
    for index, (family, species) in enumerate(animals):
        size = (40 + 4 * index, 52)
        name = f"{index + 1:012d}"
        picture(folder / "JPEGImages" / family / species / f"{name}.jpg", 80 + index, size)
        kps = points(rng, 17, size)
        seen = rng.choice([0, 1, 2, 2], 17)
        seen[:3] = 2
        document = {
            "id": index + 1,
            "image_id": index + 1,
            "keypoints": np.column_stack([np.where(seen[:, None] > 0, np.rint(kps), 0), seen]).astype(int)
            .ravel().tolist(),
            "num_keypoints": int((seen > 0).sum()),
            "bbox": [3, 2, 40 + index, 30],
            "width": size[1],
            "height": size[0],
            "name": species,
            "supercategory": family,
        }  # fmt: skip
        path = folder / "ImageAnnotation" / family / species / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))
        paths.append(path)
    settings = {
        "test": [(0, 1, "cat"), (1, 0, "cat")],
        "test_cross_species": [(0, 2, "Felidae")],
        "test_cross_family": [(1, 3, "all"), (2, 3, "all")],
    }
    for setting, pairs in settings.items():
        for one, other, category in pairs:
            named = {
                key: f"data/ap-10k/{paths[i].relative_to(folder).as_posix()}"
                for key, i in (("src_json_path", one), ("trg_json_path", other))
            }
            path = (
                folder / "PairAnnotation" / setting / f"{paths[one].stem}-{paths[other].stem}:{category}.json"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(named, indent=4))
    return folder


def hpatches(root: Path) -> Path:
    """HPatches sequences: one of light, one of viewpoint, and one that the field leaves out."""
    rng = np.random.default_rng(5)
    folder = root / "hpatches-sequences-release"
    for number, name in enumerate(("i_books", "v_wall", "v_talent")):
        for k in range(1, 7):
            picture(folder / name / f"{k}.ppm", 100 + 10 * number + k, (36 + k, 48))
        for k in range(2, 7):
            matrix = np.eye(3) + rng.normal(0, [[0.02, 0.02, 2], [0.02, 0.02, 2], [1e-4, 1e-4, 0]])
            (folder / name / f"H_1_{k}").write_text(
                "\n".join(" ".join(f"{value:.8f}" for value in row) for row in matrix) + "\n"
            )
    return folder


def davis(root: Path) -> Path:
    """DAVIS 2017: two videos, of one and of two objects, with void pixels; labels are palette PNGs."""
    folder = root / "DAVIS"
    for number, (name, frames, objects) in enumerate((("bear", 6, 1), ("dogs-jump", 9, 2))):
        for t in range(frames):
            picture(folder / "JPEGImages" / "480p" / name / f"{t:05d}.jpg", 200 + 20 * number + t, (40, 54))
            labels = np.zeros((40, 54), np.uint8)
            labels[8 + t : 20 + t, 5 + 2 * t : 17 + 2 * t] = 1
            if objects == 2 and t != 4:  # hidden in one frame
                labels[22:30, 30 - t : 42 - t] = 2
            labels[:2, :3] = 255
            path = folder / "Annotations" / "480p" / name / f"{t:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(labels, "P")
            image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [200] * (3 * 253))
            image.save(path)
    listed = folder / "ImageSets" / "2017" / "val.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("bear\ndogs-jump\n")
    return folder


def write_flow(path: Path, flow: np.ndarray) -> None:
    """A Middlebury .flo file of [H, W, 2]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack("<fii", 202021.25, flow.shape[1], flow.shape[0])
    path.write_bytes(head + flow.astype("<f4").tobytes())


def tss(root: Path) -> Path:
    """TSS: a pair in each group, both ways, with unknown flow in places."""
    rng = np.random.default_rng(6)
    folder = root / "TSS_CVPR2016"
    for number, group in enumerate(("FG3DCar", "JODS", "PASCAL")):
        pair = folder / group / f"pair_{number:03d}"
        sizes = [(30 + number, 40), (34, 44)]
        for way, size in enumerate(sizes, 1):
            picture(pair / f"image{way}.png", 300 + 10 * number + way, size)
            flow = rng.normal(0, 3, (*size, 2))
            flow[3:8, 10:20] = 1e10
            write_flow(pair / f"flow{way}.flo", flow)
            mask = np.zeros(size, np.uint8)
            mask[2:-6, 6:-8] = 255
            Image.fromarray(mask).save(pair / f"mask{way}.png")
    return folder
