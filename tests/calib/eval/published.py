"""The published protocols of the benchmarks, step by step and slow: what `ditf eval` has to equal.

They read the dataset's files themselves and upsample features with F.interpolate. `features` gives a
FeatureMap of an image file under its category.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import scipy.io
import torch
from PIL import Image
from torch.nn import functional

from ditf.runtime.matching.points import TIE_TOLERANCE


def upsampled(features, size):
    """float64 [C, H, W]: bilinear, align_corners=False."""
    array = torch.from_numpy(np.asarray(features.array, np.float64))[None]
    return functional.interpolate(array, size, mode="bilinear", align_corners=False)[0]


def matches(source, target, points):
    """argmax over all target pixels from the source's nearest whole pixel: [K, 2] (x, y)."""
    one, other = (upsampled(features, features.image_size) for features in (source, target))
    normed = functional.normalize(other.flatten(1), dim=0)
    found = []
    for x, y in points:
        row = min(max(round(float(y)), 0), one.shape[1] - 1)
        column = min(max(round(float(x)), 0), one.shape[2] - 1)
        query = functional.normalize(one[:, row, column], dim=0)
        cosines = query @ normed
        # The argmax; beyond the centres of the last cells all pixels are equal, and the first one counts.
        best = int((cosines >= cosines.max() - TIE_TOLERANCE).int().argmax())
        found.append((best % other.shape[2], best // other.shape[2]))
    return found


class Tally:
    """Correct points, by category and pair."""

    def __init__(self):
        self.pairs = []

    def add(self, category, right):
        self.pairs.append((category, right))

    def per_point(self, category=None):
        flat = [hit for name, right in self.pairs if category in (None, name) for hit in right]
        return sum(flat) / len(flat)

    def per_image(self, category=None):
        shares = [sum(r) / len(r) for name, r in self.pairs if category in (None, name)]
        return sum(shares) / len(shares)

    def categories(self):
        return list(dict.fromkeys(name for name, _ in self.pairs))

    def document(self):
        names = self.categories()
        return {
            "pck": self.per_point(),
            "pck_per_image": self.per_image(),
            "mean": sum(map(self.per_point, names)) / len(names),
            "mean_per_image": sum(map(self.per_image, names)) / len(names),
            "by_category": {name: self.per_point(name) for name in names},
        }


def _rows(path):
    return list(csv.reader(path.read_text().splitlines()))[1:]


def _distances(found, truth):
    return [math.sqrt((x - u) ** 2 + (y - v) ** 2) for (x, y), (u, v) in zip(found, truth, strict=True)]


def spair(folder: Path, features, alpha: float) -> Tally:
    """DiTF's eval_spair.py."""
    tally = Tally()
    for name in (folder / "Layout/large/test.txt").read_text().split():
        pair = json.loads((folder / f"PairAnnotation/test/{name}.json").read_text())
        images = folder / "JPEGImages" / pair["category"]
        maps = [features(images / pair[key], pair["category"]) for key in ("src_imname", "trg_imname")]
        found = matches(*maps, pair["src_kps"])
        x0, y0, x1, y1 = pair["trg_bndbox"]
        threshold = max(y1 - y0, x1 - x0)
        tally.add(pair["category"], [d / threshold <= alpha for d in _distances(found, pair["trg_kps"])])
    return tally


def pf_pascal(folder: Path, features, alpha: float) -> Tally:
    """Hyperpixel Flow's threshold "img" on NC-Net's list or on .mat files."""
    names = [
        "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
        "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
    ]  # fmt: skip
    tally = Tally()
    path = next(folder.glob("test_pairs*.csv"))
    for row in _rows(path):
        category = names[int(row[2]) - 1]
        files = [folder.parent / name for name in row[:2]]
        if len(row) > 3:
            x, y, u, v = ([float(number) for number in text.split(";")] for text in row[3:])
            start, truth = list(zip(x, y, strict=True)), list(zip(u, v, strict=True))
        else:
            one, other = (
                scipy.io.loadmat(folder / "Annotations" / category / f"{file.stem}.mat")["kps"]
                for file in files
            )
            both = [not (np.isnan(p).any() or np.isnan(q).any()) for p, q in zip(one, other, strict=True)]
            start, truth = one[both].tolist(), other[both].tolist()
        with Image.open(files[1]) as image:
            threshold = max(image.size)
        found = matches(*(features(file, category) for file in files), start)
        tally.add(category, [d / threshold <= alpha for d in _distances(found, truth)])
    return tally


def pf_willow(folder: Path, features, alpha: float) -> Tally:
    """Hyperpixel Flow's data/pfwillow.py, "bbox"."""
    tally = Tally()
    for row in _rows(folder / "test_pairs_pf.csv"):
        category = row[0].split("/")[1]
        numbers = torch.tensor([float(text) for text in row[2:]], dtype=torch.float64)
        start, truth = numbers[:20].reshape(2, 10), numbers[20:].reshape(2, 10)
        threshold = float(max(truth.max(1)[0] - truth.min(1)[0]))
        found = matches(*(features(folder.parent / name, category) for name in row[:2]), start.T.tolist())
        tally.add(category, [d / threshold <= alpha for d in _distances(found, truth.T.tolist())])
    return tally


def ap10k(folder: Path, features, alpha: float, setting: str) -> Tally:
    """GeoAware-SC's load_ap10k_data and compute_pck: less than alpha times the longer side of the bbox."""
    tally = Tally()
    for path in sorted((folder / "PairAnnotation" / setting).glob("*.json")):
        category = path.name.split(":")[1].removesuffix(".json")
        named = json.loads(path.read_text())
        files = [
            folder.parent / named[key].removeprefix("data/") for key in ("src_json_path", "trg_json_path")
        ]
        one, other = (json.loads(file.read_text()) for file in files)
        images = [Path(str(f).replace("json", "jpg").replace("ImageAnnotation", "JPEGImages")) for f in files]
        start, truth = (np.array(side["keypoints"]).reshape(-1, 3) for side in (one, other))
        visible = start[:, 2] * truth[:, 2] > 0
        _, _, width, height = other["bbox"]
        found = matches(*(features(image, category) for image in images), start[visible, :2])
        distances = _distances(found, truth[visible, :2])
        tally.add(category, [d / max(width, height) < alpha for d in distances])
    return tally


def homography_accuracy(truth, estimate, source_size, target_size, limit):
    """SuperPoint's compute_homography, in pixels of images whose shorter side is 480."""
    if estimate is None:
        return 0.0
    height, width = source_size
    total = 0.0
    for x, y in ((0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1)):
        ends = []
        for matrix in (truth, estimate):
            a, b, c = (sum(m * p for m, p in zip(row, (x, y, 1), strict=True)) for row in matrix)
            ends.append((a / c, b / c))
        total += math.dist(*ends)
    return float(total / 4 * 480 / min(target_size) <= limit)


def davis_frame(truth, found):
    """J and F of bool masks [H, W]: a boundary pixel counts where one of the other is within the disk."""
    inter, union = int((truth & found).sum()), int((truth | found).sum())
    j = 1.0 if union == 0 else inter / union
    radius = math.ceil(0.008 * math.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2))
    edges = [_edges(mask) for mask in (truth, found)]
    if not edges[0] and not edges[1]:
        return j, 1.0
    if not edges[0] or not edges[1]:
        return j, 0.0
    apart = torch.cdist(*(torch.tensor(edge, dtype=torch.float64) for edge in edges)) ** 2
    near = apart.round() <= radius**2
    recall, precision = float(near.any(1).double().mean()), float(near.any(0).double().mean())
    return j, 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def _edges(mask):
    """davis2017-evaluation's _seg2bmap: pixels that differ from the one to the right, below, or both."""
    height, width = mask.shape
    found = []
    for y in range(height):
        for x in range(width):
            neighbours = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            inside = [(a, b) for a, b in neighbours if a < height and b < width]
            if any(mask[y, x] != mask[a, b] for a, b in inside):
                found.append((y, x))
    return found


def davis(folder: Path, found):
    """J&F, J and F with recall and decay as evaluation_method.py prints them; found: {video: labels}."""
    per_object = []
    for name in (folder / "ImageSets/2017/val.txt").read_text().split():
        annotations = []
        for path in sorted((folder / "Annotations/480p" / name).glob("*.png")):
            with Image.open(path) as image:
                labels = np.array(image)
            labels[labels == 255] = 0
            annotations.append(labels)
        for one in range(1, annotations[0].max() + 1):
            frames = range(1, len(annotations) - 1)
            scores = np.array([davis_frame(annotations[t] == one, found[name][t] == one) for t in frames])
            row = []
            for values in scores.T:
                ids = np.round(np.linspace(1, len(values), 5) + 1e-10) - 1
                first, last = (values[int(ids[i]) : int(ids[i + 1]) + 1].mean() for i in (0, 3))
                row += [values.mean(), (values > 0.5).mean(), first - last]
            per_object.append(row)
    mean = np.mean(per_object, axis=0)
    names = ("J", "J-recall", "J-decay", "F", "F-recall", "F-decay")
    return {"J&F": (mean[0] + mean[3]) / 2, **dict(zip(names, mean, strict=True))}


def tss(folder: Path, flow, alpha: float):
    """Flow accuracy of Taniai's kit: the pairs' mean share of known foreground pixels that are right."""
    shares, errors, hits, total = [], [], 0, 0
    for pair in sorted(folder.glob("*/*")):
        for way in (1, 2):
            data = (pair / f"flow{way}.flo").read_bytes()
            width, height = np.frombuffer(data[4:12], "<i4")
            truth = torch.from_numpy(
                np.frombuffer(data[12:], "<f4").reshape(height, width, 2).copy()
            ).double()
            with Image.open(pair / f"mask{way}.png") as image:
                foreground = torch.from_numpy(np.array(image) > 127)
            known = foreground & (truth[..., 0] < 1e9) & (truth[..., 1] < 1e9)
            estimate = torch.from_numpy(flow(pair / f"image{way}.png")).double()
            error = (estimate - truth).pow(2).sum(2).sqrt()[known]
            right = error / max(height, width) <= alpha
            shares.append(float(right.double().mean()))
            errors.append(float(error.mean()))
            hits, total = hits + int(right.sum()), total + len(right)
    return {"pck": hits / total, "pck_per_image": sum(shares) / len(shares), "epe": sum(errors) / len(errors)}
