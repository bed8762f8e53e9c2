"""Extraction over a Ray cluster, tested in single steps and as a whole on a real local cluster."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import ditf
from ditf.calib.images import procedural_image
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.errors import InputError
from ditf.runtime.store.extraction_ray import (
    COMPUTED,
    FAILED,
    FATAL,
    KEPT,
    PENDING,
    ExtractionJob,
    Extractor,
    prepare,
)
from ditf.runtime.store.feature_store import FeatureStore, StoreIdentity, map_files
from ditf.runtime.store.writer import StoreWriter
from tests.processes import started


def columns(paths):
    names = np.array([path.name for path in paths])
    return {"name": names, "path": np.array([str(path) for path in paths])}


@pytest.fixture
def images(tmp_path):
    paths = [tmp_path / f"{seed}.png" for seed in range(4)]
    for seed, path in enumerate(paths):
        Image.fromarray(procedural_image((40, 50 + seed), seed)).save(path)
    return paths


@pytest.fixture
def job(demo_bundle, tmp_path):
    identity = StoreIdentity.of(Bundle.open(demo_bundle), "pad", None, "float16")
    with StoreWriter(tmp_path / "store", identity) as writer:
        made = ExtractionJob.of(Bundle.open(demo_bundle), writer, None, "pad", "onnxruntime")
    assert not list((tmp_path / "store" / "partial").iterdir())
    return made


def test_what_two_steps_store_is_what_one_process_stores(job, images, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"x")
    paths = [*images, tmp_path / "broken.png", tmp_path / "absent.png"]
    read = prepare(columns(paths), job)
    assert list(read["state"]) == [PENDING] * 4 + [FAILED] * 2
    assert "broken.png is not a readable image" in read["reason"][4]
    assert read["reason"][5] == f"{tmp_path}/absent.png: no such image"
    done = Extractor(job)(read)
    assert list(done["state"]) == [COMPUTED] * 4 + [FAILED] * 2
    assert list(done["name"]) == [path.name for path in paths]
    store = FeatureStore(job.store)
    with ditf.load(job.bundle, "onnxruntime", "pad") as model:
        for path in images:
            expected = model.features(path)
            np.testing.assert_array_equal(store[path.name].array, expected.array)
            assert store[path.name].cells == expected.cells
            assert store[path.name].image_size == expected.image_size


def test_a_lost_process_did_what_it_did(job, images):
    """Ray gives the same rows to another actor; nothing is computed twice, and nothing is missing."""
    read = prepare(columns(images), job)
    half = {name: values[:2] for name, values in read.items()}
    Extractor(job)(half)
    written = {path: path.stat().st_mtime_ns for path in map_files(job.store)}
    done = Extractor(job)(read)
    assert list(done["state"]) == [COMPUTED] * 4
    assert len(map_files(job.store)) == 4
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert list(prepare(columns(images), job)["state"]) == [COMPUTED] * 4
    later = dataclasses.replace(job, started_ns=max(p.stat().st_mtime_ns for p in map_files(job.store)) + 1)
    assert list(prepare(columns(images), later)["state"]) == [KEPT] * 4
    Image.fromarray(procedural_image((40, 40), 9)).save(images[1])
    assert list(prepare(columns(images), later)["state"]) == [KEPT, PENDING, KEPT, KEPT]


def test_a_machine_that_does_not_see_the_store_ends_the_run(job, images, tmp_path, demo_bundle_float32):
    read = prepare(columns(images), job)
    elsewhere = dataclasses.replace(job, store=tmp_path / "elsewhere")
    for done in (prepare(columns(images), elsewhere), Extractor(elsewhere)(read)):
        assert set(done["state"]) == {FATAL}
        assert "is not to be seen from" in json.loads(done["reason"][0])[1]
    assert not (tmp_path / "elsewhere").exists()
    passed_on = Extractor(job)(prepare(columns(images), elsewhere))
    assert set(passed_on["state"]) == {FATAL}
    other = Extractor(dataclasses.replace(job, bundle=demo_bundle_float32))(read)
    assert "is another bundle" in json.loads(other["reason"][0])[1]
    assert not map_files(job.store)


CLUSTER = """
import ray, sys
context = ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False,
                   object_store_memory=100_000_000, logging_level="ERROR")
