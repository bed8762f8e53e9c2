from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import ditf
from ditf.runtime import bundle as files
from ditf.runtime.bundle import Bundle, sha256
from ditf.runtime.errors import BundleError, InputError
from ditf.runtime.manifest import NAME


@pytest.fixture
def copy(demo_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(demo_bundle, tmp_path / "copy"))


def test_whole_bundle_verifies(demo_bundle):
    bundle = Bundle.open(str(demo_bundle))
    assert bundle.path == demo_bundle
    bundle.verify(bundle.manifest.files)
    on_disk = {path.name for path in demo_bundle.iterdir() if path.name != NAME}
    assert set(bundle.manifest.files) == on_disk


def test_no_such_directory(tmp_path):
    (tmp_path / "file").touch()
    for name in ("none", "file"):
        with pytest.raises(InputError, match="no such bundle directory") as caught:
            Bundle.open(tmp_path / name)
        assert "ditf-export" in caught.value.fix


def test_directory_that_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle.open(tmp_path)


def test_opening_reads_the_manifest_alone(copy):
    for path in copy.iterdir():
        if path.name != NAME:
            path.unlink()
    assert Bundle.open(copy).manifest.layer == 9


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "is missing": lambda path: path.unlink(),
    "is truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "is longer than it was": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "has changed": flip,
}


@pytest.mark.parametrize(
    "name", [files.FEATURES, files.FEATURES_DATA, files.MATCH, files.GOLDEN, files.CALIBRATION]
)
@pytest.mark.parametrize("problem", DAMAGE)
def test_damage_is_named(copy, name, problem):
    DAMAGE[problem](copy / name)
    with pytest.raises(BundleError, match=problem) as caught:
        Bundle.open(copy).verify([name])
    assert str(copy / name) in caught.value.problem
    assert "export" in caught.value.fix


@pytest.mark.parametrize("name", [files.FEATURES, files.FEATURES_DATA])
@pytest.mark.parametrize("problem", DAMAGE)
def test_damaged_graph_is_not_loaded(copy, name, problem):
    DAMAGE[problem](copy / name)
    with pytest.raises(BundleError, match=problem):
        ditf.load(copy)


@pytest.mark.parametrize("name", ["notes.txt", "../copy/features.onnx", ""])
def test_unlisted_file_is_refused(copy, name):
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match="not listed in the manifest"):
        Bundle.open(copy).verify([name])


def test_graph_the_manifest_does_not_list_is_not_loaded(copy):
    document = json.loads((copy / NAME).read_text())
    del document["files"][files.FEATURES_DATA]
    (copy / NAME).write_text(json.dumps(document))
    with pytest.raises(BundleError, match="not listed in the manifest"):
        ditf.load(copy)


def test_read_arrays(copy):
    golden = Bundle.open(copy).read_arrays(files.GOLDEN)
    assert golden["images"].dtype == np.uint8
    assert len(golden["points"]) == len(golden["match_points"]) == len(golden["match_scores"])
    flip(copy / files.GOLDEN)
    with pytest.raises(BundleError, match="has changed"):
        Bundle.open(copy).read_arrays(files.GOLDEN)


def test_read_array(pixart_bundle, copy):
    noise = Bundle.open(pixart_bundle).read_array(files.NOISE)
    assert (noise.dtype, noise.shape) == (np.float32, (3, 4, 12, 20))  # ensemble, 48x80 px at stride 4
    with pytest.raises(BundleError, match="not listed"):
        Bundle.open(copy).read_array(files.NOISE)


@pytest.mark.parametrize("size", [0, 3, (1 << 20) + 1])
def test_sha256_of_any_length(tmp_path, size):
    data = bytes(size)
    (tmp_path / "data").write_bytes(data)
    assert sha256(tmp_path / "data") == hashlib.sha256(data).hexdigest()
