"""A FeatureStore returns what was written, and refuses what is damaged or belongs to another store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save

from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.errors import InputError, NewerSchema
from ditf.runtime.features import FeatureMap
from ditf.runtime.files import writing
from ditf.runtime.files.liveness import STALE, file_system_time, try_lock
from ditf.runtime.matching.points import match_points
from ditf.runtime.store import writer
from ditf.runtime.store.feature_store import FeatureStore, StoreIdentity, map_files, map_path
from ditf.runtime.store.stored_map import read_stored
from ditf.runtime.store.writer import StoreWriter

IDENTITY = StoreIdentity("f" * 64, "demo", "layer 9 = block.9 of 12", None, "stretch", "float16", 5)


def feature_map(seed=0, shape=(5, 4, 6), dtype=np.float16, image_size=(40, 60), extent=None):
    array = np.random.default_rng(seed).normal(size=shape).astype(dtype)
    return FeatureMap(array, image_size, extent)


@pytest.fixture
def store(tmp_path):
    """A store with two maps, of a whole image and of a padded one."""
    with StoreWriter(tmp_path / "store", IDENTITY) as writer:
        writer.put("a.png", "1" * 64, feature_map(0))
        writer.put("two/a.png", "2" * 64, feature_map(1, (5, 3, 6), image_size=(33, 70), extent=(2.5, 6.0)))
    return tmp_path / "store"


def test_what_is_written_is_read(store):
    opened = FeatureStore(store)
    assert opened.names == ("a.png", "two/a.png") == tuple(opened)
    assert len(opened) == 2
    assert "a.png" in opened
    assert "b.png" not in opened
    found = opened["two/a.png"]
    assert (found.image_size, found.cells, found.grid) == ((33, 70), (2.5, 6.0), (3, 6))
    assert isinstance(found.array, np.memmap)
    assert not found.array.flags.writeable
    np.testing.assert_array_equal(found.array, feature_map(1, (5, 3, 6)).array)
    for absent in ("b.png", 0):
        with pytest.raises(KeyError, match=str(absent)):
            opened[absent]


def test_matching_stored_maps_is_matching_in_memory(store):
    points = np.random.default_rng(0).uniform(0, 39, (50, 2))
    opened = FeatureStore(store)
    target = feature_map(1, (5, 3, 6), image_size=(33, 70), extent=(2.5, 6.0))
    expected = match_points(feature_map(0), target, points)
    actual = match_points(opened["a.png"], opened["two/a.png"], points)
    np.testing.assert_array_equal(actual.points, expected.points)
    np.testing.assert_array_equal(actual.scores, expected.scores)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    name=st.text(min_size=1, max_size=40),
    shape=st.tuples(st.just(5), st.integers(1, 5), st.integers(1, 5)),
    dtype=st.sampled_from(["float16", "float32"]),
)
def test_any_name_and_shape(tmp_path_factory, name, shape, dtype):
    path = tmp_path_factory.mktemp("any") / "store"
    given_map = feature_map(3, shape, np.dtype(dtype))
    with StoreWriter(path, replace(IDENTITY, dtype=dtype)) as writer:
        assert writer.put(name, "3" * 64, given_map) == 0.0
        assert writer.has(name, "3" * 64)
    opened = FeatureStore(path)
    assert opened.names == (name,)
    np.testing.assert_array_equal(opened[name].array, given_map.array)


def test_the_loss_of_float16(tmp_path):
    with StoreWriter(tmp_path / "s", IDENTITY) as writer:
        loss = writer.put("a", "1" * 64, feature_map(dtype=np.float32))
    assert 1e-4 < loss < 2**-11  # half a unit in the last of 11 bits at most
    assert FeatureStore(tmp_path / "s")["a"].array.dtype == np.float16


def test_values_beyond_float16_are_refused(tmp_path):
    large = FeatureMap(np.full((5, 1, 1), 7e4, np.float32), (9, 9))
    with (
        StoreWriter(tmp_path / "s", IDENTITY) as writer,
        pytest.raises(InputError, match=r"reach 7e\+04.*--features-dtype float32"),
    ):
        writer.put("a", "1" * 64, large)
    assert not map_files(tmp_path / "s")


def test_the_index_is_derived_from_the_maps(store):
    index = json.loads((store / "index.json").read_text())
    assert list(index["maps"]) == ["a.png", "two/a.png"]
    assert index["maps"]["two/a.png"]["shape"] == [5, 3, 6]
    for damage in ("", "{", '{"maps": []}', '{"maps": {"x": 3}}'):
        (store / "index.json").write_text(damage)
        assert FeatureStore(store).names == ("a.png", "two/a.png")
    (store / "index.json").unlink()
    assert FeatureStore(store).names == ("a.png", "two/a.png")
    with StoreWriter(store, IDENTITY):
        pass
    assert json.loads((store / "index.json").read_text()) == index


def test_a_map_is_there_for_this_image_and_store_alone(store):
    writer = StoreWriter(store, IDENTITY)
    assert writer.has("a.png", "1" * 64)
    assert not writer.has("a.png", "2" * 64)  # the image has changed
    assert not writer.has("b.png", "1" * 64)
    writer.put("a.png", "2" * 64, feature_map(7))
    assert writer.has("a.png", "2" * 64)
    np.testing.assert_array_equal(FeatureStore(store)["a.png"].array, feature_map(7).array)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": "0" * 64}, "another export of the same layer"),
        ({"features": "0" * 64, "layer": "layer 3"}, "layer layer 9 = block.9 of 12, not layer 3"),
        ({"prompt": "a cat"}, "prompt None, not a cat"),
        ({"fit": "pad"}, "fit stretch, not pad"),
        ({"dtype": "float32"}, "dtype float16, not float32"),
    ],
)
def test_a_store_of_other_features_is_refused(store, changes, message):
    with pytest.raises(InputError, match=f"holds other features: {message}"):
        StoreWriter(store, replace(IDENTITY, **changes))


def test_the_default_condition_has_its_name(bank_bundle, demo_bundle):
    bank = Bundle.open(bank_bundle)
    default = StoreIdentity.of(bank, "stretch", None, "float16")
    assert default.prompt == bank.manifest.conditions[0]["name"]
    assert default == StoreIdentity.of(bank, "stretch", default.prompt, "float16")
    assert StoreIdentity.of(Bundle.open(demo_bundle), "stretch", None, "float16").prompt == "null"
    with pytest.raises(InputError, match="not float16 or float32"):
        StoreIdentity.of(bank, "stretch", None, "int8")


def test_a_map_of_another_store_is_noticed(store, tmp_path):
    with StoreWriter(tmp_path / "other", replace(IDENTITY, features="0" * 64)) as writer:
        writer.put("a.png", "1" * 64, feature_map(9))
    shutil.copy(map_path(tmp_path / "other", "a.png"), map_path(store, "a.png"))
    with pytest.raises(InputError, match="is of another store or bundle"):
        FeatureStore(store)["a.png"]
    assert not StoreWriter(store, IDENTITY).has("a.png", "1" * 64)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_map_is_refused_and_computed_again(store, keep):
    path = map_path(store, "a.png")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"is no whole feature map .*run ditf features again"):
        FeatureStore(store)["a.png"]
    with StoreWriter(store, IDENTITY) as writer:
        assert not writer.has("a.png", "1" * 64)
        writer.put("a.png", "1" * 64, feature_map(0))
    np.testing.assert_array_equal(FeatureStore(store)["a.png"].array, feature_map(0).array)


def test_values_that_are_not_finite_are_refused(store):
    path = map_path(store, "a.png")
    content = path.read_bytes()
    path.write_bytes(content[:-2] + np.float16(np.nan).tobytes())
    with pytest.raises(InputError, match="NaN or infinity"):
        FeatureStore(store)["a.png"]


def test_what_is_no_store(tmp_path, store):
    with pytest.raises(InputError, match="is not a feature store"):
        FeatureStore(tmp_path)
    with pytest.raises(InputError, match="exists and is not a feature store"):
        StoreWriter(tmp_path, IDENTITY)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; name a directory"):
        StoreWriter(tmp_path / "file", IDENTITY)
    for text in ("{", "[]", '{"schema": 1}', '{"schema": 1, "features": 3}'):
        (store / "store.json").write_text(text)
        with pytest.raises(InputError, match="cannot be read"):
            FeatureStore(store)
    (store / "store.json").write_text('{"schema": 2}')
    with pytest.raises(NewerSchema, match="has schema 2"):
        FeatureStore(store)


def test_several_writers_at_once(tmp_path):
    """The writers create the store together, write equal and different maps, and list each other's."""

    def write(number):
        with StoreWriter(tmp_path / "s", IDENTITY) as writer:
            for index in range(10):
                writer.put(f"own {number} {index}", "1" * 64, feature_map(index))
                writer.put(f"same {index}", "1" * 64, feature_map(index))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with StoreWriter(tmp_path / "s", IDENTITY) as writer:
        pass
    assert len(writer.entries) == 50 == len(FeatureStore(tmp_path / "s"))
    assert not list((tmp_path / "s" / "partial").iterdir())
    np.testing.assert_array_equal(FeatureStore(tmp_path / "s")["same 3"].array, feature_map(3).array)


