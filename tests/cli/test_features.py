"""`ditf features` into a store, and into an .npz file of another type."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ditf.calib.images import procedural_image
from ditf.runtime.store.feature_store import FeatureStore, map_files
from tests.processes import started


@pytest.fixture
def folders(tmp_path):
    """Two folders with an image of the same name, one of them with one more in a folder of its own."""
    for seed, name in enumerate(("one/a.png", "two/a.png", "two/deep/b.jpg")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(procedural_image((40, 50 + seed), seed)).save(tmp_path / name)
    return "one", "two"


def test_a_store(ditf, demo_bundle, folders, tmp_path):
    done = ditf("features", demo_bundle, *folders, "./one/a.png", "-o", "store/", "--json", "f.json")
    assert done.returncode == 0, done.stderr
    assert "3 maps of 128 channels, float16" in done.stdout
    assert "3 computed, 0 kept, 0 failed" in done.stdout
    assert "[3/3" in done.stderr
    report = json.loads((tmp_path / "f.json").read_text())
    assert (report["ok"], report["maps"], report["computed"], report["loss"]) == (True, 3, 3, 0.0)
    assert report["bytes"] == sum(path.stat().st_size for path in map_files(tmp_path / "store"))
    store = FeatureStore(tmp_path / "store")
    assert store.names == ("one/a.png", "two/a.png", "two/deep/b.jpg")
    assert store["two/deep/b.jpg"].image_size == (40, 52)
    again = ditf("features", demo_bundle, *folders, "--output", "store")
    assert "0 computed, 3 kept, 0 failed" in again.stdout


def test_what_fails_is_listed_and_mended_by_a_rerun(ditf, demo_bundle, folders, tmp_path):
    whole = (tmp_path / "one" / "a.png").read_bytes()
    (tmp_path / "one" / "broken.png").write_bytes(whole[:200])
    (tmp_path / "one" / "empty.png").write_bytes(b"")
    (tmp_path / "one" / "c.heic").write_bytes(b"")
    done = ditf("features", demo_bundle, *folders, "-o", "store", "--json", "f.json", "-q")
    assert done.returncode == 1
    assert "3 computed, 0 kept, 2 failed" in done.stdout
    assert "one/broken.png is not a readable image" in done.stdout
    assert done.stderr.count("\n") == 1
    assert "2 of 5 images failed; the first is one/broken.png" in done.stderr
    report = json.loads((tmp_path / "f.json").read_text())
    assert not report["ok"]
    assert list(report["failed"]) == ["one/broken.png", "one/empty.png"]
    for name in ("broken.png", "empty.png"):
        (tmp_path / "one" / name).write_bytes(whole)
    done = ditf("features", demo_bundle, *folders, "-o", "store")
    assert done.returncode == 0
    assert "2 computed, 3 kept, 0 failed" in done.stdout
    assert "one: skipped, because they are no image files: c.heic\n" in done.stderr


def test_a_list_and_a_name_that_is_not_there(ditf, demo_bundle, folders, tmp_path):
    """One mistyped name of many is one failure, wherever it stands."""
    (tmp_path / "list.txt").write_bytes(b"one/a.png\r\n\none/mistyped.png\n./one/a.png\n")
    done = ditf(
        "features", demo_bundle, "absent.png", "--input", "list.txt", "--input", "two", "-o", "store", "-q"
    )
    assert done.returncode == 1
    assert "3 computed, 0 kept, 2 failed" in done.stdout
    assert "absent.png: no such image" in done.stdout
    assert "one/mistyped.png: no such image" in done.stdout
    assert done.stderr.count("\n") == 1


def test_ray_that_is_not_installed(demo_bundle, folders, tmp_path):
    code = (
        "import sys; sys.modules['ray'] = None; from ditf.cli.main import run;"
        f" sys.exit(run(['features', {str(demo_bundle)!r}, 'one', '-o', 'store', '--engine', 'ray', '-q']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr == "error: ray[data] is not installed; run: pip install 'ditf[ray]'\n"
    assert not (tmp_path / "store").exists()


def test_a_store_of_another_bundle_is_left_alone(ditf, demo_bundle, demo_bundle_float32, folders, tmp_path):
    assert ditf("features", demo_bundle, "one", "-o", "store").returncode == 0
    before = (tmp_path / "store" / "store.json").read_bytes()
    for arguments in ((demo_bundle_float32, "one"), (demo_bundle, "one", "--fit", "pad")):
        done = ditf("features", *arguments, "-o", "store")
        assert done.returncode == 2
        assert "store holds other features" in done.stderr
        assert done.stderr.count("\n") == 1
    assert (tmp_path / "store" / "store.json").read_bytes() == before
    (tmp_path / "store" / "store.json").unlink()
    done = ditf("features", demo_bundle_float32, "one", "-o", "store")
    assert done.returncode == 2
    assert "store has no store.json, and" in done.stderr
    done = ditf("features", demo_bundle, "one", "-o", "store")
    assert "0 computed, 1 kept, 0 failed" in done.stdout
    done = ditf("features", demo_bundle_float32, "one", "-o", "other")
    assert "rounding to float16 cost at most" in done.stdout
    done = ditf("features", demo_bundle_float32, "one", "-o", "exact", "--features-dtype", "float32")
    assert "rounding" not in done.stdout
    assert FeatureStore(tmp_path / "exact")["one/a.png"].array.dtype == np.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one", "-o", "one/a.png"], "would overwrite"),
        (["one", "-o", "one/store"], "would overwrite"),
        (["one", "-o", "file"], "file is a file; name a directory, or a file that ends in .npz"),
        (["one", "-o", "two"], "two exists and is not a feature store"),
        (["absent.png", "-o", "store"], "absent.png: no such image"),
        (["one", "absent.png", "-o", "f.npz"], "absent.png: no such image"),
        (["-o", "store"], "no images are given"),
        (["--input", "absent.txt", "-o", "store"], "absent.txt cannot be read (No such file"),
        (["--input", "file", "-o", "store"], "file is no list of images"),
        (["--input", "one/a.png", "-o", "store"], "is an image; leave --input out"),
        (["one", "-o", "store", "--engine", "spark"], "unknown engine 'spark'; choose one of local, ray"),
        (["one", "-o", "store", "--workers", "2"], "add --engine ray"),
        (["one", "-o", "store", "--ray-address", "auto"], "add --engine ray"),
        (["one", "-o", "f.npz", "--engine", "ray"], "name a directory"),
        (["one", "-o", "store", "--engine", "ray", "--ray-address", "127.0.0.1:9"], "no Ray cluster at 127"),
        (["nothing", "-o", "store"], "nothing holds no images"),
        (["one", "-o", "store", "--features-dtype", "int8"], "is not float16 or float32"),
        (["one", "-o", "store", "--fit", "crop"], "stretch, pad"),
        (["one", "-o", "store", "--prompt", "a cat"], "a cat"),
        (["one", "-o", "store", "--json", "store/f.json"], "would overwrite"),
        (["one", "-o", "/proc/store"], "/proc/store"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(ditf, demo_bundle, folders, tmp_path, arguments, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "nothing").mkdir()
    done = ditf("features", demo_bundle, *arguments, "-q")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "nothing", "one", "two"]


def test_an_interrupted_run_is_taken_up_again(ditf, demo_bundle, tmp_path):
    (tmp_path / "images").mkdir()
    for seed in range(40):
        Image.fromarray(procedural_image((40, 40), seed)).save(tmp_path / "images" / f"{seed:02}.png")
    command = [sys.executable, "-m", "ditf", "features", str(demo_bundle), "images", "-o", "store"]
    with started(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        for line in process.stderr:
            if line.startswith("[4/40"):
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest.splitlines()[-1].endswith("nothing was left half-written")
    there = len(FeatureStore(tmp_path / "store"))
    assert 2 <= there < 40
    assert not list((tmp_path / "store" / "partial").iterdir())
    assert len(json.loads((tmp_path / "store" / "index.json").read_text())["maps"]) == there
    done = ditf("features", demo_bundle, "images", "-o", "store")
    assert f"{40 - there} computed, {there} kept, 0 failed" in done.stdout


def test_a_full_disk_keeps_what_is_whole(demo_bundle, folders, tmp_path):
    """A limit on file size stands in for a full disk: both fail in the middle of writing a file."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from ditf.cli.main import run\n"
        f"sys.exit(run(['features', {str(demo_bundle)!r}, 'one', '-q', '-o', 'store']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not map_files(tmp_path / "store")
    assert not list((tmp_path / "store" / "partial").iterdir())


def test_npz_in_another_type(ditf, demo_bundle, folders, tmp_path):
    done = ditf("features", demo_bundle, "one", "-o", "f.npz", "--features-dtype", "float32")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "f.npz") as arrays:
        assert list(arrays["names"]) == ["one/a.png"]
        assert arrays["features_0"].dtype == np.float32
