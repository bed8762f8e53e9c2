"""A condition is chosen at run time, by name from a bank or by custom embeddings for a live graph."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest

import ditf
from ditf.calib.images import procedural_image
from ditf.runtime.bundles.conditions import Conditions
from ditf.runtime.errors import BundleError, InputError


@pytest.fixture(scope="module")
def bank(bank_bundle):
    with ditf.load(bank_bundle) as model:
        yield model


@pytest.fixture(scope="module")
def live(live_bundle):
    with ditf.load(live_bundle) as model:
        yield model


IMAGE = procedural_image((48, 80), 1)


def test_names_in_order(bank, live):
    assert bank.conditions == ("cat@90", "cat@260", "dog@90", "dog@260")
    assert live.conditions == ("a cat", "a dog")


def test_the_first_is_the_default(bank):
    first = bank.features(IMAGE).array
    np.testing.assert_array_equal(first, bank.features(IMAGE, prompt="cat@90").array)


def test_every_condition_gives_other_features(bank):
    maps = [bank.features(IMAGE, prompt=name).array.astype(np.float32) for name in bank.conditions]
    for index, one in enumerate(maps):
        for other in maps[index + 1 :]:
            assert np.abs(one - other).max() > 1e-2


def test_a_batch_shares_its_condition(bank):
    several = bank.features_of([IMAGE, IMAGE], prompt="dog@260")
    one = bank.features(IMAGE, prompt="dog@260")
    np.testing.assert_allclose(several[1].array, one.array, atol=1e-3)


def test_an_unknown_name_lists_the_known(bank):
    with pytest.raises(InputError, match="no condition 'bird'; choose one of 'cat@90', 'cat@260'"):
        bank.features(IMAGE, prompt="bird")


def test_a_bank_takes_no_embeddings(bank):
    with pytest.raises(InputError, match="a bank takes its own rows only"):
        bank.features(IMAGE, embeddings={"modulation": np.zeros((3, 48), np.float32)})


def test_a_baked_bundle_has_nothing_to_choose(demo_bundle):
    with ditf.load(demo_bundle) as model:
        model.features(procedural_image((64, 64), 0), prompt="null")
        with pytest.raises(InputError, match="baked in and knows no 'cat'"):
            model.features(IMAGE, prompt="cat")
        with pytest.raises(InputError, match="export it with --conditioning live"):
            model.features(IMAGE, embeddings={})


def test_a_live_graph_takes_the_embeddings_of_another_prompt(live):
    feeds = live._runner.feeds(prompt="a dog")
    own = live.features(IMAGE, embeddings=feeds).array
    np.testing.assert_array_equal(own, live.features(IMAGE, prompt="a dog").array)
    assert np.abs(own.astype(np.float32) - live.features(IMAGE).array).max() > 1e-2


def test_a_live_graph_takes_another_timestep(live):
    other = live.features(IMAGE, embeddings={"timestep": np.array([600])}).array
    assert np.abs(other.astype(np.float32) - live.features(IMAGE).array).max() > 1e-2


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ({"prompt": np.zeros(1)}, "no input 'prompt'; choose from"),
        ({"timestep": np.array([1.0])}, r"timestep must be int64 \[1\], got float64 \[1\]"),
        ({"guidance": np.zeros(2, np.float32)}, r"guidance must be float32 \[1\], got float32 \[2\]"),
        ({"guidance": np.array([np.nan], np.float32)}, "guidance holds NaN"),
        ({"timestep": np.array([1000])}, r"timestep 1000 is out of range; choose 0\.\.999"),
        ({"timestep": np.array([-1])}, "timestep -1 is out of range"),
    ],
)
def test_embeddings_that_do_not_fit(live, embeddings, message):
    with pytest.raises(InputError, match=message):
        live.features(IMAGE, embeddings=embeddings)


def test_damaged_conditions_are_refused(bank_bundle, tmp_path):
    copy = shutil.copytree(bank_bundle, tmp_path / "bundle")
    (copy / "conditions.npz").write_bytes(b"PK")
    with pytest.raises(BundleError, match=r"conditions\.npz is truncated"):
        ditf.load(copy)
    (copy / "conditions.npz").unlink()
    with pytest.raises(BundleError, match=r"conditions\.npz is missing"):
        ditf.load(copy)


@pytest.mark.parametrize("value", [600, [600], np.int32(600), np.array([600])])
def test_a_number_is_a_timestep(live, value):
    expected = live.features(IMAGE, embeddings={"timestep": np.array([600])}).array
    np.testing.assert_array_equal(live.features(IMAGE, embeddings={"timestep": value}).array, expected)


@pytest.mark.parametrize(
    "embeddings", [[1], {"timestep": None}, {"timestep": "x"}, {"timestep": [[1], [2, 3]]}]
)
def test_embeddings_that_are_no_arrays(live, embeddings):
    with pytest.raises(InputError, match=r"timestep must be|embeddings must be"):
        live.features(IMAGE, embeddings=embeddings)


@pytest.mark.parametrize("damage", ["truncated", "empty", "objects", "shapes", "missing"])
def test_damaged_conditions_that_are_signed_for(bank_bundle, tmp_path, damage):
    copy = shutil.copytree(bank_bundle, tmp_path / "bundle")
    path = copy / "conditions.npz"
    with np.load(path) as file:
        arrays = dict(file)
    if damage in ("truncated", "empty"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "truncated" else 0])
    else:
        name = "0.level"
        changed = {"objects": np.array([None, {}]), "shapes": np.zeros(3, np.float32)}.get(damage)
        rest = {key: array for key, array in arrays.items() if key != name}
        np.savez(path, **rest, **({} if changed is None else {name: changed}))
    manifest = json.loads((copy / "manifest.json").read_text())
    content = path.read_bytes()
    manifest["files"]["conditions.npz"] = {
        "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()
    }  # fmt: skip
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"conditions\.npz (holds no arrays|does not fit|lacks)"):
        ditf.load(copy)


def test_conditions_of_another_graph(bank_bundle, bank):
    with pytest.raises(BundleError, match="does not fit the graph"):
        Conditions(bank.bundle, {"image": (1, 48, 80, 3)})
    document = json.loads((bank_bundle / "manifest.json").read_text())
    assert [entry["timestep"] for entry in document["conditions"]] == [90, 260, 90, 260]