def test_of_two_bundles_at_once_one_wins(tmp_path):
    first, second = (StoreWriter(tmp_path / "s", replace(IDENTITY, features=c * 64)) for c in "ab")
    with first, pytest.raises(InputError, match="holds other features"), second:
        pass


def aged(path, days=2.0, text="x"):
    """A file that was last written days ago, by the file system's clock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, ns=(file_system_time(path.parent) - int(days * STALE),) * 2)
    return path


OWN = f"{'0' * 32}-{'1' * 32}"


def test_what_a_killed_writer_left_goes_after_a_day(store, monkeypatch):
    """A day counts by the file system's clock, because this machine's may be ahead."""
    gone = [aged(store / "partial" / name) for name in (OWN, f"store-{'1' * 32}", f"index-{'1' * 32}")]
    kept = aged(store / "partial" / f"{'2' * 32}-{'1' * 32}", 0.9)
    late = time.time() + 90_000
    monkeypatch.setattr(time, "time", lambda: late)
    with StoreWriter(store, IDENTITY):
        assert list((store / "partial").iterdir()) == [kept]
    assert not any(path.exists() for path in gone)


def test_a_live_writers_file_stays_however_old_it_looks(store):
    code = (
        "import sys; from pathlib import Path\n"
        "from ditf.runtime.files.liveness import try_lock\n"
        "from ditf.runtime.files.writing import created\n"
        "with created(Path(sys.argv[1])) as file:\n"
        "    print(try_lock(file.fileno()), flush=True); sys.stdin.read()\n"
        "    print(Path(sys.argv[1]).exists())\n"
    )
    path = store / "partial" / OWN
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "True\n"
        os.utime(path, (0, 0))
        with StoreWriter(store, IDENTITY):
            pass
        assert process.communicate("")[0] == "True\n"


def test_what_is_written_is_locked(store, monkeypatch):
    held = []

    def publish(file, temporary, path):
        with temporary.open("r+b") as other:
            held.append(try_lock(other.fileno()))
        writing.publish(file, temporary, path)

    monkeypatch.setattr(writer, "publish", publish)
    StoreWriter(store, IDENTITY).put("c", "3" * 64, feature_map(2))
    assert held == [False]


def test_nothing_is_removed_that_is_not_the_stores(store, tmp_path):
    """Files with other names, links, targets of links and folders are kept."""
    elsewhere = aged(tmp_path / "elsewhere" / "photograph")
    kept = [aged(store / "partial" / name) for name in ("notes.txt", f"{OWN}.txt", "0" * 32)]
    kept += [aged(store / "maps" / "ab" / "notes.txt"), elsewhere]
    link, folder = (store / "partial" / f"{digit * 32}-{'1' * 32}" for digit in "23")
    link.symlink_to(elsewhere)
    kept += [link, aged(folder / "file")]
    with StoreWriter(store, IDENTITY):
        pass
    assert all(os.path.lexists(path) for path in kept)


@pytest.mark.parametrize(
    "name", ["partial/thesis", "maps/thesis", "maps/ab/thesis", f"maps/00/{'1' * 32}.safetensors"]
)
def test_a_folder_with_such_names_is_no_store(tmp_path, name):
    path = aged(tmp_path / "mine" / name)
    with pytest.raises(InputError, match="exists and is not a feature store"):
        StoreWriter(tmp_path / "mine", IDENTITY)
    assert path.exists()


def test_nothing_is_removed_from_what_was_no_store_before(tmp_path):
    path = aged(tmp_path / "new" / "partial" / OWN)
    with StoreWriter(tmp_path / "new", IDENTITY):
        assert path.exists()


@pytest.mark.parametrize("part", ["partial", "maps"])
def test_parts_that_are_links_are_refused(store, tmp_path, part):
    (store / part).rename(tmp_path / "elsewhere")
    (store / part).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"{part} is a link"):
        StoreWriter(store, IDENTITY)


@pytest.mark.parametrize("where", [-2, -200, "extent"])
def test_damage_is_found_by_a_rerun_and_by_verify(store, where):
    """The changes are in the numbers and in the metadata."""
    path = map_path(store, "a.png")
    content = bytearray(path.read_bytes())
    if where == "extent":
        content = content.replace(b"[4.0, 6.0]", b"[3.0, 6.0]")
    else:
        content[where] ^= 1
    path.write_bytes(content)
    assert FeatureStore(store)["a.png"].grid == (4, 6)  # what no digest is compared for may be anything
    with pytest.raises(InputError, match="is not what was written; run ditf features again"):
        FeatureStore(store, verify=True)["a.png"]
    with StoreWriter(store, IDENTITY) as writer:
        assert not writer.has("a.png", "1" * 64)
        assert writer.has("two/a.png", "2" * 64)
        writer.put("a.png", "1" * 64, feature_map(0))
        assert writer.has("a.png", "1" * 64)
    np.testing.assert_array_equal(FeatureStore(store, verify=True)["a.png"].array, feature_map(0).array)


def test_a_store_of_0_1_0_is_read_and_computed_again(store):
    """Its maps have no digest, so nothing shows that they are whole."""
    path = map_path(store, "a.png")
    with safe_open(path, framework="numpy") as file:
        noted, array = file.metadata(), file.get_tensor("features")
    assert noted.pop("sha256")
    path.write_bytes(save({"features": array}, noted))
    np.testing.assert_array_equal(FeatureStore(store)["a.png"].array, feature_map(0).array)
    with pytest.raises(InputError, match="has no digest"):
        FeatureStore(store, verify=True)["a.png"]
    assert not StoreWriter(store, IDENTITY).has("a.png", "1" * 64)


def test_a_map_under_another_images_name_is_refused(store):
    one, other = map_path(store, "a.png"), map_path(store, "two/a.png")
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    with pytest.raises(
        InputError, match=r"is the map of 'two/a.png', not of 'a.png'; run ditf features again"
    ):
        FeatureStore(store)["a.png"]
    (store / "index.json").unlink()
    with pytest.raises(InputError, match="whose place is another"):
        FeatureStore(store).names  # noqa: B018
    with StoreWriter(store, IDENTITY) as writer:
        assert not writer.has("a.png", "1" * 64)
        writer.put("a.png", "1" * 64, feature_map(0))
    assert list(writer.entries) == ["a.png"]


def test_an_index_that_lies_changes_nothing(store):
    index = json.loads((store / "index.json").read_text())
    maps = index["maps"]
    one, other = maps["a.png"], maps["two/a.png"]
    for lie in ({"a.png": other, "two/a.png": one}, {"x": one, "two/a.png": other}, {"x": 3, "": None}):
        (store / "index.json").write_text(json.dumps({**index, "maps": lie}))
        opened = FeatureStore(store)
        assert opened.names == ("a.png", "two/a.png")
        np.testing.assert_array_equal(opened["a.png"].array, feature_map(0).array)


def test_a_map_that_is_no_regular_file(store):
    path = map_path(store, "a.png")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match=r"is no whole feature map .*FIFO"):
        read_stored(path)
    assert not StoreWriter(store, IDENTITY).has("a.png", "1" * 64)


def test_without_safetensors():
    code = (
        "import sys; sys.modules['safetensors'] = None\n"
        "from ditf.runtime.store.feature_store import FeatureStore\n"
        "try: FeatureStore('absent')\n"
        "except Exception as error: print(error.exit_code, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "3 safetensors is not installed; run: pip install 'ditf[eval]'\n", done.stderr


def test_an_index_of_another_program_is_no_store(tmp_path):
    (tmp_path / "index.json").write_text('{"my": "precious"}')
    with pytest.raises(InputError, match="is not a feature store"):
        StoreWriter(tmp_path, IDENTITY)
    assert (tmp_path / "index.json").read_text() == '{"my": "precious"}'


@pytest.mark.parametrize("name", ["index.json", "store.json"])
def test_files_of_a_store_that_are_links_are_refused(tmp_path, name):
    with StoreWriter(tmp_path / "store", IDENTITY):
        pass
    (tmp_path / "store" / name).rename(tmp_path / "outside")
    (tmp_path / "store" / name).symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="is no regular file"):
        StoreWriter(tmp_path / "store", IDENTITY)
