"""golden.npz is refused with one line unless all arrays are such as an export writes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ditf.runtime.bundles.bundle import GOLDEN, Bundle
from ditf.runtime.bundles.golden_file import Golden, read_golden
from ditf.runtime.bundles.manifest import MANIFEST
from ditf.runtime.errors import BundleError

Change = Callable[[dict[str, np.ndarray]], object]

CHANGES: dict[str, Change] = {
    "it has no rows": lambda a: a.pop("rows"),
    "images is uint8 [1, 96, 96, 3]": lambda a: a.update(images=a["images"][:1]),
    "images is float32": lambda a: a.update(images=a["images"].astype(np.float32)),
    "rows is out of range": lambda a: a.update(rows=a["rows"] + 10**6),
    "rows is float64": lambda a: a.update(rows=a["rows"].astype(np.float64)),
    "features is float32 [128]": lambda a: a.update(features=a["features"][0, 0]),
    "features holds NaN": lambda a: a.update(features=a["features"] * np.float32("nan")),
    "points is <U5 []": lambda a: a.update(points=np.array("point")),
    "points is out of range": lambda a: a.update(points=a["points"] - 1000),
    "match_points is float32 [3, 2]": lambda a: a.update(match_points=a["match_points"][:3]),
    "match_scores is": lambda a: a.update(match_scores=a["match_scores"][:, None]),
    "it has one of whole_features and": lambda a: a.update(whole_features=a["features"]),
    "hidden_states is float32 [2, ": lambda a: a.update(hidden_states=a["hidden_states"][:2]),
    "it has no hidden_rows": lambda a: a.pop("hidden_rows"),
    "it has no features_1": lambda a: a.update(rows_1=a["rows"][0]),
}


@pytest.fixture
def copy(demo_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle, tmp_path / "copy"))


def change(bundle: Path, edit: Change) -> Bundle:
    """Write golden.npz with a change, and update its entry in the manifest."""
    arrays = dict(read_golden(Bundle.open(bundle)))
    edit(arrays)
    np.savez(bundle / GOLDEN, **arrays)
    content = (bundle / GOLDEN).read_bytes()
    document = json.loads((bundle / MANIFEST).read_text())
    document["files"][GOLDEN] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (bundle / MANIFEST).write_text(json.dumps(document))
    return Bundle.open(bundle)


@pytest.mark.parametrize("problem", CHANGES)
def test_arrays_that_do_not_fit(copy: Path, problem: str) -> None:
    with pytest.raises(BundleError) as caught:
        read_golden(change(copy, CHANGES[problem]))
    assert f"does not fit the bundle: {problem}" in str(caught.value)


def test_every_kind_of_bundle_fits(demo_bundle: Path, demo_bundle_float32: Path, pixart_bundle: Path) -> None:
    for path in (demo_bundle, demo_bundle_float32, pixart_bundle):
        golden: Golden = read_golden(Bundle.open(path))
        assert golden["images"].shape[0] == 2


def test_check_says_it_in_one_line(ditf: Callable[..., object], copy: Path) -> None:
    change(copy, CHANGES["features is float32 [128]"])
    done = ditf("check", copy)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr  # type: ignore[attr-defined]
