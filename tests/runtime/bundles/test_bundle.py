from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest

import ditf
from ditf.runtime.bundles import bundle as files
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.bundles.manifest import MANIFEST
from ditf.runtime.bundles.onnx_graph import Graph
from ditf.runtime.errors import BundleError, InputError
from ditf.runtime.files.hashed import sha256


@pytest.fixture
def copy(demo_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(demo_bundle, tmp_path / "copy"))


def test_whole_bundle_verifies(demo_bundle):
    bundle = Bundle.open(str(demo_bundle))
    assert bundle.path == demo_bundle
    bundle.verify(bundle.manifest.files)
    on_disk = {path.name for path in demo_bundle.iterdir() if path.name != MANIFEST}
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
        if path.name != MANIFEST:
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
    document = json.loads((copy / MANIFEST).read_text())
    del document["files"][files.FEATURES_DATA]
    (copy / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(BundleError, match="not listed in the manifest"):
        ditf.load(copy)


def sign(bundle: Path, *names: str) -> None:
    """Write the current sizes and hashes of files into the manifest."""
    document = json.loads((bundle / MANIFEST).read_text())
    for name in names:
        content = (bundle / name).read_bytes()
        document["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (bundle / MANIFEST).write_text(json.dumps(document))


def test_weights_that_are_swapped_after_they_were_read_change_nothing(copy, monkeypatch):
    """Between hashing and use, another process renames other weights into place."""
    image = np.zeros((96, 96, 3), np.uint8)
    with ditf.load(copy) as model:
        expected = model.features(image).array
    others = bytes((copy / files.FEATURES_DATA).stat().st_size)
    verified = Bundle.read_graph

    def swap(bundle: Bundle, name: str) -> Graph:
        graph = verified(bundle, name)
        (copy / "others").write_bytes(others)
        (copy / "others").replace(copy / files.FEATURES_DATA)
        return graph

    monkeypatch.setattr(Bundle, "read_graph", swap)
    with ditf.load(copy) as model:
        assert np.array_equal(model.features(image).array, expected)
    assert (copy / files.FEATURES_DATA).read_bytes() == others
    monkeypatch.undo()
    with pytest.raises(BundleError, match="has changed"):
        ditf.load(copy)


def test_weights_that_are_swapped_all_the_time_are_refused_or_right(copy):
    """Another process renames the right weights and others into place in turn, as fast as it can."""
    image = np.zeros((96, 96, 3), np.uint8)
    with ditf.load(copy) as model:
        expected = model.features(image).array
    right = copy / files.FEATURES_DATA
    shutil.copy(right, copy / "right")
    (copy / "wrong").write_bytes(bytes(right.stat().st_size))
    program = (
        "import os, sys\nos.chdir(sys.argv[1])\nfor turn in range(10**9):\n"
        f"    os.link(('right', 'wrong')[turn % 2], 'next'); os.rename('next', '{files.FEATURES_DATA}')\n"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(copy)])
    try:
        for _ in range(20):
            try:
                with ditf.load(copy) as model:
                    assert np.array_equal(model.features(image).array, expected)
            except BundleError as error:
                assert "has changed" in str(error)  # noqa: PT017  either is right
    finally:
        other.kill()
        other.wait()


def test_weights_in_a_file_that_the_manifest_does_not_hash_are_refused(copy):
    model = onnx.load(str(copy / files.FEATURES), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "others.bin"
    (copy / files.FEATURES).write_bytes(model.SerializeToString())
    shutil.copy(copy / files.FEATURES_DATA, copy / "others.bin")
    sign(copy, files.FEATURES)
    with pytest.raises(BundleError, match=r"others\.bin', which is none of its files"):
        ditf.load(copy)


@pytest.mark.parametrize("name", [MANIFEST, files.FEATURES, files.FEATURES_DATA, files.MATCH, files.GOLDEN])
def test_a_fifo_in_place_of_a_file(demo_bundle, copy, name):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    listed = Bundle.open(demo_bundle).manifest.files
    with pytest.raises(BundleError, match="it is a FIFO, not a regular file"):
        Bundle.open(copy).verify(listed)


def test_a_manifest_without_end(copy):
    with (copy / MANIFEST).open("ab") as file:
        file.truncate(1 << 32)  # a sparse file: reading it whole would take 4 GB
    with pytest.raises(BundleError, match=r"cannot be read \(it has 4,294,967,296 bytes, more than"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    "name", ["../other/x.bin", "/etc/passwd", "engines/x", "..", MANIFEST, "a\0b", "a\\b"]
)
def test_a_manifest_that_lists_what_is_outside(copy, name):
    document = json.loads((copy / MANIFEST).read_text())
    document["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    (copy / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(BundleError, match="no file of a bundle"):
        Bundle.open(copy)


@pytest.mark.parametrize(("field", "value"), [("grid", [5, 5]), ("grid", [9, 16]), ("channels", 7)])
def test_features_that_are_not_the_manifests(copy, field, value):
    document = json.loads((copy / MANIFEST).read_text())
    document[field] = value
    (copy / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"gives features of \[1, 128, 12, 12\], its manifest says"):
        ditf.load(copy)


def test_arrays_that_inflate_without_end(copy):
    with (
        zipfile.ZipFile(copy / files.GOLDEN, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("images.npy", "w", force_zip64=True) as member,
    ):
        for _ in range(1100):
            member.write(bytes(1 << 20))
    sign(copy, files.GOLDEN)
    with pytest.raises(BundleError, match=r"holds no arrays \(golden.npz inflates to 1,153,433,600 bytes"):
        Bundle.open(copy).read_arrays(files.GOLDEN)


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