print(context.address_info["address"], flush=True)
sys.stdin.read()
ray.shutdown(wait_for_processes=True)
"""


@pytest.fixture(scope="module")
def environment():
    """A folder for Ray's files. Its name is short, because the path of a socket has at most 107 letters."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    yield {
        **os.environ,
        "HOME": str(folder),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",  # else a token is left in the home folder; it listens on loopback
        "OMP_NUM_THREADS": "1",
    }
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(environment):
    """A Ray cluster of two CPUs: its address. Nothing of it is left in the end.

    It says that it has a GPU, which nothing looks for: reading and computing are then steps of their own,
    and two actors share it.
    """
    pytest.importorskip("ray")
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as process:
        address = process.stdout.readline().strip()
        assert ":" in address
        yield address, process.pid
        family = psutil.Process(process.pid).children(recursive=True)
        process.stdin.close()
        process.wait(60)
    _, alive = psutil.wait_procs(family, 20)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def actors(pid):
    """The processes of a cluster that hold an engine or will do so."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if "Extractor" in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


@pytest.mark.slow
def test_an_actor_killed_on_the_way(cluster, environment, demo_bundle, tmp_path):
    """Each image is computed once, and none is lost or failed because its process was killed."""
    address, pid = cluster
    count = 160
    (tmp_path / "images").mkdir()
    for seed in range(count):
        Image.fromarray(procedural_image((40, 40 + seed % 3), seed)).save(tmp_path / f"images/{seed:03}.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"x")
    (tmp_path / "list.txt").write_text("images/000.png\nabsent.png\n")
    arguments = ["--input", "images", "--input", "list.txt", "-o", "store", "--json", "done.json"]
    command = [sys.executable, "-m", "ditf", "features", str(demo_bundle), *arguments]
    ray = ["--engine", "ray", "--ray-address", address, "--workers", "2"]
    seen, killed = [], None
    with started([*command, *ray], cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as process:
        for line in process.stderr:
            if killed is None and line.startswith("["):
                seen = actors(pid)
            if killed is None and len(seen) == 2:
                killed = line
                seen[0].kill()
        output = process.stdout.read()
    assert process.returncode == 1, output  # for the two images that cannot be had
    assert 1 <= int(killed[1:].partition("/")[0]) < count // 2
    assert f"{count} computed, 0 kept, 2 failed" in output
    report = json.loads((tmp_path / "done.json").read_text())
    assert (report["computed"], report["maps"], list(report["failed"])) == (
        count,
        count,
        ["images/broken.png", "absent.png"],
    )
    store = FeatureStore(tmp_path / "store")
    assert store.names == tuple(f"images/{seed:03}.png" for seed in range(count))
    assert len(map_files(tmp_path / "store")) == count
    with ditf.load(demo_bundle) as model:
        for name in store.names[::60]:
            np.testing.assert_array_equal(store[name].array, model.features(tmp_path / name).array)

    lost = store.names[7]
    next(path for path in map_files(tmp_path / "store") if path.name in _file_of(store, lost)).unlink()
    here = ["--engine", "ray", "--ray-address", "local"]  # a cluster of its own, without a GPU: one step
    done = subprocess.run(
        [*command, *here, "-q"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert f"1 computed, {count - 1} kept, 2 failed" in done.stdout
    assert done.stderr.count("\n") == 1, done.stderr  # Ray itself says nothing
    assert lost in FeatureStore(tmp_path / "store")


@pytest.mark.slow
def test_why_no_worker_opens_the_bundle(cluster, environment, demo_bundle, images, tmp_path):
    address, _ = cluster
    command = [sys.executable, "-m", "ditf", "features", str(demo_bundle), "0.png", "-o", "store", "-q"]
    ray = ["--engine", "ray", "--ray-address", address, "--backend", "tensorrt"]
    done = subprocess.run([*command, *ray], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("\n") == 1
    assert "tensorrt" in done.stderr or "libcuda" in done.stderr


def children(process, word):
    """The descendants of a process whose command line holds a word."""
    found = []
    for one in psutil.Process(process.pid).children(recursive=True):
        try:
            if word in " ".join(one.cmdline()):
                found.append(one)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["head", "ditf"])
def test_a_cluster_whose_head_or_user_is_lost(environment, demo_bundle, tmp_path, lost):
    """Ray's core ends its process when it loses the head. No process of the cluster outlives the test."""
    (tmp_path / "images").mkdir()
    for seed in range(200):
        Image.fromarray(procedural_image((40, 40), seed)).save(tmp_path / f"images/{seed:03}.png")
    ray = ["--engine", "ray", "--ray-address", "local"]
    command = [sys.executable, "-m", "ditf", "features", str(demo_bundle), "images", "-o", "store", *ray]
    environment = {**environment, "RAY_gcs_rpc_server_reconnect_timeout_s": "2"}
    with started(command, cwd=tmp_path, env=environment) as process:
        for line in process.stderr:
            if line.startswith("["):
                break
        family = psutil.Process(process.pid).children(recursive=True)
        (process if lost == "ditf" else children(process, "gcs_server")[0]).kill()
        last = process.stderr.read().splitlines()[-1] if lost == "head" else ""
        process.wait(60)
    _, alive = psutil.wait_procs(family, 30)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
    if lost == "head":
        assert process.returncode == 3
        assert last.startswith("error: the head of the Ray cluster was lost (Failed to connect to GCS")
        assert "start the cluster again" in last


def _file_of(store, name):
    index = json.loads((store.path / "index.json").read_text())
    return index["maps"][name]["file"]


def test_a_store_without_its_identity_keeps_its_maps(job, images):
    """A run that computes the same features continues the store, and any other run refuses it."""
    Extractor(job)(prepare(columns(images), job))
    (job.store / "store.json").unlink()
    for changes in ({"features": "f" * 64}, {"fit": "stretch"}, {"dtype": "float32"}, {"prompt": "a cat"}):
        with pytest.raises(InputError, match=r"has no store\.json, and .* is of other features"):
            StoreWriter(job.store, dataclasses.replace(job.identity, **changes))
    assert not (job.store / "store.json").exists()
    with StoreWriter(job.store, job.identity):
        pass
    assert len(FeatureStore(job.store)) == 4
